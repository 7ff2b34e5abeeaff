//! The helper inside the sandbox, as its shim sees it: how it gets in, and what it says. What it
//! says is hostile input: a bounded message that is understood. One that is not is the end of the
//! command that it names; one that names none is the end of the helper.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use helper::{FromHelper, IMAGE_FD, MESSAGE_BYTES_MAX, Refusal, ToHelper};
use nix::sys::signal::Signal;
use rustix::{fs::Mode, pipe::PipeFlags};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{Receiver, Sender},
    sync::oneshot,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{Host, Window};
use crate::{
    run::{self, Running},
    sys::{
        image,
        seqpacket::{self, Message, Seqpacket},
    },
};

/// How long it may take to get in, and then to start a command: milliseconds, unless the node is
/// under heavy load.
const DEADLINE: Duration = Duration::from_secs(15);
/// How much is read of what `lxc-attach` says when it fails, and how much of that is passed on.
const SAID_BYTES_MAX: u64 = 4096;
const SAID_CHARS_MAX: usize = 300;
/// How long it may take to say it, and to end when it is told to.
const MOMENT: Duration = Duration::from_secs(1);

/// What is connected to a command: three pipes.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) stdin: Sender,
    pub(super) stdout: Receiver,
    pub(super) third: Third,
}

/// What the third pipe is for.
#[derive(Debug)]
pub(super) enum Third {
    /// The command's stderr.
    Stderr(Receiver),
    /// New sizes of its terminal, which has no stderr of its own.
    Sizes(OwnedFd),
}

/// A command that runs.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) ends: Ends,
    /// Its pid here, by the helper's word.
    pub(super) leader: Option<u32>,
    /// How it ended, once it has. Closed when the helper has gone.
    pub(super) exit: oneshot::Receiver<Ended>,
}

/// How a command ended: its code and its signal, or why nobody knows them.
pub(super) type Ended = Result<(u8, u8), &'static str>;

/// Why no command was started.
#[derive(Debug)]
pub(super) enum Failure {
    /// The sandbox said no.
    Refused(Refusal),
    /// The helper could not get in, or is there no more.
    Gone(String),
    /// It does not answer.
    Stuck,
}

type Answer = Result<Option<u32>, Failure>;

#[derive(Debug)]
struct Expected {
    answer: Option<oneshot::Sender<Answer>>,
    exit: oneshot::Sender<Ended>,
}

/// What is told of a command of which the helper said what is not understood.
const NOT_UNDERSTOOD: &str = "what supervised it inside the sandbox said nonsense of it";
/// Pause before the kernel is asked again for memory that it did not have.
const PAUSE: Duration = Duration::from_millis(20);

/// A helper that is there, or was.
#[derive(Debug)]
pub(super) struct Helper {
    socket: Seqpacket,
    /// Its pid here.
    pid: Option<u32>,
    tokens: AtomicU64,
    expected: Mutex<HashMap<u64, Expected>>,
    gone: CancellationToken,
}

impl Helper {
    /// Gets one in.
    pub(super) async fn attach(host: &dyn Host, image: &OwnedFd) -> Result<Arc<Self>, Failure> {
        let until = Instant::now() + DEADLINE;
        let told = |error: io::Error| Failure::Gone(format!("lxc-attach was not started: {error}"));
        let (socket, theirs) = seqpacket::pair().map_err(told)?;
        let image = image.try_clone().map_err(told)?;
        let mut line = host.enter();
        line.push(OsString::from(format!("/proc/self/fd/{IMAGE_FD}")));
        let mut attach = run::spawn_piped(&line, vec![theirs, image]).map_err(told)?;
        let first = timeout_at(until, socket.receive(MESSAGE_BYTES_MAX)).await;
        let is_ready = |message: &Message| matches!(parse(&message.bytes), Some(FromHelper::Ready));
        let pid = match first {
            Ok(Ok(message)) if is_ready(&message) => message.pid,
            Ok(_) => {
                let said = said(&mut attach.stderr).await;
                end(attach.process).await;
                return Err(Failure::Gone(format!("the sandbox could not be entered: {said}")));
            }
            Err(_) => {
                end(attach.process).await;
                return Err(Failure::Stuck);
            }
        };
        let helper = Arc::new(Self {
            socket,
            pid,
            tokens: AtomicU64::default(),
            expected: Mutex::default(),
            gone: CancellationToken::new(),
        });
        let listener = Arc::clone(&helper);
        tokio::spawn(async move {
            listener.listen().await;
            // What was started goes with the helper; this closes every answer and exit.
            listener.gone.cancel();
            listener.expected().clear();
            end(attach.process).await;
        });
        Ok(helper)
    }

    /// Cancelled when it is there no more.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Starts what the order, a `helper::Order` in JSON, says.
    pub(super) async fn spawn(
        &self,
        order: &[u8],
        window: Option<Window>,
    ) -> Result<Spawned, Failure> {
        let told = |error: io::Error| Failure::Gone(format!("nothing was started: {error}"));
        let order = image::sealed("pve-sandbox-order", order).map_err(told)?;
        let pipes = Pipes::new(window.is_some()).map_err(told)?;
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        let ((answer, answered), (exit, exited)) = (oneshot::channel(), oneshot::channel());
        self.expected().insert(token, Expected { answer: Some(answer), exit });
        let message =
            ToHelper::Spawn { token, tty: window.map(|window| (window.rows, window.columns)) };
        let bytes = serde_json::to_vec(&message).map_err(|error| told(error.into()))?;
        let [a, b, c] = &pipes.theirs;
        let fds = [&order, a, b, c].map(AsFd::as_fd);
        let asked = async {
            self.socket.send(&bytes, &fds).await.map_err(told)?;
            let killed = |_| Failure::Gone("the helper was killed".to_owned());
            answered.await.unwrap_or_else(|gone| Err(killed(gone)))
        };
        let answer = tokio::select! {
            biased;
            answer = timeout(DEADLINE, asked) => answer.map_err(|_| Failure::Stuck)??,
            () = self.gone.cancelled() => return Err(Failure::Gone("the helper was killed".to_owned())),
        };
        let leader = answer;
        let ends = pipes.ours().map_err(told)?;
        Ok(Spawned { ends, leader, exit: exited })
    }

