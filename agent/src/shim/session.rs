//! One command: its output as far as it is kept, its stdin, its clock, its end.
//!
//! Output is taken from the command only as fast as the slowest of those who are attached takes it:
//! one that does not read stops the command at its next write, and nothing else. When an agent is
//! lost, the command is held for it for a while; when nobody is attached and nobody is expected, it
//! runs free and the oldest output is let go.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Buf, Bytes};
use proto::sandbox::v1::{ExecExit, ExecInfo};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::{Receiver, Sender},
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Host, Window,
    helper::{Ended, Ends, Spawned, Third},
    ring::Ring,
    tree::Tree,
};

/// Bytes at a time.
const CHUNK: u64 = 64 * 1024;
/// How far output may be ahead of whoever reads it.
const AHEAD: u64 = 1024 * 1024;
/// Bytes for a stdin that does not take them.
const PENDING_MAX: usize = 256 * 1024;
/// How long a command is held for an agent that was lost.
pub(super) const HELD: Duration = Duration::from_secs(60);
/// How long those who are attached may take to read what is left once the command has ended.
const REST: Duration = Duration::from_secs(60);
/// How long a command may take to end once all that it started has been killed.
const FOLLOW: Duration = Duration::from_secs(2);
/// A terminal that says nothing for so long once its command has ended is at its end: something in
/// the background may hold it open for ever.
const QUIET: Duration = Duration::from_millis(100);
/// How finely time is counted: what is frozen in between does not count.
const TICK: Duration = Duration::from_millis(250);
/// Signals that may wait to be sent.
const SIGNALS: usize = 8;
/// The code of a command whose time was over.
const TIMED_OUT: u32 = 124;
/// End of file, typed on a terminal.
const EOT: &[u8] = b"\x04";

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// By itself, or by its time.
    Exit(ExecExit),
    /// Nobody saw how; why not.
    Lost(String),
}

/// What comes next for one who is attached.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Bytes of its stdout.
    Stdout(Bytes),
    /// Bytes of its stderr.
    Stderr(Bytes),
    /// Its end.
    End(End),
}

/// What a command was started as.
#[derive(Debug)]
pub(super) struct Title {
    pub(super) exec_id: String,
    pub(super) keep: bool,
    pub(super) digest: String,
    pub(super) title: String,
    pub(super) started_ms: u64,
    pub(super) tty: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) title: Title,
    dir: PathBuf,
    state: Mutex<State>,
    /// Counts up at every change of the state.
    changed: watch::Sender<u64>,
    signals: mpsc::Sender<i32>,
    hung_up: CancellationToken,
    /// Where its terminal gets its sizes from, if it runs on one.
    sizes: Option<OwnedFd>,
}

#[derive(Debug)]
struct State {
    rings: [Ring; 2],
    /// Where each of those who are attached is.
    readers: BTreeMap<u64, [u64; 2]>,
    next_reader: u64,
    /// Where the last one was that was lost, and until when it is waited for.
    held: Option<([u64; 2], Instant)>,
    pending: VecDeque<Bytes>,
    pending_bytes: usize,
    stdin_taken: u64,
    stdin_eof: bool,
    stdin_closed: bool,
    end: Option<End>,
    ended_at: Option<Instant>,
    told: bool,
}

impl State {
    /// Bytes that may be taken from this output now.
    fn room(&self, output: usize) -> u64 {
        let places = self.readers.values().chain(self.held.iter().map(|(places, _)| places));
        let slowest = places.map(|places| places[output]).min();
        let end = self.rings[output].end();
        slowest.map_or(CHUNK, |slowest| (slowest + AHEAD).saturating_sub(end)).min(CHUNK)
    }
}

/// What makes a session end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Own((u8, u8)),
    Unseen(&'static str),
    HelperGone,
    TimedOut,
    HungUp,
}

