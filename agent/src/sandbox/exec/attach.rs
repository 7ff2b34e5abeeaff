//! Getting in: `lxc-attach`, the script that it runs in there, and the moment before the script
//! becomes the command.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use rustix::fs::Mode;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::{ChildStderr, ChildStdin, ChildStdout},
    time::{Instant, timeout, timeout_at},
};

use super::{inside, order::Window};
use crate::run::{self, OnTerminal, Piped, Running, Terminal};

/// How long it may take from the start of `lxc-attach` to the start of the command: milliseconds,
/// unless the node is under heavy load.
const DEADLINE: Duration = Duration::from_secs(15);
/// How much is read of what `lxc-attach` says, and how much of that is passed on.
const SAID_BYTES_MAX: u64 = 4096;
const SAID_CHARS_MAX: usize = 300;
/// How long what it said may take to arrive, and how long it may take to end when it is told to.
const MOMENT: Duration = Duration::from_secs(1);

/// What is connected to the command.
#[derive(Debug)]
pub(super) enum Ends {
    /// Three pipes.
    Pipes {
        /// Its stdin.
        stdin: ChildStdin,
        /// Its stdout.
        stdout: ChildStdout,
        /// Its stderr.
        stderr: ChildStderr,
    },
    /// A terminal.
    Terminal(Terminal),
}

/// `lxc-attach`, and the script that is about to become the command.
#[derive(Debug)]
pub(super) struct Attached {
    /// `lxc-attach`.
    pub(super) process: Running,
    /// The command's, once it runs.
    pub(super) ends: Ends,
    channel: UnixStream,
    until: Instant,
}

/// Why no command was started.
#[derive(Debug)]
pub(super) enum Failure {
    /// `lxc-attach` was not even started.
    Start(io::Error),
    /// There is no such user in there.
    NoUser,
    /// There is no such directory in there.
    NoCwd,
    /// There is nothing in there to become another user with.
    NoSetpriv,
    /// Nothing happened in time.
    Stuck,
    /// `lxc-attach` ended, and said this.
    Ended(String),
}

impl Attached {
    /// Starts it: `prefix` is the way in, `argv` the script and its arguments.
    pub(super) fn start(
        prefix: &[OsString],
        argv: &[OsString],
        tty: Option<Window>,
    ) -> io::Result<Self> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = UnixStream::from_std(ours)?;
        let (line, theirs) = ([prefix, argv].concat(), Some(OwnedFd::from(theirs)));
        let (process, ends) = match tty {
            None => {
                let Piped { stdin, stdout, stderr, process } =
                    run::spawn_piped(&line, &[], theirs)?;
                // Before the command can run. /dev/stdout and the like are opened by name, and to
                // whom the container's root is nobody, these pipes would be somebody else's. The
                // names are only seen by who may trace the command.
                for pipe in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
                    rustix::fs::fchmod(pipe, Mode::from_raw_mode(0o666))?;
                }
                (process, Ends::Pipes { stdin, stdout, stderr })
            }
            Some(window) => {
                let OnTerminal { terminal, process } =
                    run::spawn_on_tty(&line, &[], theirs, window)?;
                (process, Ends::Terminal(terminal))
            }
        };
        Ok(Self { process, ends, channel, until: Instant::now() + DEADLINE })
    }

    /// Waits until the script is ready, or says why it never will be.
    pub(super) async fn ready(&mut self) -> Result<(), Failure> {
        let answer = timeout_at(self.until, answer(&mut self.channel)).await;
        match answer.map_err(|_| Failure::Stuck)?.as_deref() {
            Some(inside::READY) => Ok(()),
            Some(inside::NO_USER) => Err(Failure::NoUser),
            Some(inside::NO_CWD) => Err(Failure::NoCwd),
            Some(inside::NO_SETPRIV) => Err(Failure::NoSetpriv),
            Some(_) | None => Err(Failure::Ended(self.said().await)),
        }
    }

    /// Gives it the environment, with which it becomes the command. What then fails is the
    /// command's: 127 when there is no such program, 126 when it is none.
    pub(super) async fn go(&mut self, environment: &str) -> Result<(), Failure> {
        // By now `lxc-attach` has made its terminal in there, and set up ours as it likes it:
        // every line would end in CR CR LF.
        if let Ends::Terminal(terminal) = &self.ends {
            terminal.keep_line_ends().map_err(Failure::Start)?;
        }
        match timeout_at(self.until, self.channel.write_all(environment.as_bytes())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failure::Ended(self.said().await)),
            Err(_) => Err(Failure::Stuck),
        }
    }

    /// What `lxc-attach` said on its stderr, or on its terminal: its last line.
    async fn said(&mut self) -> String {
        let mut bytes = Vec::new();
        let reads: &mut (dyn AsyncRead + Send + Unpin) = match &mut self.ends {
            Ends::Pipes { stderr, .. } => stderr,
            Ends::Terminal(terminal) => terminal,
        };
        // Cut short is better than nothing.
        drop(timeout(MOMENT, reads.take(SAID_BYTES_MAX).read_to_end(&mut bytes)).await);
        last_line(&String::from_utf8_lossy(&bytes))
    }

    /// Ends `lxc-attach` itself. What it runs is not ended by that.
    pub(super) async fn end(process: &mut Running) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if let Err(error) = process.signal(signal) {
                tracing::warn!(%error, "lxc-attach was not told to end");
            }
            if timeout(MOMENT, process.wait()).await.is_ok() {
                return;
            }
        }
        tracing::warn!(pid = process.pid(), "lxc-attach does not end");
    }
}

/// One word and a line end.
async fn answer(channel: &mut UnixStream) -> Option<String> {
    let mut bytes = Vec::new();
    while bytes.len() < inside::ANSWER_BYTES_MAX {
        match channel.read_u8().await {
            Ok(b'\n') => return String::from_utf8(bytes).ok(),
            Ok(byte) => bytes.push(byte),
            Err(_) => return None,
        }
    }
    None
}

/// For one line of an error: no control characters, not too long.
fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("");
    line.trim().chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect()
}
