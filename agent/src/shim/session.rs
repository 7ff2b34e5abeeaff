//! One command: its output as far as it is kept, its stdin, its clock, its end.
//!
//! Output is taken from the command only as fast as the slowest of those who are attached takes it:
//! one that does not read stops the command at its next write, and nothing else. When an agent is
//! lost, the command is held for it for a while; when nobody is attached and nobody is expected, it
//! runs free and the oldest output is let go. Nobody is expected by a command that was started
//! detached.
//!
//! A command ends at once when its own process does, whoever has read what by then: each attachment
//! is given what was written until that moment, then the end. What the command left in the background
//! can go on writing (see `output`); that belongs to no attachment from before the end.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures_util::future;
use proto::sandbox::v1::{ExecExit, ExecInfo};
use tokio::{
    io::AsyncWriteExt,
    net::unix::pipe::{Receiver, Sender},
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Host, Window,
    helper::{Ended, Ends, Spawned, Third},
    keep::RUNNING_MAX,
    output::{self, CHUNK, Source},
    ring::{Budget, KEPT, Ring},
    tree::Tree,
};

/// How far output may be ahead of whoever reads it, at least and at most. In between it is what each
/// output has of the budget when as many commands run as may.
const AHEAD: std::ops::RangeInclusive<u64> = 64 * 1024..=1024 * 1024;
/// Bytes for a stdin that does not take them.
const PENDING_MAX: usize = 256 * 1024;
/// How long a command is held for an agent that was lost.
pub(super) const HELD: Duration = Duration::from_secs(60);
/// How long one that is attached may take nothing of what is left once the command has ended.
const REST: Duration = Duration::from_secs(60);
/// How long a command may take to end once all that it started has been killed.
const FOLLOW: Duration = Duration::from_secs(2);
/// Pause between two looks at whether an agent is still waited for.
const AGAIN: Duration = Duration::from_secs(1);
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
    /// Nobody is expected to read its output.
    pub(super) detached: bool,
    /// No program was run: its exit is the helper's own word for that.
    pub(super) never_ran: bool,
    pub(super) digest: String,
    pub(super) title: String,
    pub(super) started_ms: u64,
    pub(super) tty: bool,
}

/// What all sessions of a shim share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Where output is kept that does not fit into memory.
    pub(super) dir: PathBuf,
    /// How much of that.
    pub(super) budget: Arc<Budget>,
    /// Told when a command has ended and its background holds on to its output.
    pub(super) left_behind: Notify,
}

impl Shared {
    /// How far an output may be ahead of whoever reads it: all that run share the budget.
    pub(super) fn ahead(&self) -> u64 {
        let outputs = 2 * u64::try_from(RUNNING_MAX).unwrap_or(u64::MAX);
        (self.budget.limit() / outputs).clamp(*AHEAD.start(), *AHEAD.end())
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) title: Title,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// Counts up at every change of the state.
    changed: watch::Sender<u64>,
    signals: mpsc::Sender<i32>,
    hung_up: CancellationToken,
    /// What its background writes is read no more.
    let_go: CancellationToken,
    /// Where its terminal gets its sizes from, if it runs on one.
    sizes: Option<OwnedFd>,
}

/// Where one who is attached is.
#[derive(Debug, Clone, Copy)]
struct Reader {
    at: [u64; 2],
    /// Where the command's own output ends, once it has; for one that attached after that, where it
    /// found the end.
    until: [u64; 2],
}

#[derive(Debug)]
struct State {
    rings: [Ring; 2],
    readers: BTreeMap<u64, Reader>,
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
    /// Something in its background holds on to its output.
    background: bool,
    /// Nobody can ask for it any more.
    forgotten: bool,
    told: bool,
}

impl State {
    /// The oldest byte that somebody who is attached, or is waited for, has still to get.
    fn unread(&self, output: usize) -> Option<u64> {
        let attached =
            self.readers.values().filter(|reader| reader.at[output] < reader.until[output]);
        let held = self.held.iter().filter(|(_, until)| *until > Instant::now());
        attached.map(|reader| reader.at[output]).chain(held.map(|(at, _)| at[output])).min()
    }

    /// Bytes that may be taken from this output now.
    fn room(&self, output: usize, ahead: u64) -> u64 {
        let end = self.rings[output].end();
        let slowest = self.unread(output);
        slowest.map_or(CHUNK, |slowest| (slowest + ahead).saturating_sub(end)).min(CHUNK)
    }

