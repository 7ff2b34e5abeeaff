//! Requests of callers about commands, after they have been checked.

use std::{collections::BTreeMap, fmt, time::Duration};

use bytes::Bytes;
use proto::{
    exec,
    id::{Invalid, SandboxRef},
    secret::{Env, HIDDEN},
    spec,
};
use tokio::sync::watch;

pub use crate::shim::Window;

/// Highest id of a user; every container has at least these.
const UID_MAX: u32 = 65_535;
/// Most characters of a user's name.
const USER_MAX: usize = 32;

/// A command to run in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Sandbox to run in.
    pub sandbox: SandboxRef,
    /// Command to run.
    pub command: Command,
    /// Working directory; `None` is the user's home.
    pub cwd: Option<String>,
    /// Variables that are added to the sandbox's environment.
    pub env: Env,
    /// User to run as.
    pub user: User,
    /// Time after which everything that it started is ended; `None`: no limit of the caller's.
    pub timeout: Option<Duration>,
    /// Size of its terminal; `None`: no terminal.
    pub tty: Option<Window>,
    /// Name that the caller chose for this run.
    pub exec_id: Option<String>,
    /// True when the command never waits for a reader that has gone. Only with an `exec_id`.
    pub detached: bool,
    /// True when a caller that hangs up ends its session alone, as an SSH server does.
    pub spare_background: bool,
    /// Text for lists in place of the command; `None`: the command itself.
    pub title: Option<Title>,
}

/// Text that a caller has lists show in place of a command.
#[derive(Clone, PartialEq, Eq)]
pub struct Title(pub String);

/// A command to attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attach {
    /// Sandbox that it runs in.
    pub sandbox: SandboxRef,
    /// Name of the run.
    pub exec_id: String,
    /// Bytes of stdout that the caller has.
    pub stdout_offset: u64,
    /// Bytes of stderr that the caller has.
    pub stderr_offset: u64,
}

/// Control request for a command, from outside of its stream.
#[derive(Clone, PartialEq, Eq)]
pub enum Control {
    /// Bytes for its stdin.
    Stdin {
        /// Offset of the bytes in the whole stdin.
        offset: u64,
        /// The bytes.
        data: Bytes,
        /// True when no more follow.
        eof: bool,
    },
    /// New size of the terminal.
    Resize(Window),
    /// Signal for everything that it started, 1 to 31.
    Signal(i32),
}

/// Program to run.
#[derive(Clone, PartialEq, Eq)]
pub enum Command {
    /// A program and its arguments, passed on as they are.
    Argv(Vec<String>),
    /// A line for `bash -c`.
    Shell(String),
    /// An SFTP server on stdin and stdout; nothing in the sandbox is needed for it.
    Sftp,
}

/// User to run a command as. Looked up inside: the sandbox's /etc/passwd means nothing to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// Name of the user.
    Name(String),
    /// Number of the user.
    Id(u32),
}

/// Message from the caller to a command that runs.
#[derive(Clone, PartialEq, Eq)]
pub enum Input {
    /// Bytes for its stdin.
    Stdin(Bytes),
    /// End of its stdin.
    Eof,
    /// New size of the terminal.
    Resize(Window),
    /// Signal for everything that it started, 1 to 31.
    Signal(i32),
}

/// Message from a command that runs.
#[derive(Clone, PartialEq, Eq)]
pub enum Output {
    /// Bytes of its stdout; of its terminal, if it has one.
    Stdout(Bytes),
    /// Bytes of its stderr.
    Stderr(Bytes),
    /// End of the command. The last message.
    Exit(Exit),
}

/// Bytes and command lines are not shown: they may be secrets.
impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin { offset, data, eof } => {
                write!(f, "Stdin({} bytes at {offset}, eof: {eof})", data.len())
            }
            Self::Resize(window) => write!(f, "Resize({window:?})"),
            Self::Signal(number) => write!(f, "Signal({number})"),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argv(_) => write!(f, "Argv({HIDDEN})"),
            Self::Shell(_) => write!(f, "Shell({HIDDEN})"),
            Self::Sftp => f.write_str("Sftp"),
        }
    }
}

impl fmt::Debug for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Title({HIDDEN})")
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin(bytes) => write!(f, "Stdin({} bytes)", bytes.len()),
            Self::Eof => f.write_str("Eof"),
            Self::Resize(window) => write!(f, "Resize({window:?})"),
            Self::Signal(number) => write!(f, "Signal({number})"),
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout(bytes) => write!(f, "Stdout({} bytes)", bytes.len()),
            Self::Stderr(bytes) => write!(f, "Stderr({} bytes)", bytes.len()),
            Self::Exit(exit) => write!(f, "Exit({exit:?})"),
        }
    }
}

/// Exit of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 0 to 255; 128 + n when signal n ended it, 124 when it reached its timeout.
    pub code: u8,
    /// Signal that ended it; 0 if none.
    pub signal: u8,
    /// True when it was ended because it reached its timeout.
    pub timed_out: bool,
}

