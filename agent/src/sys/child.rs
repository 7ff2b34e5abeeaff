//! What a child does between fork and exec.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use nix::libc;
use tokio::process::Command;

/// Number that the first of a child's own descriptors has in the child.
const FIRST: RawFd = 3;
/// Where they stand on their way there, out of the way of each other.
const ASIDE: RawFd = 64;

/// Makes the child the leader of a new session, without a controlling terminal: a Ctrl-C at the
/// agent's own terminal does not reach it, and it cannot type into that terminal. Descriptors that
/// the agent inherited without close-on-exec do not get into it either; `fds` alone do, as its
/// descriptors from 3 on.
#[expect(unsafe_code, reason = "pre_exec")]
pub fn own_session(command: &mut Command, fds: Vec<OwnedFd>) {
    // SAFETY: the closure runs in the forked child and calls nothing but setsid(2), dup2(2),
    // dup3(2) and close_range(2), all async-signal-safe; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            new_session().and_then(|()| close_on_exec()).and_then(|()| keep(&fds))
        });
    };
}

/// Puts the descriptors where the child expects them, open across exec. What stood there before was
/// marked close-on-exec and would not have lived on; if it was the pipe by which the standard
/// library learns of a failed exec, then such a failure shows on the descriptors instead.
#[expect(unsafe_code, reason = "duplicates at numbers that nobody owns")]
fn keep(fds: &[OwnedFd]) -> io::Result<()> {
    let failed = || Err(io::Error::last_os_error());
    for (aside, fd) in (ASIDE..).zip(fds) {
        // SAFETY: three integers; this child is about to exec and uses nothing that stood there.
        if unsafe { libc::dup3(fd.as_raw_fd(), aside, libc::O_CLOEXEC) } == -1 {
            return failed();
        }
    }
    for (place, aside) in (FIRST..).zip(ASIDE..).take(fds.len()) {
        // SAFETY: two integers; as above.
        if unsafe { libc::dup2(aside, place) } == -1 {
            return failed();
        }
    }
    Ok(())
}

fn new_session() -> io::Result<()> {
    nix::unistd::setsid().map(|_| ()).map_err(io::Error::from)
}

#[expect(unsafe_code, reason = "close_range has no safe wrapper")]
fn close_on_exec() -> io::Result<()> {
    // SAFETY: three integers; with CLOSE_RANGE_CLOEXEC no descriptor is closed, each is only
    // marked, so none that Rust owns becomes invalid.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
