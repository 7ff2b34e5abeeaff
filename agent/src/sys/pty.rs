//! A pseudo terminal.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::{
    fs::FileType,
    termios::{Winsize, tcsetwinsize},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// Number of the device that our ends of pseudo terminals are.
const PTMX: (u32, u32) = (5, 2);

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

impl Terminal {
    /// Takes our end of a pseudo terminal from somebody who is not trusted: it must be one.
    ///
    /// # Errors
    /// When it is anything else. A file could hold up whoever reads it, this cannot.
    #[expect(unsafe_code, reason = "AsyncFd")]
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        if !is_device || device != PTMX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no pseudo terminal"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        let both = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: a `File` owns an open descriptor, the same one until it is dropped, and nothing
        // takes it out of the `AsyncFd`: `get_ref` lends it only.
        let ours = unsafe { AsyncFd::register_with_interest(fd.into(), both)? };
        Ok(Self(Arc::new(ours)))
    }

    /// Tells the programs on it a new size.
    pub fn resize(&self, window: Window) -> io::Result<()> {
        let size =
            Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(self.0.get_ref(), size)?)
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

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_terminal_and_nothing_else_is_adopted() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).expect("a terminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("unlocked");
        let theirs = ioctl_tiocgptpeer(&ours, flags).expect("its other end");
        for other in ["/dev/null", "/dev/zero", "/etc/passwd", "/"] {
            let file = std::fs::File::open(other).expect("opened");
            assert!(Terminal::adopt(file.into()).is_err(), "{other}");
        }
        let copy = theirs.try_clone().expect("a copy");
        assert!(Terminal::adopt(copy).is_err(), "the end inside is not ours");
        let mut terminal = Terminal::adopt(ours).expect("a terminal");
        terminal.resize(Window { rows: 33, columns: 44 }).expect("resized");
        let size = rustix::termios::tcgetwinsize(&theirs).expect("a size");
        assert_eq!((size.ws_row, size.ws_col), (33, 44));
        terminal.write_all(b"x\n").await.expect("written");
        let mut byte = [0];
        assert_eq!(rustix::io::read(&theirs, &mut byte), Ok(1));
        assert_eq!(byte[0], b'x');
        drop(theirs);
        let mut rest = Vec::new();
        terminal.read_to_end(&mut rest).await.expect("the end is no error");
        assert_eq!(rest, b"x\r\n", "its echo");
    }
}
