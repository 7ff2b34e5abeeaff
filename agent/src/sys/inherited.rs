//! Descriptors that a process was started with.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes ownership of the first `N` descriptors from 3 on and hides them from children. Call it
/// first in a program that was started with exactly these.
///
/// # Errors
/// When one of them is not open.
#[expect(unsafe_code, reason = "descriptors by number")]
pub fn take<const N: usize>() -> io::Result<[OwnedFd; N]> {
    let mut fds = Vec::with_capacity(N);
    for number in (3..).take(N) {
        let number: RawFd = number;
        // SAFETY: the parent left them open for this process, and nothing in it has used them yet.
        // If one is not open, the next line says so.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        if let Err(error) = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            // Not ours to close.
            std::mem::forget(fd);
            return Err(error.into());
        }
        fds.push(fd);
    }
    fds.try_into().map_err(|_| io::ErrorKind::InvalidInput.into())
}
