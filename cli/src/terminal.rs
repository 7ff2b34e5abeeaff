//! The user's terminal: its size, and modes that are always undone.

use std::io::{self, IsTerminal};

use nix::sys::termios::{self, LocalFlags, SetArg, Termios};
use proto::sandbox::v1::WindowSize;

/// Guard of raw mode; restores the terminal when dropped.
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
        // Ignored, because the terminal may be gone.
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0).ok();
    }
}

/// Guard of a terminal that does not show what is typed; restores it when dropped.
#[derive(Debug)]
pub struct Hidden(Termios);

impl Hidden {
    /// Stops showing what is typed on stdin's terminal.
    ///
    /// # Errors
    /// When stdin is not a terminal or cannot be switched.
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // Ignored, because the terminal may be gone.
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0).ok();
    }
}

/// Whether stdin is a terminal.
pub fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Size of the terminal on stdout or stdin.
pub fn size() -> Option<WindowSize> {
    let size = rustix::termios::tcgetwinsize(io::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(io::stdin()))
        .ok()?;
    let bounded = |characters: u16| u32::from(characters).clamp(1, 1000);
    (size.ws_row > 0 && size.ws_col > 0)
        .then(|| WindowSize { rows: bounded(size.ws_row), cols: bounded(size.ws_col) })
}
