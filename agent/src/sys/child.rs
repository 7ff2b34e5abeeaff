//! Steps of a child between fork and exec.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
};

use nix::libc;
use tokio::process::Command;

use super::apart::Apart;

/// First descriptor number of the descriptors passed to a child.
const FIRST: RawFd = 3;
/// Descriptors passed to a child at most.
const FDS_MAX: usize = 8;

/// Makes the child the leader of a new session, without a controlling terminal: a Ctrl-C at the
/// agent's own terminal does not reach it, and it cannot type into that terminal. It inherits no
/// descriptors of the agent without close-on-exec; it gets only `fds`, as its descriptors from 3
/// on. The command's program and environment must be complete: they are read here, and nothing of
/// the agent's own environment is added. It leaves the agent's cgroup, and is not spared by the OOM
/// killer as the agent is.
///
/// # Errors
/// When there are more than 8 descriptors, or a NUL in an argument.
#[expect(unsafe_code, reason = "pre_exec")]
pub fn own_session(command: &mut Command, fds: Vec<OwnedFd>) -> io::Result<()> {
    if fds.len() > FDS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let apart = Apart::of_agent();
    let program = if fds.is_empty() { None } else { Some(Program::of(command)?) };
    // SAFETY: the closure runs in the forked child and calls nothing but setsid(2), open(2),
    // write(2), fcntl(2), dup2(2), close(2), close_range(2) and execve(2), all async-signal-safe; it neither allocates
    // nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            new_session()?;
            apart.leave()?;
            close_on_exec()?;
            program.as_ref().map_or(Ok(()), |program| become_with(program, &fds))
        });
    };
    Ok(())
}

/// Moves the descriptors to the numbers that the program expects, open across exec, and executes
/// it. A number may hold the pipe by which the standard library learns of a failed exec. So every
/// descriptor is first copied to a free number above them, which the kernel chooses, and all is
/// restored before a failure is returned.
fn become_with(program: &Program, fds: &[OwnedFd]) -> io::Result<()> {
    let above = FIRST + RawFd::try_from(fds.len()).map_err(io::Error::other)?;
    let places = FIRST..above;
    let (mut before, mut wanted) = ([None; FDS_MAX], [0; FDS_MAX]);
    for (place, before) in places.clone().zip(&mut before) {
        *before = aside(place, above)?;
    }
    for (fd, wanted) in fds.iter().zip(&mut wanted) {
        *wanted = aside(fd.as_raw_fd(), above)?.ok_or(io::ErrorKind::InvalidInput)?;
    }
    let placed = places.clone().zip(wanted).try_for_each(|(place, fd)| put(fd, place));
    let error = match placed {
        Ok(()) => program.exec(),
        Err(error) => error,
    };
    for (place, before) in places.zip(before) {
        match before {
            Some(fd) => put_closing(fd, place)?,
            None => close(place),
        }
    }
    Err(error)
}

/// Copies a descriptor to a free number from `above` on, closed on exec; `None` if it is not open.
#[expect(unsafe_code, reason = "a descriptor by its number")]
fn aside(fd: RawFd, above: RawFd) -> io::Result<Option<RawFd>> {
    // SAFETY: three integers; the copy has a number that was free.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EBADF) => Ok(None),
            error => Err(error),
        },
        copy => Ok(Some(copy)),
    }
}

/// Copies a descriptor to a number whose old descriptor has a copy; stays open across exec.
#[expect(unsafe_code, reason = "a descriptor by its number")]
fn put(fd: RawFd, place: RawFd) -> io::Result<()> {
    // SAFETY: two integers; this child is about to exec, and the replaced descriptor has a copy.
    if unsafe { libc::dup2(fd, place) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Copies like `put`, but closed on exec.
#[expect(unsafe_code, reason = "a descriptor by its number")]
fn put_closing(fd: RawFd, place: RawFd) -> io::Result<()> {
    // SAFETY: three integers; the replaced descriptor is a copy that nothing uses.
    let result = unsafe { libc::dup3(fd, place, libc::O_CLOEXEC) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "a descriptor by its number")]
fn close(place: RawFd) {
    // SAFETY: one integer; the descriptor is a copy that nothing owns.
    unsafe { libc::close(place) };
}

/// Arguments of execve(2), built before the fork: a child must not allocate.
#[derive(Debug)]
struct Program {
    /// The program's path, then its arguments, then its environment.
    _text: Vec<CString>,
    /// Pointers into these, each list with a null at its end.
    path: *const libc::c_char,
    argv: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
}

#[expect(unsafe_code, reason = "pointers into strings of its own")]
// SAFETY: the strings are on the heap, never changed, and live as long as the pointers to them.
unsafe impl Send for Program {}
#[expect(unsafe_code, reason = "pointers into strings of its own")]
// SAFETY: as above; nothing in it can be changed through a shared reference.
unsafe impl Sync for Program {}

impl Program {
    fn of(command: &Command) -> io::Result<Self> {
        let command = command.as_std();
        let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
        let path = text(command.get_program())?;
        let mut all = vec![path];
        for argument in command.get_args() {
            all.push(text(argument)?);
        }
        let arguments = all.len();
        for (name, value) in command.get_envs() {
            let Some(value) = value else { continue };
            let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
            all.push(CString::new(entry)?);
        }
        let list = |part: &[CString]| {
            part.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (argv, env) = (list(&all[..arguments]), list(&all[arguments..]));
        Ok(Self { path: all[0].as_ptr(), argv, env, _text: all })
    }

    /// Executes the program. Returns only when that fails.
    #[expect(unsafe_code, reason = "execve of what was made before the fork")]
    fn exec(&self) -> io::Error {
        // SAFETY: a string and two lists of strings that end with a null, alive while `self` is.
        unsafe { libc::execve(self.path, self.argv.as_ptr(), self.env.as_ptr()) };
        io::Error::last_os_error()
    }
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
