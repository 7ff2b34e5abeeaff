//! The helper inside the sandbox, as its shim sees it: how it gets in, and what it says. What it
//! says is hostile input: a bounded message that is understood. One that is not is the end of the
//! command that it names; one that names none is the end of the helper.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use helper::{FromHelper, IMAGE_FD, MESSAGE_BYTES_MAX, Refusal, ToHelper};
use nix::sys::signal::Signal;
use rustix::{
    fs::Mode,
    pipe::PipeFlags,
    process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal},
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::{Receiver, Sender},
    sync::{Notify, oneshot, watch},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    Host, Window,
    pulse::{self, Next, Unanswered},
};
use crate::{
    run::{self, Running},
    sys::{
        image, pidfd, proc,
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
    /// No program was run; the exit says why.
    pub(super) never_ran: bool,
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
    /// The helper could not get in, or was not asked: nothing was started.
    Gone(String),
    /// The helper did not get in, or did not take the order, in time: nothing was started.
    Stuck,
    /// The helper died with the order in its hands: what it had started went with it, but something
    /// may have run until then.
    Lost,
}

type Answer = Result<Answered, Failure>;

#[derive(Debug)]
struct Answered {
    leader: Option<u32>,
    never_ran: bool,
}

#[derive(Debug)]
struct Expected {
    answer: Option<oneshot::Sender<Answer>>,
    exit: oneshot::Sender<Ended>,
}

/// What is told of a command of which the helper said what is not understood.
const NOT_UNDERSTOOD: &str = "what supervised it inside the sandbox said nonsense of it";
/// What is told of the commands of a helper that was taken for stuck.
const STUCK: &str = "what supervised it inside the sandbox did not answer for 15 s and was replaced; \
                     the command was ended";
/// Between two signs of life of a helper whose commands run. One that is to start something is asked
/// for one at once.
const QUIET: Duration = Duration::from_secs(5);
/// How long a killed helper may take to be gone. It runs nothing more, whenever that is.
const DEATH: Duration = Duration::from_secs(5);
/// Pause before the kernel is asked again for memory that it did not have.
const PAUSE: Duration = Duration::from_millis(20);

/// A helper that is there, or was.
#[derive(Debug)]
pub(super) struct Helper {
    socket: Seqpacket,
    /// Its pid here.
    pid: Option<u32>,
    /// Itself, where it is a process of the sandbox's.
    process: Option<OwnedFd>,
    tokens: AtomicU64,
    expected: Mutex<HashMap<u64, Expected>>,
    /// Something more is expected.
    asked: Notify,
    /// Number of the last question for a sign of life, and of the last that was answered.
    pings: AtomicU64,
    pongs: watch::Sender<u64>,
    gone: CancellationToken,
}

impl Helper {
    /// Gets one in.
    pub(super) async fn attach(
        host: &Arc<dyn Host>,
        image: &OwnedFd,
    ) -> Result<Arc<Self>, Failure> {
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
            Ok(Ok(message)) if is_ready(&message) => {
                // By the kernel's word.
                message.pid.into_iter().for_each(|pid| host.entered(pid));
                message.pid
            }
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
            process: pid.and_then(|pid| open(&**host, pid)),
            tokens: AtomicU64::default(),
            expected: Mutex::default(),
            asked: Notify::new(),
            pings: AtomicU64::default(),
            pongs: watch::Sender::new(0),
            gone: CancellationToken::new(),
        });
        let (listener, host) = (Arc::clone(&helper), Arc::clone(host));
        tokio::spawn(async move {
            // Killed only once it is known to be stuck: its socket closes at that, as it does when
            // somebody else kills it.
            let stuck = tokio::select! {
                () = listener.listen() => false,
                () = listener.watch(&*host) => true,
            };
            if stuck {
                listener.kill().await;
            }
            // What was started goes with the helper; this closes every answer and exit.
            listener.gone.cancel();
            let expected = std::mem::take(&mut *listener.expected());
            for expected in expected.into_values().filter(|_| stuck) {
                expected.exit.send(Err(STUCK)).ok();
            }
            end(attach.process).await;
        });
        Ok(helper)
    }

    /// Cancelled when it is there no more.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Starts what the order, a `helper::Order` in JSON, says, until `start_by_ms` of
    /// `helper::up_ms`. Waits for as long as the helper lives: only its word, or its death, says that
    /// nothing runs. To be awaited to its end; whoever cannot wait for that knows nothing.
    pub(super) async fn spawn(
        &self,
        order: &[u8],
        window: Option<Window>,
        start_by_ms: u64,
    ) -> Result<Spawned, Failure> {
        let told = |error: io::Error| Failure::Gone(format!("nothing was started: {error}"));
        let order = image::sealed("pve-sandbox-order", order).map_err(told)?;
        let Pipes { ours, theirs } = Pipes::new(window.is_some()).map_err(told)?;
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        let ((answer, answered), (exit, exited)) = (oneshot::channel(), oneshot::channel());
        self.expected().insert(token, Expected { answer: Some(answer), exit });
        self.asked.notify_one();
        let message = ToHelper::Spawn {
            token,
            tty: window.map(|window| (window.rows, window.columns)),
            start_by_ms,
        };
        let bytes = serde_json::to_vec(&message).map_err(|error| told(error.into()))?;
        let [a, b, c] = &theirs;
        let fds = [&order, a, b, c].map(AsFd::as_fd);
        let left = Duration::from_millis(start_by_ms.saturating_sub(helper::up_ms()));
        // One message goes as a whole or not at all.
        let sent = tokio::select! {
            biased;
            sent = timeout(left, self.socket.send(&bytes, &fds)) => match sent {
                Ok(sent) => sent.map_err(told),
                Err(_) => Err(Failure::Stuck),
            },
            () = self.gone.cancelled() => Err(Failure::Gone("the helper was killed".to_owned())),
        };
        if let Err(failure) = sent {
            self.expected().remove(&token);
            return Err(failure);
        }
        let answer = tokio::select! {
            biased;
            answer = answered => answer.map_err(|_| Failure::Lost)?,
            () = self.gone.cancelled() => return Err(Failure::Lost),
        };
        let Answered { leader, never_ran } = answer?;
        Ok(Spawned { ends: ours, never_ran, leader, exit: exited })
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
            FromHelper::Pong { serial } => drop(self.pongs.send_replace(serial)),
            FromHelper::Spawned { token, never_ran } => {
                // Where no pid could be passed on, the kernel tells the helper's own.
                let leader = message.pid.filter(|pid| Some(*pid) != self.pid);
                self.answer(token, Ok(Answered { leader, never_ran }));
            }
            FromHelper::Refused { token, why } => {
                self.answer(token, Err(Failure::Refused(why)));
                self.expected().remove(&token);
            }
            FromHelper::Exited { token, code, signal } => {
                // One that was not told to run did, or it could not have ended.
                self.answer(token, Ok(Answered { leader: None, never_ran: false }));
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
        self.answer(token, Err(Failure::Lost));
        if let Some(expected) = self.expected().remove(&token) {
            expected.exit.send(Err(NOT_UNDERSTOOD)).ok();
        }
    }

    /// Asks for signs of life whenever something is expected. Returns when the helper has given none
    /// for too long.
    async fn watch(&self, host: &dyn Host) {
        let mut last = Instant::now();
        loop {
            sleep(pulse::BEAT).await;
            let (expects, starts) = {
                let expected = self.expected();
                let starts = expected.values().any(|expected| expected.answer.is_some());
                (!expected.is_empty(), starts)
            };
            if !expects {
                self.asked.notified().await;
                continue;
            }
            if (starts || last.elapsed() >= QUIET) && !host.frozen() {
                if !self.answers(host).await {
                    return;
                }
                last = Instant::now();
            }
        }
    }

    /// Kills it. It is dead when this returns, or will run nothing more.
    async fn kill(&self) {
        tracing::warn!(pid = self.pid, "the helper does not answer; it is killed");
        self.send(rustix::process::Signal::KILL);
        if let Some(pid) = self.pid.filter(|_| self.process.is_some()) {
            drop(timeout(DEATH, pidfd::ended(pid)).await);
        }
    }

    /// Asks once. False when no answer comes.
    async fn answers(&self, host: &dyn Host) -> bool {
        let serial = self.pings.fetch_add(1, Ordering::Relaxed) + 1;
        let mut pongs = self.pongs.subscribe();
        let mut answer = std::pin::pin!(async {
            let ping = serde_json::to_vec(&ToHelper::Ping { serial })?;
            self.socket.send(&ping, &[]).await?;
            pongs.wait_for(|last| *last >= serial).await.map(drop).map_err(io::Error::other)
        });
        let (mut unanswered, mut last) = (Unanswered::default(), Instant::now());
        loop {
            tokio::select! {
                biased;
                // A socket that is broken is seen by who listens to it.
                _ = &mut answer => return true,
                () = sleep(pulse::BEAT) => {}
            }
            let since = std::mem::replace(&mut last, Instant::now()).elapsed();
            match unanswered.look(since, host.frozen()) {
                Next::Wait => {}
                Next::GoOn => self.go_on(),
                Next::GiveUp => return false,
            }
        }
    }

    /// Lets it go on where a signal has stopped it: somebody inside has stopped all there is.
    fn go_on(&self) {
        if self.pid.is_some_and(|pid| proc::stopped(Path::new("/proc"), pid)) {
            tracing::info!(pid = self.pid, "the helper was stopped; it is told to go on");
            self.send(rustix::process::Signal::CONT);
        }
    }

    fn send(&self, signal: rustix::process::Signal) {
        let Some(process) = &self.process else { return };
        if let Err(error) = pidfd_send_signal(process, signal) {
            tracing::debug!(%error, "the helper was not sent a signal");
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

/// The process itself, if it is one of the sandbox's: nothing else is ever sent a signal.
fn open(host: &dyn Host, pid: u32) -> Option<OwnedFd> {
    let process = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let process = pidfd_open(process, PidfdFlags::empty()).ok()?;
    host.processes().contains(&pid).then_some(process)
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
    ours: Ends,
    theirs: [OwnedFd; 3],
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
        let third = if tty {
            rustix::io::ioctl_fionbio(&third, true)?;
            Third::Sizes(third)
        } else {
            Third::Stderr(Receiver::from_owned_fd(third)?)
        };
        let (stdin, stdout) = (Sender::from_owned_fd(feed)?, Receiver::from_owned_fd(out)?);
        Ok(Self { ours: Ends { stdin, stdout, third }, theirs })
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