    /// Listens until the helper is gone, or says what names no command and is nothing.
    async fn listen(&self) {
        loop {
            let message = match self.socket.receive(MESSAGE_BYTES_MAX).await {
                Ok(message) if message.bytes.is_empty() => return,
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory || no_room(&error) => {
                    sleep(PAUSE).await;
                    continue;
                }
                Err(_) => return,
            };
            match parse(&message.bytes) {
                Some(said) => self.hear(said, message),
                None => match named(&message.bytes) {
                    Some(token) => self.give_up(token),
                    None => {
                        tracing::warn!(
                            "the helper said what is no message; it is taken for killed"
                        );
                        return;
                    }
                },
            }
        }
    }

    fn hear(&self, said: FromHelper, message: Message) {
        match said {
            FromHelper::Ready => {}
            FromHelper::Spawned { token } => {
                // Where no pid could be passed on, the kernel tells the helper's own.
                let leader = message.pid.filter(|pid| Some(*pid) != self.pid);
                self.answer(token, Ok(leader));
            }
            FromHelper::Refused { token, why } => {
                self.answer(token, Err(Failure::Refused(why)));
                self.expected().remove(&token);
            }
            FromHelper::Exited { token, code, signal } => {
                // One that was not told to run did, or it could not have ended.
                self.answer(token, Ok(None));
                if let Some(expected) = self.expected().remove(&token) {
                    // Nobody waits for it any more.
                    expected.exit.send(Ok((code, signal))).ok();
                }
            }
        }
    }

    /// Gives up one command of which the helper said what is not understood.
    fn give_up(&self, token: u64) {
        tracing::warn!(token, "the helper said what is no message of a command; it is lost");
        self.answer(token, Err(Failure::Gone(NOT_UNDERSTOOD.to_owned())));
        if let Some(expected) = self.expected().remove(&token) {
            expected.exit.send(Err(NOT_UNDERSTOOD)).ok();
        }
    }

    fn answer(&self, token: u64, answer: Answer) {
        let waits = self.expected().get_mut(&token).and_then(|expected| expected.answer.take());
        if let Some(waits) = waits {
            drop(waits.send(answer));
        }
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<u64, Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(bytes: &[u8]) -> Option<FromHelper> {
    serde_json::from_slice(bytes).ok()
}

/// The command that a message names which is otherwise not understood.
fn named(bytes: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Named {
        token: u64,
    }
    let message: BTreeMap<String, Named> = serde_json::from_slice(bytes).ok()?;
    message.into_values().next().map(|named| named.token)
}

/// True when the kernel had no memory for a message.
fn no_room(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOBUFS)
}

/// Both ends of a command's pipes, made here: nobody inside can give us something else instead.
#[derive(Debug)]
struct Pipes {
    /// As in [`Ends`].
    ours: [OwnedFd; 3],
    theirs: [OwnedFd; 3],
    tty: bool,
}

impl Pipes {
    fn new(tty: bool) -> io::Result<Self> {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
        let ((stdin, feed), (out, stdout), (read, write)) = (pipe()?, pipe()?, pipe()?);
        let (third, their_third) = if tty { (write, read) } else { (read, write) };
        let theirs = [stdin, stdout, their_third];
        // /dev/stdout and the like are opened by name, and to whom the container's root is nobody,
        // these would be somebody else's. The names are only seen by who may trace the command.
        for end in theirs.iter().filter(|_| !tty) {
            rustix::fs::fchmod(end, Mode::from_raw_mode(0o666))?;
        }
        Ok(Self { ours: [feed, out, third], theirs, tty })
    }

    fn ours(self) -> io::Result<Ends> {
        let [stdin, stdout, third] = self.ours;
        let third = if self.tty {
            rustix::io::ioctl_fionbio(&third, true)?;
            Third::Sizes(third)
        } else {
            Third::Stderr(Receiver::from_owned_fd(third)?)
        };
        let (stdin, stdout) = (Sender::from_owned_fd(stdin)?, Receiver::from_owned_fd(stdout)?);
        Ok(Ends { stdin, stdout, third })
    }
}

/// What it said on its stderr: its last line, fit for one line of an error.
async fn said(stderr: &mut tokio::process::ChildStderr) -> String {
    let mut bytes = Vec::new();
    // Cut short is better than nothing.
    drop(timeout(MOMENT, stderr.take(SAID_BYTES_MAX).read_to_end(&mut bytes)).await);
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no word of why");
    line.trim().chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect()
}

/// Ends `lxc-attach`, which ends by itself once the helper has.
async fn end(mut process: Running) {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if timeout(MOMENT, process.wait()).await.is_ok() {
            return;
        }
        if let Err(error) = process.signal(signal) {
            tracing::warn!(%error, "lxc-attach was not told to end");
        }
    }
    if timeout(MOMENT, process.wait()).await.is_err() {
        tracing::warn!(pid = process.pid(), "lxc-attach does not end");
    }
}
