//! The few things that have no safe wrapper.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{FromRawFd, OwnedFd},
};

use helper::{CHANNEL_FD, IMAGE_FD};
use nix::{
    libc,
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

/// A child that has ended and is not reaped yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) pid: Pid,
    /// Exit code; 0 when a signal ended it.
    pub(crate) code: u8,
    /// The signal that ended it, of all 64; 0 if none.
    pub(crate) signal: u8,
}

/// A child that has ended, if there is one. It stays a zombie: the next call finds it again.
#[expect(unsafe_code, reason = "no wrapper tells the pid of a child that a real-time signal ended")]
pub(crate) fn ended_child() -> Option<Ended> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `info` is a siginfo_t for the kernel to write to; all zeroes is one as well, and
    // what is there when no child has ended.
    let (result, info) =
        unsafe { (libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), flags), info.assume_init()) };
    // SAFETY: waitid fills in what a SIGCHLD brings, these two among it, or leaves zeroes.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if result == -1 || pid == 0 {
        return None;
    }
    let status = u8::try_from(status).unwrap_or(u8::MAX);
    let (code, signal) = if info.si_code == libc::CLD_EXITED { (status, 0) } else { (0, status) };
    Some(Ended { pid: Pid::from_raw(pid), code, signal })
}

/// Frees the pid of a child that has ended. False when there is none.
pub(crate) fn reap(pid: Pid) -> bool {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let Some(pid) = Pid::from_raw(pid.as_raw()) else { return false };
    let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    matches!(waitid(WaitId::Pid(pid), flags), Ok(Some(_)))
}
