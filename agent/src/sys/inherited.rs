//! Descriptors that a process was started with.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use rustix::io::{FdFlags, fcntl_setfd};

/// The descriptors from 3 on, so many; from now on they are nobody else's, and no child's. For the
/// first lines of a program that was started with just these.
///
/// # Errors
/// When one of them is not open.
#[expect(unsafe_code, reason = "descriptors by number")]
pub fn take<const N: usize>() -> io::Result<[OwnedFd; N]> {
    let mut fds = Vec::with_capacity(N);
    for number in (3..).take(N) {
        let number: RawFd = number;
        // SAFETY: whoever started this process left them open for it, and nothing in it has used
        // them yet. If one is not open, the next line says so.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        if let Err(error) = fcntl_setfd(&fd, FdFlags::CLOEXEC) {
            // Not ours to close.
            std::mem::forget(fd);
            return Err(error.into());
        }
        fds.push(fd);
    }
    fds.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}
