//! Starts one command: the steps between fork and exec, in the order in which they must happen.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
};

use helper::{NO_PROGRAM, NOT_RUNNABLE, ORDER_BYTES_MAX, Order, Refusal, Task};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::Mode,
    unistd::{Gid, Pid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, pipe2},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{files, forward, relay, sys, users};

/// Request to start a command, with its descriptors.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) order: OwnedFd,
    /// Stdin, stdout and stderr; on a terminal the descriptors of its relay.
    pub(crate) ends: Vec<OwnedFd>,
    pub(crate) tty: Option<(u16, u16)>,
    /// Deadline of the start, in milliseconds of `helper::up_ms`: no program is run after it.
    pub(crate) start_by_ms: u64,
}

#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    /// Pipe that delivers one byte when the child runs no program, and end of file when it runs
    /// one.
    pub(crate) status: OwnedFd,
}

#[derive(Debug)]
enum Place {
    Pipes([OwnedFd; 3]),
    /// Socket over which the relay sends the terminal.
    Terminal(OwnedFd),
}

/// Forks. Everything that can hang on the sandbox's own file systems and terminals is done by
/// children.
pub(crate) fn start(start: Start) -> Result<Child, Refusal> {
    let nothing = |_| Refusal::NoProcess;
    let (status, tell) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(nothing)?;
    let ends: [OwnedFd; 3] = start.ends.try_into().map_err(|_| Refusal::NoProcess)?;
    let place = match start.tty {
        Some(window) => Place::Terminal(start_relay(window, ends)?),
        None => Place::Pipes(ends),
    };
    let parent = nix::unistd::getpid();
    if let Some(pid) = sys::fork().map_err(|_| Refusal::NoProcess)? {
        return Ok(Child { pid, status });
    }
    let closed = match &place {
        Place::Pipes([a, b, c]) => sys::close_others([a, b, c, &start.order, &tell]),
        Place::Terminal(from) => sys::close_others([from, &start.order, &tell]),
    };
    // Until the child runs a program it is part of the helper and must not outlive it.
    let child = Unborn { parent, start_by_ms: start.start_by_ms };
    let code = match closed.and_then(|()| sys::end_with(parent)) {
        Ok(()) => child.run(start.order, place, tell),
        Err(_) => refuse(tell, Refusal::NoProcess),
    };
    std::process::exit(code.into())
}

/// Starts the relay of a terminal, and returns the socket over which it sends the terminal. If the
/// command fails to start, the terminal is closed with that socket, and the relay ends with the
/// terminal.
fn start_relay(window: (u16, u16), ends: [OwnedFd; 3]) -> Result<OwnedFd, Refusal> {
    let flags = SocketFlags::CLOEXEC;
    let (from, to) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|_| Refusal::NoProcess)?;
    let [stdin, stdout, sizes] = ends;
    let parent = nix::unistd::getpid();
    if sys::fork().map_err(|_| Refusal::NoProcess)?.is_some() {
        return Ok(from);
    }
    let closed = sys::close_others([&stdin, &stdout, &sizes, &to]);
    // A relay that is blocked for good ends with the helper at the latest.
    if closed.and_then(|()| sys::end_with(parent)).is_ok() {
        relay::run(window, &relay::Ends { stdin, stdout, sizes }, to);
    }
    std::process::exit(0)
}

/// Forked child before exec.
struct Unborn {
    /// Pid of the helper.
    parent: Pid,
    start_by_ms: u64,
}

