//! Wrappers of the system calls that have no safe wrapper.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use helper::{CHANNEL_FD, IMAGE_FD};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    libc,
    sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::{ForkResult, Pid},
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Takes the socket to the shim and closes the descriptor of the image. Called once, before
/// anything else.
#[expect(unsafe_code, reason = "descriptors that were inherited")]
pub(crate) fn take_channel() -> io::Result<OwnedFd> {
    // SAFETY: the shim started this process with these two descriptors open, nothing in it has
    // used them yet, and this is called once. If one was not open, the first use says EBADF.
    let (channel, image) =
        unsafe { (OwnedFd::from_raw_fd(CHANNEL_FD), OwnedFd::from_raw_fd(IMAGE_FD)) };
    drop(image);
    fcntl(&channel, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(channel)
}

/// Forks. Returns `None` in the child.
#[expect(unsafe_code, reason = "fork")]
pub(crate) fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: this process never has a second thread, so the child may do all that it may do.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Resets signals to their defaults for a command: the runtime ignores SIGPIPE, and this program
/// blocks SIGCHLD.
#[expect(unsafe_code, reason = "sigaction")]
pub(crate) fn default_signals() -> nix::Result<()> {
    // SAFETY: SIG_DFL is no handler of ours that could be called.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// Child that has ended and is not reaped yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) pid: Pid,
    /// Exit code; 0 when a signal ended it.
    pub(crate) code: u8,
    /// Signal that ended the child, any of all 64; 0 if none.
    pub(crate) signal: u8,
}

/// Returns a child that has ended, if there is one. The child stays a zombie: the next call finds
/// it again.
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

/// Reaps a child that has ended. False when there is none.
pub(crate) fn reap(pid: Pid) -> bool {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let Some(pid) = Pid::from_raw(pid.as_raw()) else { return false };
    let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    matches!(waitid(WaitId::Pid(pid), flags), Ok(Some(_)))
}

/// Closes all inherited descriptors of a forked child except stdin, stdout, stderr and `kept`. No
/// other owner of a descriptor in this process may be dropped afterwards: the child ends by exit or
/// exec.
#[expect(unsafe_code, reason = "close_range has no safe wrapper")]
pub(crate) fn close_others<const N: usize>(kept: [&OwnedFd; N]) -> io::Result<()> {
    let mut kept = kept.map(|fd| fd.as_raw_fd().unsigned_abs());
    kept.sort_unstable();
    let mut first = 3;
    for last in kept.into_iter().map(Some).chain([None]) {
        let end = last.map_or(u32::MAX, |fd| fd.saturating_sub(1));
        if first <= end {
            // SAFETY: three integers; the caller uses none of the descriptors in between.
            if unsafe { libc::syscall(libc::SYS_close_range, first, end, 0) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        first = last.map_or(first, |fd| fd.max(first - 1) + 1);
    }
    Ok(())
}

/// Makes the kernel kill this child when its parent, whose pid `parent` is, ends.
pub(crate) fn end_with(parent: Pid) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // If the parent ended before that call, no signal would come.
    if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
}

pub(crate) fn send_fd(to: &OwnedFd, fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// Waits for a descriptor; `None` when the other end of the socket is closed.
pub(crate) fn receive_fd(from: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    ancillary.drain().find_map(|message| {
        let RecvAncillaryMessage::ScmRights(mut fds) = message else { return None };
        fds.next()
    })
}
