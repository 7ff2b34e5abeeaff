//! The terminal that we sit at: its size, and raw mode that is undone whatever happens.

use std::io::{self, IsTerminal};

use nix::sys::termios::{self, SetArg, Termios};
use proto::sandbox::v1::WindowSize;

/// Puts the terminal back as it was when dropped.
#[derive(Debug)]
pub struct Raw(Termios);

impl Raw {
    /// Switches stdin's terminal to raw mode, so that every key goes to the sandbox.
    ///
    /// # Errors
    /// When stdin is not a terminal or cannot be switched.
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done when the terminal is gone.
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0).ok();
    }
}

/// Whether stdin is a terminal.
pub fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Size of the terminal that stdout or stdin is.
pub fn size() -> Option<WindowSize> {
    let size = rustix::termios::tcgetwinsize(io::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(io::stdin()))
        .ok()?;
    let bounded = |characters: u16| u32::from(characters).clamp(1, 1000);
    (size.ws_row > 0 && size.ws_col > 0)
        .then(|| WindowSize { rows: bounded(size.ws_row), cols: bounded(size.ws_col) })
}
