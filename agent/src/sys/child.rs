//! What a child does between fork and exec.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::libc;
use tokio::process::Command;

/// Descriptor that a child's channel to the agent has in the child.
const CHANNEL: RawFd = 3;

/// Makes the child the leader of a new session, without a controlling terminal: a Ctrl-C at the
/// agent's own terminal does not reach it, and it cannot type into that terminal. Descriptors that
/// the agent inherited without close-on-exec do not get into it either; `channel` alone does, as
/// its descriptor 3.
#[expect(unsafe_code, reason = "pre_exec")]
pub fn own_session(command: &mut Command, channel: Option<OwnedFd>) {
    // SAFETY: the closure runs in the forked child and calls nothing but setsid(2), dup2(2),
    // fcntl(2) and close_range(2), all async-signal-safe; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            new_session().and_then(|()| close_on_exec()).and_then(|()| keep(channel.as_ref()))
        });
    };
}

/// As `own_session`, and the terminal on the child's stdin becomes its controlling terminal.
#[expect(unsafe_code, reason = "pre_exec")]
pub fn own_terminal(command: &mut Command, channel: Option<OwnedFd>) {
    // SAFETY: as in `own_session`; ioctl(2) is async-signal-safe too. Stdin has been put in place
    // before the closure runs.
    unsafe {
        command.pre_exec(move || {
            new_session()
                .and_then(|()| take_terminal())
                .and_then(|()| close_on_exec())
                .and_then(|()| keep(channel.as_ref()))
        });
    };
}

/// Puts the channel where the child expects it, open across exec. What stood there before was
/// marked close-on-exec and would not have lived on; if it was the pipe by which the standard
/// library learns of a failed exec, then such a failure shows on the channel instead.
#[expect(unsafe_code, reason = "a duplicate at a number that nobody owns")]
fn keep(channel: Option<&OwnedFd>) -> io::Result<()> {
    let Some(channel) = channel else { return Ok(()) };
    let result = if channel.as_raw_fd() == CHANNEL {
        // SAFETY: three integers; the descriptor is open, because `channel` owns it.
        unsafe { libc::fcntl(CHANNEL, libc::F_SETFD, 0) }
    } else {
        // SAFETY: two integers; this child is about to exec and uses nothing that stood at the
        // second number.
        unsafe { libc::dup2(channel.as_raw_fd(), CHANNEL) }
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn new_session() -> io::Result<()> {
    nix::unistd::setsid().map(|_| ()).map_err(io::Error::from)
}

#[expect(unsafe_code, reason = "ioctl")]
fn take_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer and no pointer; descriptor 0 is open, and if it is no
    // terminal the kernel refuses.
    let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "close_range has no safe wrapper")]
fn close_on_exec() -> io::Result<()> {
    // SAFETY: three integers; with CLOSE_RANGE_CLOEXEC no descriptor is closed, each is only
    // marked, so none that Rust owns becomes invalid.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
