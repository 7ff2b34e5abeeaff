//! Shim's side of the helper inside the sandbox: starts it and handles its messages. These are
//! hostile input: bounded, and parsed strictly. An invalid message ends the command that it names; one
//! that names no command of the helper, and the last of too many, end the helper.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use daemon::{seldom::Seldom, sync::Mutex};
use helper::{FromHelper, IMAGE_FD, MESSAGE_BYTES_MAX, Refusal, ToHelper};
use nix::{
    fcntl::OFlag,
    sys::{
        signal::Signal,
        stat::{Mode, fchmod},
    },
    unistd::pipe2,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
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

/// Time budget to enter the sandbox and to be ready: milliseconds, unless the node is under heavy
/// load.
const DEADLINE: Duration = Duration::from_secs(15);
/// Most bytes read of the stderr of a failed `lxc-attach`, and most characters of that in an error.
const SAID_BYTES_MAX: u64 = 4096;
const SAID_CHARS_MAX: usize = 300;
/// Time budget for `lxc-attach` to write its error, and to end after each signal.
const MOMENT: Duration = Duration::from_secs(1);

/// Shim's ends of a command's three pipes.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) stdin: Sender,
    pub(super) stdout: Receiver,
    pub(super) third: Third,
}

/// Use of the third pipe.
#[derive(Debug)]
pub(super) enum Third {
    /// The command's stderr.
    Stderr(Receiver),
    /// New sizes of the command's terminal, which has no stderr of its own.
    Sizes(OwnedFd),
}

/// Command that was started.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) ends: Ends,
    /// True when no program was run; the exit tells why.
    pub(super) never_ran: bool,
    /// Pid on the host; reported by the helper, so not trusted.
    pub(super) leader: Option<u32>,
    /// Exit of the command, once it has ended. Closed when the helper has gone.
    pub(super) exit: oneshot::Receiver<Ended>,
}

/// Exit code and signal of a command, or the reason why they are unknown.
pub(super) type Ended = Result<(u8, u8), &'static str>;