    fn ends(&self) -> [u64; 2] {
        [self.rings[0].end(), self.rings[1].end()]
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
        shared: Arc<Shared>,
    ) -> Arc<Self> {
        let Spawned { ends: Ends { stdin, stdout, third }, leader, exit, never_ran: _ } = spawned;
        let (stderr, sizes) = match third {
            Third::Stderr(stderr) => (Some(stderr), None),
            Third::Sizes(sizes) => (None, Some(sizes)),
        };
        let (signal, signals) = mpsc::channel(SIGNALS);
        let state = State {
            rings: [Ring::new(shared.budget.clone()), Ring::new(shared.budget.clone())],
            readers: BTreeMap::new(),
            next_reader: 0,
            // Whoever started it is about to attach.
            held: (!title.detached).then(|| ([0, 0], Instant::now() + HELD)),
            pending: VecDeque::new(),
            pending_bytes: 0,
            stdin_taken: 0,
            stdin_eof: false,
            stdin_closed: false,
            end: None,
            ended_at: None,
            background: false,
            forgotten: false,
            told: false,
        };
        let session = Arc::new(Self {
            title,
            shared,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            signals: signal,
            hung_up: CancellationToken::new(),
            let_go: CancellationToken::new(),
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
    /// and how much stdin has been taken. To a command that has ended: up to what is there now.
    pub(super) fn attach(&self, from: [u64; 2]) -> (u64, [u64; 2], u64) {
        self.change(|state| {
            let place = |n: usize| {
                let ring = &state.rings[n];
                from[n].clamp(ring.start(), ring.end())
            };
            let at = [place(0), place(1)];
            let reader = state.next_reader;
            state.next_reader += 1;
            let until = if state.end.is_some() { state.ends() } else { [u64::MAX; 2] };
            state.readers.insert(reader, Reader { at, until });
            state.held = None;
            (reader, at, state.stdin_taken)
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

    /// Whoever wanted it started was told that it may not have been. Nobody will ask for one without
    /// a caller's name, so it is ended.
    pub(super) fn give_up(&self) {
        if !self.title.keep {
            self.hung_up.cancel();
        }
    }

    /// The agent of this attachment has gone; another will come.
    pub(super) fn lose(&self, reader: u64) {
        self.change(|state| {
            if let Some(gone) = state.readers.remove(&reader)
                && state.readers.is_empty()
                && !state.told
                && !self.title.detached
            {
                state.held = Some((gone.at, Instant::now() + HELD));
            }
        });
    }

    /// What comes next for this attachment. Everything before it has been passed on.
    pub(super) async fn next(&self, reader: u64) -> io::Result<Next> {
        self.when(|state| {
            let Reader { at, until } = *state.readers.get(&reader)?;
            for (output, wrap) in
                [Next::Stdout as fn(Bytes) -> Next, Next::Stderr].iter().enumerate()
            {
                let ring = &state.rings[output];
                let (at, end) = (at[output], ring.end().min(until[output]));
                if at < end && at < ring.start() {
                    return Some(Err(io::Error::other("output that was not read was let go")));
                }
                if at < end {
                    return Some(ring.read(at, CHUNK.min(end - at)).map(wrap));
                }
            }
            state.end.clone().map(|end| Ok(Next::End(end)))
        })
        .await
    }

    /// This attachment has passed it on.
    pub(super) fn passed(&self, reader: u64, next: &Next) {
        self.change(|state| {
            let Some(reader) = state.readers.get_mut(&reader) else { return };
            match next {
                Next::Stdout(bytes) => reader.at[0] += bytes.len() as u64,
                Next::Stderr(bytes) => reader.at[1] += bytes.len() as u64,
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

    /// How long it has been at its end, if it is.
    pub(super) fn ended_for(&self) -> Option<Duration> {
        Some(self.state().ended_at?.elapsed())
    }

    /// Somebody is attached.
    pub(super) fn is_attached(&self) -> bool {
        !self.state().readers.is_empty()
    }

    /// It has ended, and something in its background holds on to its output.
    pub(super) fn has_background(&self) -> bool {
        self.state().background
    }

    /// Reads no more of what its background writes, which is killed by its next write.
    pub(super) fn let_background_go(&self) {
        self.let_go.cancel();
    }

    /// Bytes of its output in files.
    pub(super) fn in_files(&self) -> u64 {
        self.state().rings.iter().map(Ring::in_file).sum()
    }

    /// Lets go of the oldest output, down to so many bytes of each. While it runs, what somebody has
    /// still to get is kept.
    pub(super) fn trim(&self, keep: u64) {
        self.change(|state| {
            for output in 0..2 {
                let unread = state.unread(output).filter(|_| state.end.is_none());
                let ring = &mut state.rings[output];
                let unread = unread.map_or(0, |at| ring.end().saturating_sub(at));
                ring.trim(keep.max(unread));
            }
        });
    }

    /// Waits for `work` of one who is attached; once the command has ended, not for ever.
    ///
    /// # Errors
    /// When it took too long, or as `work`.
    pub(super) async fn in_time<T>(
        &self,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let late = async {
            self.when(|state| state.end.as_ref().map(drop)).await;
            sleep(REST).await;
        };
        tokio::select! {
            biased;
            done = work => done,
            () = late => Err(io::Error::new(io::ErrorKind::TimedOut, "what is left is not read")),
        }
    }

    /// Waits until bytes may be taken from this output; how many.
    pub(super) async fn room(&self, output: usize) -> usize {
        let room = self.when(|state| {
            let room = state.room(output, self.shared.ahead());
            (room > 0).then_some(room)
        });
        usize::try_from(room.await).unwrap_or_default()
    }

    /// The same once the command has ended: what its attachments have still to get is not written
    /// over.
    pub(super) async fn room_after_end(&self, output: usize) -> usize {
        loop {
            let room = self.when(|state| {
                let room = state.room(output, KEPT);
                (room > 0).then_some(room)
            });
            // Nobody tells that an agent is waited for no more.
            if let Ok(room) = timeout(AGAIN, room).await {
                return usize::try_from(room).unwrap_or_default();
            }
        }
    }

    /// Keeps bytes of this output.
    pub(super) fn write(&self, output: usize, bytes: &[u8]) -> io::Result<()> {
        self.change(|state| match state.forgotten {
            true => Ok(()),
            false => state.rings[output].write(bytes, &self.shared.dir),
        })
    }

    /// Nobody can ask for it any more: nothing of it is kept.
    pub(super) fn forget(&self) {
        self.change(|state| {
            state.forgotten = true;
            state.rings.iter_mut().for_each(|ring| ring.trim(0));
        });
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
        let pump = |(output, source)| {
            let (session, ended) = (&session, &ended);
            async move {
                let open = output::pump(session, output, source, ended).await?;
                Ok::<_, io::Error>(open.map(|source| (output, source)))
            }
        };
        let (cause, open) = match stderr {
            Some(stderr) => {
                let sources = [(0, Source::Pipe(stdout)), (1, Source::Pipe(stderr))];
                let feeding = &session;
                // Its end closes the pipe.
                let feed = until(&ended, async move { feeding.feed(&mut stdin).await });
                let pumps = future::try_join_all(sources.map(pump));
                let (cause, (), open) = tokio::join!(live, feed, pumps);
                (cause, open)
            }
            None => {
                let feed = until(&ended, async {
                    session.feed(&mut stdin).await;
                    drop(timeout(Duration::from_secs(1), stdin.write_all(EOT)).await);
                });
                let pumps = future::try_join_all([(0, Source::Terminal(stdout))].map(pump));
                let (cause, (), open) = tokio::join!(live, feed, pumps);
                (cause, open)
            }
        };
        let end = match (cause, &open) {
            (_, Err(error)) => {
                tracing::warn!(%error, "output of a command was lost");
                End::Lost("its output could not be kept".to_owned())
            }
            (Cause::Own((code, 0)), _) => exit(code.into(), 0, false),
            (Cause::Own((_, signal)), _) => exit(128 + u32::from(signal), signal.into(), false),
            (Cause::TimedOut, _) => exit(TIMED_OUT, 0, true),
            (Cause::HungUp, _) => End::Lost("its caller hung up, and it was ended".to_owned()),
            (Cause::Unseen(why), _) => End::Lost(why.to_owned()),
            (Cause::HelperGone, _) => {
                End::Lost("what supervised it inside the sandbox was killed".to_owned())
            }
        };
        let background: Vec<_> = open.into_iter().flatten().flatten().collect();
        session.change(|state| {
            let ends = state.ends();
            state.readers.values_mut().for_each(|reader| reader.until = ends);
            state.end = Some(end);
            state.ended_at = Some(Instant::now());
            state.background = !background.is_empty();
            (state.pending, state.pending_bytes, state.stdin_closed) = (VecDeque::new(), 0, true);
        });
        if background.is_empty() {
            return;
        }
        session.shared.left_behind.notify_one();
        let follow = |(output, source)| output::follow(Arc::clone(&session), output, source);
        tokio::select! {
            biased;
            () = session.let_go.cancelled() => {}
            _ = future::join_all(background.into_iter().map(follow)) => {}
        }
        session.change(|state| state.background = false);
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

async fn until(ended: &CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = ended.cancelled() => {}
        () = work => {}
    }
}

fn exit(code: u32, signal: u32, timed_out: bool) -> End {
    End::Exit(ExecExit { code, signal, timed_out })
}