impl Session {
    /// Of a command that has been spawned; it is looked after until its end.
    pub(super) fn begin(
        title: Title,
        spawned: Spawned,
        host: Arc<dyn Host>,
        mark: String,
        time: Duration,
        dir: PathBuf,
    ) -> Arc<Self> {
        let Spawned { ends: Ends { stdin, stdout, third }, leader, exit } = spawned;
        let (stderr, sizes) = match third {
            Third::Stderr(stderr) => (Some(stderr), None),
            Third::Sizes(sizes) => (None, Some(sizes)),
        };
        let (signal, signals) = mpsc::channel(SIGNALS);
        let state = State {
            rings: [Ring::new(), Ring::new()],
            readers: BTreeMap::new(),
            next_reader: 0,
            // Whoever started it is about to attach.
            held: Some(([0, 0], Instant::now() + HELD)),
            pending: VecDeque::new(),
            pending_bytes: 0,
            stdin_taken: 0,
            stdin_eof: false,
            stdin_closed: false,
            end: None,
            ended_at: None,
            told: false,
        };
        let session = Arc::new(Self {
            title,
            dir,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            signals: signal,
            hung_up: CancellationToken::new(),
            sizes,
        });
        let tree = Tree { host: Arc::clone(&host), leader, mark };
        let life = Life { session: Arc::clone(&session), host, tree, exit, signals };
        tokio::spawn(life.run(stdin, stdout, stderr, time));
        session
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state());
        self.changed.send_modify(|count| *count += 1);
        done
    }

    /// Waits until `look` finds something.
    async fn when<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&mut self.state()) {
                return found;
            }
            if changes.changed().await.is_err() {
                // Not while the sender is ours.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Attaches from these offsets on. Returns a number for the attachment, where its output begins,
    /// and how much stdin has been taken.
    pub(super) fn attach(&self, from: [u64; 2]) -> (u64, [u64; 2], u64) {
        self.change(|state| {
            let place = |n: usize| {
                let ring = &state.rings[n];
                from[n].clamp(ring.start(), ring.end())
            };
            let places = [place(0), place(1)];
            let reader = state.next_reader;
            state.next_reader += 1;
            state.readers.insert(reader, places);
            state.held = None;
            (reader, places, state.stdin_taken)
        })
    }

    /// The caller of this attachment has gone, and its agent has said so. One that has given the
    /// command a name may come back: what it has not read is held for it like for a lost agent.
    pub(super) fn hang_up(&self, reader: u64) {
        if self.title.keep {
            return self.lose(reader);
        }
        let alone = self.change(|state| {
            state.readers.remove(&reader);
            state.readers.is_empty()
        });
        if alone {
            self.hung_up.cancel();
        }
    }

    /// The agent of this attachment has gone; another will come.
    pub(super) fn lose(&self, reader: u64) {
        self.change(|state| {
            if let Some(places) = state.readers.remove(&reader)
                && state.readers.is_empty()
                && !state.told
            {
                state.held = Some((places, Instant::now() + HELD));
            }
        });
    }

    /// What comes next for this attachment. Everything before it has been passed on.
    pub(super) async fn next(&self, reader: u64) -> io::Result<Next> {
        self.when(|state| {
            let places = *state.readers.get(&reader)?;
            for (output, wrap) in
                [Next::Stdout as fn(Bytes) -> Next, Next::Stderr].iter().enumerate()
            {
                let ring = &state.rings[output];
                if ring.end() > places[output] {
                    return Some(ring.read(places[output], CHUNK).map(wrap));
                }
            }
            state.end.clone().map(|end| Ok(Next::End(end)))
        })
        .await
    }

    /// This attachment has passed it on.
    pub(super) fn passed(&self, reader: u64, next: &Next) {
        self.change(|state| {
            let Some(places) = state.readers.get_mut(&reader) else { return };
            match next {
                Next::Stdout(bytes) => places[0] += bytes.len() as u64,
                Next::Stderr(bytes) => places[1] += bytes.len() as u64,
                Next::End(_) => state.told = true,
            }
        });
    }

    /// Takes bytes for its stdin, once there is room for them; what it has of them already is
    /// skipped. Returns how much it has taken in all; `None` for bytes that leave a gap.
    pub(super) async fn stdin(&self, offset: u64, data: Bytes, eof: bool) -> Option<u64> {
        self.when(|state| {
            let room = state.pending_bytes < PENDING_MAX || state.stdin_closed;
            room.then(|| Self::take_stdin(state, offset, data.clone(), eof))
        })
        .await
        .inspect(|_| self.changed.send_modify(|count| *count += 1))
    }

    fn take_stdin(state: &mut State, offset: u64, mut data: Bytes, eof: bool) -> Option<u64> {
        let known = usize::try_from(state.stdin_taken.checked_sub(offset)?).unwrap_or(usize::MAX);
        let known = known.min(data.len());
        data.advance(known);
        if !state.stdin_eof {
            state.stdin_taken += data.len() as u64;
            if !data.is_empty() && !state.stdin_closed {
                state.pending_bytes += data.len();
                state.pending.push_back(data);
            }
            state.stdin_eof |= eof;
        }
        Some(state.stdin_taken)
    }

    /// Tells the programs on its terminal a new size.
    pub(super) fn resize(&self, window: Window) {
        let Some(sizes) = &self.sizes else { return };
        // Written at once or not at all: a pipe takes so few bytes whole. One that is full belongs
        // to a terminal that stands still.
        let bytes = helper::window_bytes((window.rows, window.columns));
        if let Err(error) = rustix::io::write(sizes, &bytes) {
            tracing::debug!(%error, "a terminal kept its size");
        }
    }

    /// Sends a signal to all that it has started.
    pub(super) fn signal(&self, number: i32) {
        if self.signals.try_send(number).is_err() {
            tracing::debug!(number, "too many signals wait, or it has ended: one was dropped");
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.state().end.is_none()
    }

    /// How long it has been at its end with nobody attached.
    pub(super) fn idle(&self) -> Option<Duration> {
        let state = self.state();
        let ended = state.ended_at.filter(|_| state.readers.is_empty())?;
        Some(ended.elapsed())
    }

    pub(super) fn info(&self) -> ExecInfo {
        let state = self.state();
        let ms = i64::try_from(self.title.started_ms).unwrap_or(i64::MAX);
        let (exit, lost) = match &state.end {
            Some(End::Exit(exit)) => (Some(*exit), String::new()),
            Some(End::Lost(why)) => (None, why.clone()),
            None => (None, String::new()),
        };
        ExecInfo {
            exec_id: self.title.exec_id.clone(),
            command: self.title.title.clone(),
            started_at: Some(prost_types::Timestamp {
                seconds: ms / 1000,
                nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or_default(),
            }),
            exit,
            lost,
            stdout_bytes: state.rings[0].end(),
            stderr_bytes: state.rings[1].end(),
            attached: u32::try_from(state.readers.len()).unwrap_or(u32::MAX),
            tty: self.title.tty,
        }
    }

    /// Passes an output on to its end. Once the command has ended, only what is there by then.
    async fn pump<R: AsyncRead + AsFd + Unpin>(
        &self,
        output: usize,
        mut from: R,
        ended: CancellationToken,
    ) -> io::Result<()> {
        let mut chunk = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
        loop {
            let room = self.when(|state| Some(state.room(output)).filter(|room| *room > 0));
            let room = usize::try_from(room.await).unwrap_or_default();
            let read = if ended.is_cancelled() {
                // The kernel is asked, not the runtime, which may not have heard of the last bytes.
                let left =
                    usize::try_from(rustix::io::ioctl_fionread(&from)?).unwrap_or(usize::MAX);
                match rustix::io::read(&from, &mut chunk[..room.min(left)]) {
                    Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                    Ok(read) => read,
                    Err(error) => return Err(error.into()),
                }
            } else {
                tokio::select! {
                    biased;
                    () = ended.cancelled() => continue,
                    read = from.read(&mut chunk[..room]) => match read? {
                        0 => return Ok(()),
                        read => read,
                    },
                }
            };
            self.change(|state| state.rings[output].write(&chunk[..read], &self.dir))?;
        }
    }

    async fn pump_terminal(&self, mut from: Receiver, ended: CancellationToken) -> io::Result<()> {
        let mut chunk = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
        loop {
            let room = self.when(|state| Some(state.room(0)).filter(|room| *room > 0));
            let room = usize::try_from(room.await).unwrap_or_default();
            let quiet = async {
                ended.cancelled().await;
                sleep(QUIET).await;
            };
            let read = tokio::select! {
                biased;
                read = from.read(&mut chunk[..room]) => read?,
                () = quiet => 0,
            };
            if read == 0 {
                return Ok(());
            }
            self.change(|state| state.rings[0].write(&chunk[..read], &self.dir))?;
        }
    }

    /// Feeds it until it has ended or reads no more. Returns at the end of what was to come.
    async fn feed(&self, to: &mut Sender) {
        loop {
            let next = self
                .when(|state| match state.pending.front() {
                    Some(bytes) => Some(Some(bytes.clone())),
                    None => state.stdin_eof.then_some(None),
                })
                .await;
            let Some(mut bytes) = next else { return };
            while bytes.has_remaining() {
                match to.write(&bytes).await {
                    Ok(written) => bytes.advance(written),
                    // It reads no more; what comes is taken and dropped.
                    Err(_) => {
                        self.change(|state| {
                            (state.pending, state.pending_bytes) = (VecDeque::new(), 0);
                            state.stdin_closed = true;
                        });
                        return;
                    }
                }
            }
            self.change(|state| {
                let done = state.pending.pop_front().map_or(0, |bytes| bytes.len());
                state.pending_bytes -= done;
            });
        }
    }

    /// Lets go of an agent that did not come back.
    fn expire(&self) {
        let expired = self.state().held.is_some_and(|(_, until)| until <= Instant::now());
        if expired {
            self.change(|state| state.held = None);
            if !self.title.keep {
                self.hung_up.cancel();
            }
        }
    }
}

/// What looks after a command.
struct Life {
    session: Arc<Session>,
    host: Arc<dyn Host>,
    tree: Tree,
    exit: oneshot::Receiver<Ended>,
    signals: mpsc::Receiver<i32>,
}

impl Life {
    async fn run(
        mut self,
        mut stdin: Sender,
        stdout: Receiver,
        stderr: Option<Receiver>,
        time: Duration,
    ) {
        let session = Arc::clone(&self.session);
        let ended = CancellationToken::new();
        let live = async {
            let cause = self.live(time).await;
            ended.cancel();
            cause
        };
        let (cause, whole) = match stderr {
            Some(stderr) => {
                let pumps = async {
                    let out = session.pump(0, stdout, ended.clone());
                    let err = session.pump(1, stderr, ended.clone());
                    tokio::try_join!(out, err).map(drop)
                };
                let feeding = &session;
                // Its end closes the pipe.
                let feed = until(&ended, async move { feeding.feed(&mut stdin).await });
                let (cause, (), whole) = tokio::join!(live, feed, rest(pumps, &ended));
                (cause, whole)
            }
            None => {
                let pump = session.pump_terminal(stdout, ended.clone());
                let feed = until(&ended, async {
                    session.feed(&mut stdin).await;
                    drop(timeout(Duration::from_secs(1), stdin.write_all(EOT)).await);
                });
                let (cause, (), whole) = tokio::join!(live, feed, rest(pump, &ended));
                (cause, whole)
            }
        };
        let end = match cause {
            _ if !whole => End::Lost("the end of its output could not be kept".to_owned()),
            Cause::Own((code, 0)) => exit(code.into(), 0, false),
            Cause::Own((_, signal)) => exit(128 + u32::from(signal), signal.into(), false),
            Cause::TimedOut => exit(TIMED_OUT, 0, true),
            Cause::HungUp => End::Lost("its caller hung up, and it was ended".to_owned()),
            Cause::Unseen(why) => End::Lost(why.to_owned()),
            Cause::HelperGone => {
                End::Lost("what supervised it inside the sandbox was killed".to_owned())
            }
        };
        session.change(|state| {
            state.end = Some(end);
            state.ended_at = Some(Instant::now());
            (state.pending, state.pending_bytes, state.stdin_closed) = (VecDeque::new(), 0, true);
        });
    }

    async fn live(&mut self, mut left: Duration) -> Cause {
        let hung_up = self.session.hung_up.clone();
        let mut last = Instant::now();
        let cause = loop {
            tokio::select! {
                biased;
                exit = &mut self.exit => match exit {
                    Ok(Ok(how)) => return Cause::Own(how),
                    Ok(Err(why)) => break Cause::Unseen(why),
                    Err(_) => break Cause::HelperGone,
                },
                () = hung_up.cancelled() => break Cause::HungUp,
                Some(number) = self.signals.recv() => self.tree.signal(number).await,
                () = sleep(left.min(TICK)) => self.session.expire(),
            }
            let now = Instant::now();
            if !self.host.frozen() {
                left = left.saturating_sub(now - last);
            }
            last = now;
            if left.is_zero() {
                break Cause::TimedOut;
            }
        };
        self.tree.end().await;
        if !matches!(cause, Cause::HelperGone | Cause::Unseen(_)) {
            // That it has ended is known by now; this only lets the kernel catch up.
            drop(timeout(FOLLOW, &mut self.exit).await);
        }
        cause
    }
}

/// Runs the pumps; once the command has ended, not for ever. True when all of its output is kept.
async fn rest(pumps: impl Future<Output = io::Result<()>>, ended: &CancellationToken) -> bool {
    let late = async {
        ended.cancelled().await;
        sleep(REST).await;
    };
    tokio::select! {
        result = pumps => {
            if let Err(error) = &result {
                tracing::warn!(%error, "output of a command was lost");
            }
            result.is_ok()
        }
        () = late => {
            tracing::warn!("output of a command was not read in time");
            false
        }
    }
}

async fn until(ended: &CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = ended.cancelled() => {}
        () = work => {}
    }
}

fn exit(code: u32, signal: u32, timed_out: bool) -> End {
    End::Exit(ExecExit { code, signal, timed_out })
}
