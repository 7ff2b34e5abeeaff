//! Bytes on their way from one nonblocking descriptor to another.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

/// Bytes that were read and not yet all written.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    written: usize,
    /// Most bytes that it holds.
    size: usize,
}

/// Result of a nonblocking read or write.
pub(crate) enum Done {
    Some,
    /// Would block.
    Later,
    End,
}

impl Buffer {
    /// Creates an empty buffer for at most `size` bytes.
    pub(crate) fn new(size: usize) -> Self {
        Self { bytes: Vec::new(), written: 0, size }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// Reads into the buffer, which must be empty. An error counts as the end.
    pub(crate) fn fill(&mut self, from: &OwnedFd) -> Done {
        // Linux returns EIO when the last program has closed a terminal.
        self.fill_or_fail(from).unwrap_or(Done::End)
    }

    /// Reads like [`Buffer::fill`].
    ///
    /// # Errors
    /// When the source has failed.
    pub(crate) fn fill_or_fail(&mut self, from: &OwnedFd) -> Result<Done, Errno> {
        self.bytes.resize(self.size, 0);
        let read = rustix::io::read(from, &mut self.bytes[..]);
        self.bytes.truncate(read.unwrap_or(0));
        self.written = 0;
        match read {
            Ok(0) => Ok(Done::End),
            Ok(_) => Ok(Done::Some),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Done::Later),
            Err(error) => Err(error),
        }
    }

    /// Writes what is there.
    pub(crate) fn drain(&mut self, to: &OwnedFd) -> Done {
        match rustix::io::write(to, &self.bytes[self.written..]) {
            Ok(written) => {
                self.written += written;
                Done::Some
            }
            Err(Errno::AGAIN | Errno::INTR) => Done::Later,
            Err(_) => Done::End,
        }
    }
}