impl Unborn {
    /// Runs the order. Does not return when the child becomes a program; otherwise returns the exit
    /// code.
    fn run(&self, order: OwnedFd, place: Place, tell: OwnedFd) -> u8 {
        let ready = prepare(order, place).and_then(|ready| {
            // Again, because changing the user clears it. The program stays bound to the helper;
            // the processes that it starts are not.
            sys::end_with(self.parent).map_err(|_| Refusal::NoProcess)?;
            Ok(ready)
        });
        let refusal = match ready {
            Ok(Ready::Program(argv, env)) => match self.become_program(&argv, &env) {
                // From here on a failure is the command's: its exit code, its stderr.
                NotRun::Failed(path, errno) => {
                    drop(File::from(tell).write_all(b"x"));
                    let text = format!("{path}: {}\n", io::Error::from(errno));
                    drop(io::stderr().write_all(text.as_bytes()));
                    let missing = matches!(errno, Errno::ENOENT | Errno::ENOTDIR);
                    return if missing { NO_PROGRAM } else { NOT_RUNNABLE };
                }
                NotRun::TooLate => Refusal::TooLate,
            },
            Ok(Ready::Files(_) | Ready::Sftp | Ready::Forward(_)) if self.is_late() => {
                Refusal::TooLate
            }
            Ok(Ready::Files(task)) => {
                drop(tell);
                return files::run(&task);
            }
            Ok(Ready::Sftp) => {
                drop(tell);
                return sftp::serve(io::stdin().lock(), io::stdout().lock()).is_err().into();
            }
            Ok(Ready::Forward(task)) => match forward::open(&task) {
                Ok(opened) => {
                    drop(tell);
                    return forward::run(opened);
                }
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        refuse(tell, refusal)
    }

    fn is_late(&self) -> bool {
        helper::up_ms() >= self.start_by_ms
    }

    /// Executes the program; returns only on failure.
    fn become_program(&self, argv: &[CString], env: &[CString]) -> NotRun {
        let Some(program) = argv.first() else {
            return NotRun::Failed(String::new(), Errno::ENOENT);
        };
        let name = program.to_string_lossy().into_owned();
        if name.contains('/') {
            return match self.exec(program, argv, env) {
                Some(errno) => NotRun::Failed(name, errno),
                None => NotRun::TooLate,
            };
        }
        let path = env.iter().find_map(|entry| entry.to_str().ok()?.strip_prefix("PATH="));
        let mut worst = Errno::ENOENT;
        for dir in path.unwrap_or("/usr/bin:/bin").split(':') {
            let dir = if dir.is_empty() { "." } else { dir };
            let Ok(path) = CString::new(format!("{dir}/{name}")) else { continue };
            let Some(errno) = self.exec(&path, argv, env) else { return NotRun::TooLate };
            // Like every shell: "found but not executable" is reported only if no other candidate
            // runs.
            if !matches!(errno, Errno::ENOENT | Errno::ENOTDIR) {
                worst = errno;
            }
        }
        NotRun::Failed(name, worst)
    }

    /// Executes one path. Returns the error, or `None` when the deadline has passed. The clock is
    /// read right before each attempt: searching for the program can hang on the sandbox's file
    /// systems.
    fn exec(&self, path: &CStr, argv: &[CString], env: &[CString]) -> Option<Errno> {
        if self.is_late() {
            return None;
        }
        let Err(errno) = nix::unistd::execve(path, argv, env);
        if errno != Errno::ENOEXEC {
            return Some(errno);
        }
        if self.is_late() {
            return None;
        }
        // A script without an interpreter line is run by the shell.
        let shell = c"/bin/sh";
        let line: Vec<&CStr> =
            [shell, path].into_iter().chain(argv.iter().skip(1).map(|a| &**a)).collect();
        let Err(errno) = nix::unistd::execve(shell, &line, env);
        Some(errno)
    }
}

fn refuse(tell: OwnedFd, refusal: Refusal) -> u8 {
    let byte = match refusal {
        Refusal::NoUser => b'u',
        Refusal::NoCwd => b'c',
        Refusal::NoTerminal => b't',
        Refusal::NoProcess => b'p',
        Refusal::TooLate => b'l',
        Refusal::NotListening => b'n',
        Refusal::NotConnected => b'f',
        Refusal::PortTaken => b'b',
        Refusal::NoConnection => b'g',
    };
    drop(File::from(tell).write_all(&[byte]));
    NOT_RUNNABLE
}

enum NotRun {
    /// No candidate path could be run: the program's name and the error.
    Failed(String, Errno),
    /// The deadline has passed.
    TooLate,
}

/// Result that a child has reported about its start.
pub(crate) enum Verdict {
    /// The child runs; `never_ran` means that no program could be run and the helper's own exit
    /// code follows.
    Runs { never_ran: bool },
    /// The start was refused.
    Refused(Refusal),
}

/// Reads the verdict; call it once the descriptor is readable.
pub(crate) fn verdict(status: &OwnedFd) -> Verdict {
    let mut byte = [0];
    match nix::unistd::read(status, &mut byte) {
        Ok(1) => match byte[0] {
            b'x' => Verdict::Runs { never_ran: true },
            b'u' => Verdict::Refused(Refusal::NoUser),
            b'c' => Verdict::Refused(Refusal::NoCwd),
            b't' => Verdict::Refused(Refusal::NoTerminal),
            b'l' => Verdict::Refused(Refusal::TooLate),
            b'n' => Verdict::Refused(Refusal::NotListening),
            b'f' => Verdict::Refused(Refusal::NotConnected),
            b'b' => Verdict::Refused(Refusal::PortTaken),
            b'g' => Verdict::Refused(Refusal::NoConnection),
            _ => Verdict::Refused(Refusal::NoProcess),
        },
        _ => Verdict::Runs { never_ran: false },
    }
}

enum Ready {
    Program(Vec<CString>, Vec<CString>),
    Files(helper::FileTask),
    Sftp,
    Forward(helper::ForwardTask),
}

fn prepare(order: OwnedFd, place: Place) -> Result<Ready, Refusal> {
    let failed = |_: Errno| Refusal::NoProcess;
    let order = read(order)?;
    let account = users::look_up(&order.user).ok_or(Refusal::NoUser)?;
    // Its own session, so that the processes it starts can be told from others.
    nix::unistd::setsid().map_err(failed)?;
    let (ends, tty) = match place {
        Place::Pipes(ends) => (ends, false),
        Place::Terminal(from) => (terminal(&from)?, true),
    };
    let [stdin, stdout, stderr] = &ends;
    if tty {
        rustix::process::ioctl_tiocsctty(stdin).map_err(|_| Refusal::NoTerminal)?;
        // So that the command can also open it by name.
        nix::unistd::fchown(stdin.as_fd(), Some(Uid::from_raw(account.uid)), None)
            .map_err(failed)?;
    }
    dup2_stdin(stdin).map_err(failed)?;
    dup2_stdout(stdout).map_err(failed)?;
    dup2_stderr(stderr).map_err(failed)?;
    // The originals are close-on-exec.
    drop(ends);
    sys::default_signals().map_err(failed)?;
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    match &order.cwd {
        Some(cwd) => nix::unistd::chdir(cwd.as_str()).map_err(|_| Refusal::NoCwd)?,
        None => nix::unistd::chdir(account.home.as_str())
            .or_else(|_| nix::unistd::chdir("/"))
            .map_err(failed)?,
    }
    let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
    nix::unistd::setgroups(&groups).map_err(failed)?;
    nix::unistd::setgid(Gid::from_raw(account.gid)).map_err(failed)?;
    nix::unistd::setuid(Uid::from_raw(account.uid)).map_err(failed)?;
    match order.task {
        Task::Files(task) => Ok(Ready::Files(task)),
        Task::Sftp => Ok(Ready::Sftp),
        Task::Forward(task) => Ok(Ready::Forward(task)),
        Task::Program(argv) => {
            let text = |text: String| CString::new(text).map_err(|_| Refusal::NoProcess);
            let argv = argv.into_iter().map(text).collect::<Result<_, _>>()?;
            let env = environment(&account, order.env);
            let env = env.into_iter().map(text).collect::<Result<_, _>>()?;
            Ok(Ready::Program(argv, env))
        }
    }
}

/// Receives the command's end of its terminal and duplicates it three times.
fn terminal(from: &OwnedFd) -> Result<[OwnedFd; 3], Refusal> {
    let terminal = sys::receive_fd(from).ok_or(Refusal::NoTerminal)?;
    let copy = || terminal.try_clone().map_err(|_| Refusal::NoProcess);
    Ok([copy()?, copy()?, terminal])
}

fn read(order: OwnedFd) -> Result<Order, Refusal> {
    let mut bytes = Vec::new();
    // The shim wrote it and left the offset at its end.
    let mut file = File::from(order);
    let read = io::Seek::rewind(&mut file)
        .and_then(|()| file.take(ORDER_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|_| Refusal::NoProcess)?;
    serde_json::from_slice(&bytes).map_err(|_| Refusal::NoProcess)
}

/// Builds the environment: defaults of the user's account, overridden by the order.
fn environment(account: &users::Account, ordered: Vec<(String, String)>) -> Vec<String> {
    let own = [
        ("HOME", account.home.clone()),
        ("USER", account.name.clone()),
        ("LOGNAME", account.name.clone()),
        ("XDG_RUNTIME_DIR", format!("/run/user/{}", account.uid)),
        ("container", "lxc".to_owned()),
    ];
    let is_ordered = |name: &str| ordered.iter().any(|(key, _)| key == name);
    let kept = own.into_iter().filter(|(name, _)| !is_ordered(name));
    let mut env: Vec<String> = kept.map(|(name, value)| format!("{name}={value}")).collect();
    env.extend(ordered.into_iter().map(|(name, value)| format!("{name}={value}")));
    env
}
