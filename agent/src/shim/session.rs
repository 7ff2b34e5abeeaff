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
use proto::sandbox::v1::{ExecExit, ExecInfo};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Window,
    ring::{Budget, KEPT, Ring},
};

/// Commands that run at a time.
pub(super) const RUNNING_MAX: usize = 64;
/// Bytes of output at a time.
pub(super) const CHUNK: u64 = 64 * 1024;
/// How far output may be ahead of whoever reads it, at least and at most. In between it is what each
/// output has of the budget when as many commands run as may.
const AHEAD: std::ops::RangeInclusive<u64> = 64 * 1024..=1024 * 1024;
/// Bytes for a stdin that does not take them.
const PENDING_MAX: usize = 256 * 1024;
/// How long a command is held for an agent that was lost.
pub(super) const HELD: Duration = Duration::from_secs(60);
/// How long one that is attached may take nothing of what is left once the command has ended.
const REST: Duration = Duration::from_secs(60);
/// Pause between two looks at whether an agent is still waited for.
const AGAIN: Duration = Duration::from_secs(1);

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

impl Session {
    /// Of a command that was spawned. What tells it to end is told to whoever looks after it.
    pub(super) fn new(
        title: Title,
        shared: Arc<Shared>,
        signals: mpsc::Sender<i32>,
        sizes: Option<OwnedFd>,
    ) -> Arc<Self> {
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
        Arc::new(Self {
            title,
            shared,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            signals,
            hung_up: CancellationToken::new(),
            let_go: CancellationToken::new(),
            sizes,
        })
    }

    /// Waits until nobody wants it any more.
    pub(super) async fn hung_up(&self) {
        self.hung_up.cancelled().await;
    }

    /// Waits until what its background writes is to be read no more.
    pub(super) async fn let_go(&self) {
        self.let_go.cancelled().await;
    }

    /// Its end: what it wrote until now is all that is its own.
    pub(super) fn end(&self, end: End, background: bool) {
        self.change(|state| {
            let ends = state.ends();
            state.readers.values_mut().for_each(|reader| reader.until = ends);
            state.end = Some(end);
            state.ended_at = Some(Instant::now());
            state.background = background;
            (state.pending, state.pending_bytes, state.stdin_closed) = (VecDeque::new(), 0, true);
        });
        if background {
            self.shared.left_behind.notify_one();
        }
    }

    /// What its background held open is closed, or is read no more.
    pub(super) fn background_ended(&self) {
        self.change(|state| state.background = false);
    }

    /// Waits for bytes for its stdin; `None` at the end of what was to come.
    pub(super) async fn stdin_next(&self) -> Option<Bytes> {
        self.when(|state| match state.pending.front() {
            Some(bytes) => Some(Some(bytes.clone())),
            None => state.stdin_eof.then_some(None),
        })
        .await
    }

    /// The bytes that were next have been written.
    pub(super) fn stdin_passed(&self) {
        self.change(|state| {
            let done = state.pending.pop_front().map_or(0, |bytes| bytes.len());
            state.pending_bytes -= done;
        });
    }

    /// It reads no more: what comes is taken and dropped.
    pub(super) fn close_stdin(&self) {
        self.change(|state| {
            (state.pending, state.pending_bytes) = (VecDeque::new(), 0);
            state.stdin_closed = true;
        });
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

    /// Lets go of an agent that did not come back.
    pub(super) fn expire(&self) {
        let expired = self.state().held.is_some_and(|(_, until)| until <= Instant::now());
        if expired {
            self.change(|state| state.held = None);
            if !self.title.keep {
                self.hung_up.cancel();
            }
        }
    }
}
