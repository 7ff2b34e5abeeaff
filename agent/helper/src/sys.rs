//! The few things that have no safe wrapper.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

use helper::{CHANNEL_FD, IMAGE_FD};
use nix::{
    sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::{ForkResult, Pid},
};

/// The socket to the shim. The descriptor of the image is closed. Called once, first of all.
#[expect(unsafe_code, reason = "descriptors that were inherited")]
pub(crate) fn take_channel() -> io::Result<OwnedFd> {
    // SAFETY: the shim started this process with these two descriptors open, nothing in it has
    // used them yet, and this is called once. If one was not open, the first use says EBADF.
    let (channel, image) =
        unsafe { (OwnedFd::from_raw_fd(CHANNEL_FD), OwnedFd::from_raw_fd(IMAGE_FD)) };
    drop(image);
    rustix::io::fcntl_setfd(&channel, rustix::io::FdFlags::CLOEXEC)?;
    Ok(channel)
}

/// Forks. `None` in the child.
#[expect(unsafe_code, reason = "fork")]
pub(crate) fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: this process never has a second thread, so the child may do all that it may do.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Signals do to a command what they do by default: the runtime ignores SIGPIPE, and this program
/// blocks SIGCHLD.
#[expect(unsafe_code, reason = "sigaction")]
pub(crate) fn default_signals() -> nix::Result<()> {
    // SAFETY: SIG_DFL is no handler of ours that could be called.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}