/// Reason why no command was started.
#[derive(Debug)]
pub(super) enum Failure {
    /// The helper refused the command.
    Refused(Refusal),
    /// The helper could not enter the sandbox, or was not asked: nothing was started.
    Gone(String),
    /// The helper did not get ready, or did not take the order, in time: nothing was started.
    Stuck,
    /// The helper died after it had received the order: what it had started ended with it, but may
    /// have run until then.
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

/// Most invalid messages about its commands that a helper may send: it is dropped after the last.
const INVALID_MAX: usize = 8;
/// Lines about invalid messages, and about helpers that somebody inside has stopped. Root in the sandbox
/// can cause both again and again, with one helper after another.
static INVALID: Seldom = Seldom::new();
static STOPPED: Seldom = Seldom::new();
/// Reason given for a command about which the helper sent an invalid message.
const NOT_UNDERSTOOD: &str = "the helper inside the sandbox sent an invalid message about it";
/// Reason given for the commands of a helper that was stuck.
const STUCK: &str = "what supervised it inside the sandbox did not answer for 15 s and was replaced; \
                     the command was ended";
/// Interval between pings of a helper whose commands run. A helper that is to start something is
/// pinged at once.
const QUIET: Duration = Duration::from_secs(5);
/// Longest wait for a killed helper to be gone. It runs nothing more in any case.
const DEATH: Duration = Duration::from_secs(5);
/// Pause before a call is repeated for which the kernel had no memory.
const PAUSE: Duration = Duration::from_millis(20);

/// Helper that runs, or did.
#[derive(Debug)]
pub(super) struct Helper {
    socket: Seqpacket,
    /// Pid on the host.
    pid: Option<u32>,
    /// Pidfd, if the pid is a process of the sandbox.
    process: Option<OwnedFd>,
    tokens: AtomicU64,
    expected: Mutex<HashMap<u64, Expected>>,
    /// Notified when something more is expected.
    asked: Notify,
    /// Serial number of the last ping, and in `pongs` of the last that was answered.
    pings: AtomicU64,
    pongs: watch::Sender<u64>,
    gone: CancellationToken,
}

impl Helper {
    /// Starts a helper inside the sandbox and waits until it is ready.
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
                // The kernel passed this pid.
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
            // Kill the helper only once it is stuck: that closes its socket, as when somebody else
            // kills it.
            let stuck = tokio::select! {
                () = listener.listen() => false,
                () = listener.watch(&*host) => true,
            };
            if stuck {
                listener.kill().await;
            }
            // Everything that the helper started ends with it; this closes every answer and exit.
            listener.gone.cancel();
            let expected = std::mem::take(&mut *listener.expected.lock());
            for expected in expected.into_values().filter(|_| stuck) {
                expected.exit.send(Err(STUCK)).ok();
            }
            end(attach.process).await;
        });
        Ok(helper)
    }

    /// Returns a token that is cancelled when the helper has gone.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Starts the command of `order`, a `helper::Order` in JSON, unless `start_by_ms` of
    /// `helper::up_ms` has passed. Waits as long as the helper lives: only its answer, or its
    /// death, proves that nothing runs. The future must be awaited to its end; otherwise the
    /// outcome is unknown.
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
        self.expected.lock().insert(token, Expected { answer: Some(answer), exit });
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
        // A message is sent as a whole or not at all.
        let sent = tokio::select! {
            biased;
            sent = timeout(left, self.socket.send(&bytes, &fds)) => match sent {
                Ok(sent) => sent.map_err(told),
                Err(_) => Err(Failure::Stuck),
            },
            () = self.gone.cancelled() => Err(Failure::Gone("the helper was killed".to_owned())),
        };
        if let Err(failure) = sent {
            self.expected.lock().remove(&token);
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

    /// Receives messages until the helper is gone, or is to be dropped: for an invalid message that
    /// names none of its commands, or for too many others.
    async fn listen(&self) {
        let mut invalid = 0;
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
            let Some(said) = parse(&message.bytes) else {
                invalid += 1;
                let token = named(&message.bytes).filter(|token| self.give_up(*token));
                let dropped = token.is_none() || invalid >= INVALID_MAX;
                if let Some(left_out) = INVALID.admit() {
                    tracing::warn!(token, dropped, left_out, "the helper sent an invalid message");
                }
                if dropped {
                    return;
                }
                continue;
            };
            self.hear(said, message);
        }
    }

    fn hear(&self, said: FromHelper, message: Message) {
        match said {
            FromHelper::Ready => {}
            FromHelper::Pong { serial } => drop(self.pongs.send_replace(serial)),
            FromHelper::Spawned { token, never_ran } => {
                // Where no pid could be passed on, the kernel passes the helper's own.
                let leader = message.pid.filter(|pid| Some(*pid) != self.pid);
                self.answer(token, Ok(Answered { leader, never_ran }));
            }
            FromHelper::Refused { token, why } => {
                self.answer(token, Err(Failure::Refused(why)));
                self.expected.lock().remove(&token);
            }
            FromHelper::Exited { token, code, signal } => {
                // A command that was not reported as running did run, or it could not have ended.
                self.answer(token, Ok(Answered { leader: None, never_ran: false }));
                if let Some(expected) = self.expected.lock().remove(&token) {
                    // Nobody may wait for the exit any more.
                    expected.exit.send(Ok((code, signal))).ok();
                }
            }
        }
    }

    /// Gives up a command about which the helper sent an invalid message. False when it has no such
    /// command.
    fn give_up(&self, token: u64) -> bool {
        self.answer(token, Err(Failure::Lost));
        let Some(expected) = self.expected.lock().remove(&token) else { return false };
        // Nobody may wait for the exit any more.
        expected.exit.send(Err(NOT_UNDERSTOOD)).ok();
        true
    }

    /// Pings the helper whenever something is expected of it. Returns when the helper has not
    /// answered for too long.
    async fn watch(&self, host: &dyn Host) {
        let mut last = Instant::now();
        loop {
            sleep(pulse::BEAT).await;
            let (expects, starts) = {
                let expected = self.expected.lock();
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

    /// Kills the helper. When this returns, it is dead or will run nothing more.
    async fn kill(&self) {
        tracing::warn!(pid = self.pid, "the helper does not answer and is killed");
        self.send(rustix::process::Signal::KILL);
        if let Some(pid) = self.pid.filter(|_| self.process.is_some()) {
            drop(timeout(DEATH, pidfd::ended(pid)).await);
        }
    }

    /// Pings once. False when no answer comes.
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
                // `listen` notices a broken socket.
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

    /// Resumes the helper if a signal has stopped it: somebody inside has stopped every process.
    fn go_on(&self) {
        if self.pid.is_some_and(|pid| proc::stopped(Path::new("/proc"), pid)) {
            if let Some(left_out) = STOPPED.admit() {
                let pid = self.pid;
                tracing::info!(pid, left_out, "the helper was stopped and is sent SIGCONT");
            }
            self.send(rustix::process::Signal::CONT);
        }
    }

    fn send(&self, signal: rustix::process::Signal) {
        let Some(process) = &self.process else { return };
        if let Err(error) = pidfd_send_signal(process, signal) {
            tracing::debug!(%error, "the helper could not be sent a signal");
        }
    }

    fn answer(&self, token: u64, answer: Answer) {
        let waits =
            self.expected.lock().get_mut(&token).and_then(|expected| expected.answer.take());
        if let Some(waits) = waits {
            drop(waits.send(answer));
        }
    }
}

/// Opens the pidfd of a process, if it belongs to the sandbox: nothing else is ever sent a signal.
fn open(host: &dyn Host, pid: u32) -> Option<OwnedFd> {
    let process = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let process = pidfd_open(process, PidfdFlags::empty()).ok()?;
    host.processes().contains(&pid).then_some(process)
}

fn parse(bytes: &[u8]) -> Option<FromHelper> {
    serde_json::from_slice(bytes).ok()
}

/// Returns the command that an otherwise invalid message names.
fn named(bytes: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Named {
        token: u64,
    }
    let message: BTreeMap<String, Named> = serde_json::from_slice(bytes).ok()?;
    message.into_values().next().map(|named| named.token)
}

/// Returns true when the kernel had no memory for a message.
fn no_room(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOBUFS)
}

/// Both ends of a command's pipes. The shim makes them, so nobody inside can substitute others.
#[derive(Debug)]
struct Pipes {
    ours: Ends,
    theirs: [OwnedFd; 3],
}

impl Pipes {
    fn new(tty: bool) -> io::Result<Self> {
        let pipe = || pipe2(OFlag::O_CLOEXEC);
        let ((stdin, feed), (out, stdout), (read, write)) = (pipe()?, pipe()?, pipe()?);
        let (third, their_third) = if tty { (write, read) } else { (read, write) };
        let theirs = [stdin, stdout, their_third];
        // /dev/stdout and the like are opened by name. A user to whom the container's root is
        // nobody would not own these pipes. Only processes that may trace the command see the
        // names.
        for end in theirs.iter().filter(|_| !tty) {
            fchmod(end, Mode::from_bits_truncate(0o666))?;
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

/// Returns the last line that `lxc-attach` wrote to stderr, cleaned for an error message.
async fn said(stderr: &mut tokio::process::ChildStderr) -> String {
    let mut bytes = Vec::new();
    // A truncated text is better than none.
    drop(timeout(MOMENT, stderr.take(SAID_BYTES_MAX).read_to_end(&mut bytes)).await);
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no word of why");
    line.trim().chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect()
}

/// Ends `lxc-attach`, which exits by itself once the helper has.
async fn end(mut process: Running) {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if timeout(MOMENT, process.wait()).await.is_ok() {
            return;
        }
        if let Err(error) = process.signal(signal) {
            tracing::warn!(%error, "lxc-attach could not be sent a signal");
        }
    }
    if timeout(MOMENT, process.wait()).await.is_err() {
        tracing::warn!(pid = process.pid(), "lxc-attach does not exit");
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::SendFlags;

    use super::*;
    use crate::sandbox::tests::log_lines::LogLines;

    /// Invalid messages that a helper tries to send.
    const MESSAGES: u64 = 10_000;
    /// Commands that are expected of it.
    const COMMANDS: u64 = 100;

    /// Listens to a helper that sends an invalid message about each of these tokens. Returns how many of
    /// its commands were given up before it was dropped, and the lines that were logged.
    async fn dropped_after(token: fn(u64) -> u64) -> (u64, usize) {
        let (socket, theirs) = seqpacket::pair().expect("a pair");
        let expected = || Expected { answer: None, exit: oneshot::channel().0 };
        let helper = Helper {
            socket,
            pid: None,
            process: None,
            tokens: AtomicU64::default(),
            expected: Mutex::new((0..COMMANDS).map(|token| (token, expected())).collect()),
            asked: Notify::new(),
            pings: AtomicU64::default(),
            pongs: watch::Sender::new(0),
            gone: CancellationToken::new(),
        };
        let says = std::thread::spawn(move || {
            for number in 0..MESSAGES {
                let message = format!(r#"{{"Exited":{{"token":{},"code":999}}}}"#, token(number));
                if rustix::net::send(&theirs, message.as_bytes(), SendFlags::NOSIGNAL).is_err() {
                    return;
                }
            }
            panic!("all were received");
        });
        let lines = LogLines::default();
        {
            let _counts = lines.count_here();
            timeout(Duration::from_secs(60), helper.listen()).await.expect("it is dropped");
        }
        let left = helper.expected.lock().len() as u64;
        drop(helper);
        says.join().expect("nobody listens any more");
        (COMMANDS - left, lines.count())
    }

    #[tokio::test]
    async fn helper_that_floods_with_invalid_messages_is_dropped_and_fills_no_log() {
        let (given_up, lines) = dropped_after(|number| COMMANDS + number).await;
        assert!(given_up == 0 && lines <= 1, "commands that it has not: {given_up}, {lines} lines");
        let (given_up, lines) = dropped_after(|_| 7).await;
        assert!(given_up == 1 && lines <= 1, "one command: {given_up}, {lines} lines");
        let (given_up, lines) = dropped_after(|number| number).await;
        assert!(given_up == INVALID_MAX as u64 && lines <= 1, "each: {given_up}, {lines} lines");
    }
}
