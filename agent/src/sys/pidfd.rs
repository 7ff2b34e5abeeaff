//! Waiting for processes that are not our children.

use std::io;

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Waits until the process has ended. Returns at once if there is none.
#[expect(unsafe_code, reason = "AsyncFd")]
pub async fn ended(pid: u32) -> io::Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // SAFETY: an `OwnedFd` is open, is this very descriptor until it is dropped, and is moved in
    // here for good.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
    pidfd.readable().await.map(|mut ready| ready.retain_ready())
}

/// Sends a signal to a process, if `same` confirms that it is still the intended one. Calls `same`
/// once the pid can no longer be reused.
pub fn signal(pid: u32, number: i32, same: impl FnOnce() -> bool) -> io::Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let signal = signal_of(number).ok_or(io::ErrorKind::InvalidInput)?;
    let sent = pidfd_open(pid, PidfdFlags::empty())
        .and_then(|pidfd| if same() { pidfd_send_signal(&pidfd, signal) } else { Ok(()) });
    match sent {
        // The process has ended by itself.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[expect(unsafe_code, reason = "a real-time signal")]
fn signal_of(number: i32) -> Option<Signal> {
    let real_time = (nix::libc::SIGRTMIN()..=nix::libc::SIGRTMAX()).contains(&number);
    // SAFETY: it is valid, and sent to another process only; libc uses none of these in ours.
    Signal::from_named_raw(number)
        .or_else(|| real_time.then(|| unsafe { Signal::from_raw_unchecked(number) }))
}