/// Command that runs.
#[derive(Debug, Clone)]
pub struct Started {
    /// Boot of the sandbox that it runs in.
    pub boot: u32,
    /// Name of the run: the caller's, or a generated one.
    pub exec_id: String,
    /// Bytes of stdin that have been taken.
    pub stdin_offset: u64,
    /// Offset at which the stdout that follows begins.
    pub stdout_offset: u64,
    /// Offset at which the stderr that follows begins.
    pub stderr_offset: u64,
    /// Bytes of stdin that have been taken, also later.
    pub taken: watch::Receiver<u64>,
}

impl Command {
    /// Checks the program and its arguments.
    ///
    /// # Errors
    /// When it is empty, too long, or no process could be started with it.
    pub fn check(self) -> Result<Self, Invalid> {
        let (what, arguments) = match &self {
            Self::Argv(argv) => ("argv", argv.as_slice()),
            Self::Shell(line) => ("shell", std::slice::from_ref(line)),
            Self::Sftp => return Ok(self),
        };
        exec::check_command(what, arguments)?;
        Ok(self)
    }
}

impl std::str::FromStr for User {
    type Err = Invalid;

    /// Parses a user; empty is root.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let bad = || {
            Invalid::new(
                "user",
                "must be a number up to 65535, or 1 to 32 characters of A-Z a-z 0-9 . _ - that \
                 start with a letter or an underscore",
            )
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        match text.bytes().next() {
            None => Ok(Self::Id(0)),
            Some(b'0'..=b'9') => {
                let canonical = text == "0" || !text.starts_with('0');
                let uid = text.parse().ok().filter(|uid| canonical && *uid <= UID_MAX);
                uid.map(Self::Id).ok_or_else(bad)
            }
            Some(first)
                if (first.is_ascii_alphabetic() || first == b'_')
                    && text.len() <= USER_MAX
                    && text.bytes().all(plain) =>
            {
                Ok(Self::Name(text.to_owned()))
            }
            Some(_) => Err(bad()),
        }
    }
}

/// Checks a working directory; empty is none.
///
/// # Errors
/// When it is not an absolute path.
pub fn cwd(text: String) -> Result<Option<String>, Invalid> {
    if text.is_empty() {
        return Ok(None);
    }
    exec::check_path("cwd", &text)?;
    Ok(Some(text))
}

/// Checks an environment.
///
/// # Errors
/// As `spec::check_env`.
pub fn env(env: BTreeMap<String, String>) -> Result<Env, Invalid> {
    spec::check_env(&env)?;
    Ok(env.into())
}

/// Checks the name of a run.
///
/// # Errors
/// When it has other characters than names have.
pub fn exec_id(text: String) -> Result<String, Invalid> {
    exec::check_exec_id("exec_id", &text)?;
    Ok(text)
}

/// Applies the node's longest timeout, `max`: it is also that of a command that sets none.
///
/// # Errors
/// When the command asks for more.
pub fn timeout(
    asked: Option<Duration>,
    max: Option<Duration>,
) -> Result<Option<Duration>, Invalid> {
    match (asked, max) {
        (Some(asked), Some(max)) if asked > max => {
            let why = format!("must be at most {} s: the node allows no more", max.as_secs());
            Err(Invalid::new("timeout", why))
        }
        (asked, max) => Ok(asked.or(max)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        let name = |text: &str| Ok(User::Name(text.to_owned()));
        assert_eq!("".parse(), Ok(User::Id(0)));
        assert_eq!("0".parse(), Ok(User::Id(0)));
        assert_eq!("1000".parse(), Ok(User::Id(1000)));
        for text in ["root", "_apt", "www-data", "a.b"] {
            assert_eq!(text.parse(), name(text));
        }
        for text in
            ["01", "65536", "99999999999", "-1", "+1", "1a", "a b", "a:b", "a\n", "-u", "$x"]
        {
            assert!(text.parse::<User>().is_err(), "{text:?}");
        }
        assert!("a".repeat(33).parse::<User>().is_err());
    }

    #[test]
    fn directories_are_absolute() {
        assert_eq!(cwd(String::new()), Ok(None));
        assert_eq!(cwd("/a b".into()), Ok(Some("/a b".into())));
        for bad in ["a", "./a", "/a\0b", &format!("/{}", "x".repeat(4095))] {
            assert!(cwd(bad.into()).is_err());
        }
    }

    #[test]
    fn node_may_limit_the_time_of_commands() {
        let [short, long] = [60, 3600].map(|seconds| Some(Duration::from_secs(seconds)));
        assert_eq!(timeout(None, None), Ok(None));
        assert_eq!(timeout(long, None), Ok(long));
        assert_eq!(timeout(None, long), Ok(long));
        assert_eq!(timeout(short, long), Ok(short));
        assert_eq!(timeout(long, long), Ok(long));
        timeout(long, short).expect_err("too long");
    }
}
