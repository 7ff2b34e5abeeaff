//! A pseudo terminal.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr, tcsetwinsize},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// Size of a terminal's window, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Our end of a pseudo terminal. Clones share it: one can read while another writes.
#[derive(Debug, Clone)]
pub struct Terminal(Arc<AsyncFd<std::fs::File>>);

/// Opens a pseudo terminal: our end, and the end that becomes a child's terminal.
#[expect(unsafe_code, reason = "AsyncFd")]
pub fn open(window: Window) -> io::Result<(Terminal, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    // By descriptor, not by name: right in whatever mount namespace this is.
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    let both = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: a `File` owns an open descriptor, the same one until it is dropped, and nothing
    // takes it out of the `AsyncFd`: `get_ref` lends it only.
    let ours = unsafe { AsyncFd::register_with_interest(ours.into(), both)? };
    let terminal = Terminal(Arc::new(ours));
    terminal.resize(window)?;
    Ok((terminal, theirs))
}

impl Terminal {
    /// Tells the programs on it a new size.
    pub fn resize(&self, window: Window) -> io::Result<()> {
        let size =
            Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(self.0.get_ref(), size)?)
    }
}

impl Terminal {
    /// Stops this terminal from turning line ends into CR LF: what writes to it passes on the
    /// output of another terminal, which has done so already.
    pub fn keep_line_ends(&self) -> io::Result<()> {
        let terminal = self.0.get_ref();
        let mut settings = tcgetattr(terminal)?;
        settings.output_modes -= OutputModes::OPOST;
        Ok(tcsetattr(terminal, OptionalActions::Now, &settings)?)
    }
}

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let mut file = self.0.get_ref();
            match ready.try_io(|_| file.read(buffer.initialize_unfilled())) {
                Ok(Ok(bytes)) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                // Linux says EIO when the last program has closed its end: the end of the file.
                Ok(Err(error)) if error.raw_os_error() == Some(nix::libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_not_ready) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            let mut file = self.0.get_ref();
            if let Ok(result) = ready.try_io(|_| file.write(bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A terminal has no half-close: the writer sends the end-of-file character if it wants one.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
