//! State of one command: the output that is kept, its stdin, its clock, its end.
//!
//! Output is read from the command only as fast as the slowest attachment takes it: an attachment
//! that does not read blocks the command at its next write, and nothing else. When an agent is
//! lost, the command is held for it for a while ([`HELD`]). When nobody is attached and nobody is
//! expected, the command runs freely and the oldest output is dropped. A command that was started
//! detached expects nobody.
//!
//! A command ends as soon as its own process does, however much has been read: each attachment gets
//! what was written until then, and the end. Background processes of the command can continue to
//! write (see `output`); attachments from before the end do not get that output.

mod input;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use daemon::sync::Mutex;
use proto::sandbox::v1::{ExecExit, ExecInfo};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::ring::{Budget, KEPT, Ring};

/// Most commands that run at the same time.
const COMMANDS_MAX: usize = 64;
/// Most commands that run beside these if their timeout is short: so that somebody can still look
/// around and kill in a sandbox whose commands fill it.
const SHORT_MAX: usize = 8;
/// Longest timeout that is short: that of the API's unary call.
const SHORT: Duration = Duration::from_secs(20);
/// Most operations on files that run at the same time.
const FILES_MAX: usize = 64;
/// Most of all of these.
const RUNNING_MAX: usize = COMMANDS_MAX + SHORT_MAX + FILES_MAX;
/// Most bytes of output in one step.
pub(super) const CHUNK: u64 = 64 * 1024;
/// Bounds of how far output may be ahead of its slowest reader, in bytes. The value in between is
/// the share of one output in the budget when [`RUNNING_MAX`] commands run.
const AHEAD: std::ops::RangeInclusive<u64> = 64 * 1024..=1024 * 1024;
/// Time for which a command is held for an agent that was lost.
pub(super) const HELD: Duration = Duration::from_secs(60);
/// Time for which a command that has ended is kept for a caller that reads nothing of the remaining
/// output, such as a pager in which somebody reads. To end sooner would cut the output.
pub(super) const REST: Duration = Duration::from_secs(60 * 60);
/// Interval between checks whether an agent is still waited for.
const AGAIN: Duration = Duration::from_secs(1);

/// Decides whether one more command may run beside `running` others of its kind.
///
/// # Errors
/// A message for the caller when it may not.
pub(super) fn admit(running: usize, files: bool, timeout: Duration) -> Result<(), String> {
    if files {
        let why = || format!("{FILES_MAX} operations on files run in this sandbox already");
        return (running < FILES_MAX).then_some(()).ok_or_else(why);
    }
    let places = if timeout <= SHORT { COMMANDS_MAX + SHORT_MAX } else { COMMANDS_MAX };
    let why = || {
        format!(
            "{places} commands run in this sandbox already: end one first; {SHORT_MAX} places are \
             kept for commands with a timeout of at most {} s",
            SHORT.as_secs()
        )
    };
    (running < places).then_some(()).ok_or_else(why)
}

/// End of a command.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// The command exited, was ended by a signal, or timed out.
    Exit(ExecExit),
    /// The exit is unknown; the text tells why.
    Lost(String),
}

/// Next event of an attachment.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    Stdout(Bytes),
    Stderr(Bytes),
    End(End),
}

/// Parameters that a command was started with.
#[derive(Debug)]
pub(super) struct Title {
    pub(super) exec_id: String,
    pub(super) keep: bool,
    /// True when nobody is expected to read its output.
    pub(super) detached: bool,
    /// True when it is the agent's own access to files.
    pub(super) files: bool,
    /// True when a hang-up ends its session alone.
    pub(super) spare_background: bool,
    /// True when no program was run: the exit code is the helper's own.
    pub(super) never_ran: bool,
    pub(super) digest: String,
    pub(super) title: String,
    pub(super) started_ms: u64,
    pub(super) tty: bool,
}

/// State shared by all sessions of a shim.
#[derive(Debug)]
pub(super) struct Shared {
    /// Directory for output that does not fit into memory.
    pub(super) dir: PathBuf,
    /// Budget of bytes in that directory.
    pub(super) budget: Arc<Budget>,
    /// Notified when a command has ended and its background processes keep its output open.
    pub(super) left_behind: Notify,
}

impl Shared {
    /// Returns how far an output may be ahead of its reader, in bytes: all running commands share
    /// the budget.
    pub(super) fn ahead(&self) -> u64 {
        let outputs = 2 * u64::try_from(RUNNING_MAX).unwrap_or(u64::MAX);
        (self.budget.limit() / outputs).clamp(*AHEAD.start(), *AHEAD.end())
    }
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) title: Title,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// Change counter of the state.
    changed: watch::Sender<u64>,
    signals: mpsc::Sender<i32>,
    hung_up: CancellationToken,
    /// Cancelled when the output of its background processes is read no more.
    background_dropped: CancellationToken,
    /// Pipe for new sizes of its terminal, if it runs on one.
    sizes: Option<OwnedFd>,
}

/// Position of an attachment.
#[derive(Debug, Clone, Copy)]
struct Reader {
    at: [u64; 2],
    /// Offsets where the command's own output ends, once it has ended; for an attachment made after
    /// the end, where the output ended at that time.
    until: [u64; 2],
}

#[derive(Debug)]
struct State {
    rings: [Ring; 2],
    readers: BTreeMap<u64, Reader>,
    next_reader: u64,
    /// Position of the last attachment that was lost, and the deadline until which its agent is
    /// waited for.
    held: Option<([u64; 2], Instant)>,
    pending: VecDeque<Bytes>,
    pending_bytes: usize,
    stdin_taken: u64,
    stdin_eof: bool,
    stdin_closed: bool,
    /// Last time at which it wrote, got input, had an attachment, or used CPU.
    active: Instant,
    end: Option<End>,
    ended_at: Option<Instant>,
    /// True while background processes keep its output open.
    background: bool,
    /// True once nobody can ask for the command any more.
    forgotten: bool,
    told: bool,
}

impl State {
    /// Returns the oldest byte that an attachment, or an agent that is waited for, has not yet got.
    fn unread(&self, output: usize) -> Option<u64> {
        let attached =
            self.readers.values().filter(|reader| reader.at[output] < reader.until[output]);
        let held = self.held.iter().filter(|(_, until)| *until > Instant::now());
        attached.map(|reader| reader.at[output]).chain(held.map(|(at, _)| at[output])).min()
    }

    /// Returns how many bytes may be read from the command for this output now.
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
    /// Creates the session of a command that was started. Signals for it go to `signals`.
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
            // The caller that started it is about to attach.
            held: (!title.detached).then(|| ([0, 0], Instant::now() + HELD)),
            pending: VecDeque::new(),
            pending_bytes: 0,
            stdin_taken: 0,
            stdin_eof: false,
            stdin_closed: false,
            active: Instant::now(),
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
            background_dropped: CancellationToken::new(),
            sizes,
        })
    }

    /// Waits until nobody wants the command any more.
    pub(super) async fn hung_up(&self) {
        self.hung_up.cancelled().await;
    }

    /// Waits until the output of background processes is to be read no more.
    pub(super) async fn background_dropped(&self) {
        self.background_dropped.cancelled().await;
    }

    /// Records the end: only what the command has written until now is its own output.
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

    /// Records that background processes have closed the output, or that it is read no more.
    pub(super) fn background_ended(&self) {
        self.change(|state| state.background = false);
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state.lock());
        self.changed.send_modify(|count| *count += 1);
        done
    }

    /// Waits until `look` returns a value.
    async fn when<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&mut self.state.lock()) {
                return found;
            }
            if changes.changed().await.is_err() {
                // Cannot happen while `self` holds the sender.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Attaches from these offsets on. Returns the number of the attachment, where its output
    /// begins, and how many bytes of stdin have been accepted. An attachment to a command that has
    /// ended covers the output until now.
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

    /// Detaches: the caller has gone, as its agent reports. A caller that has given the command an
    /// exec_id may come back: unread output is held for it as for a lost agent.
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

    /// Ends a command whose start was reported as uncertain. Without an exec_id from its caller
    /// nobody will ask for it.
    pub(super) fn give_up(&self) {
        if !self.title.keep {
            self.hung_up.cancel();
        }
    }

    /// Detaches: the agent was lost, and another will come.
    pub(super) fn lose(&self, reader: u64) {
        self.change(|state| {
            state.active = Instant::now();
            if let Some(gone) = state.readers.remove(&reader)
                && state.readers.is_empty()
                && !state.told
                && !self.title.detached
            {
                state.held = Some((gone.at, Instant::now() + HELD));
            }
        });
    }

    /// Returns the next event of this attachment. All previous ones must have been passed on.
    pub(super) async fn next(&self, reader: u64) -> io::Result<Next> {
        self.when(|state| {
            let Reader { at, until } = *state.readers.get(&reader)?;
            for (output, wrap) in
                [Next::Stdout as fn(Bytes) -> Next, Next::Stderr].iter().enumerate()
            {
                let ring = &state.rings[output];
                let (at, end) = (at[output], ring.end().min(until[output]));
                if at < end && at < ring.start() {
                    return Some(Err(io::Error::other("unread output was dropped")));
                }
                if at < end {
                    return Some(ring.read(at, CHUNK.min(end - at)).map(wrap));
                }
            }
            state.end.clone().map(|end| Ok(Next::End(end)))
        })
        .await
    }

    /// Records that this attachment has passed an event on.
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

    pub(super) fn runs(&self) -> bool {
        self.state.lock().end.is_none()
    }

    /// Returns how long ago the command ended, if it has.
    pub(super) fn ended_for(&self) -> Option<Duration> {
        Some(self.state.lock().ended_at?.elapsed())
    }

    pub(super) fn is_attached(&self) -> bool {
        !self.state.lock().readers.is_empty()
    }

    /// Returns true when the command has ended and background processes keep its output open.
    pub(super) fn has_background(&self) -> bool {
        self.state.lock().background
    }

    /// Stops reading the output of background processes; their next write kills them.
    pub(super) fn drop_background(&self) {
        self.background_dropped.cancel();
    }

    /// Returns how many bytes of its output are in files.
    pub(super) fn in_files(&self) -> u64 {
        self.state.lock().rings.iter().map(Ring::in_file).sum()
    }

    /// Drops the oldest output until at most `keep` bytes of each are left. While the command runs,
    /// unread output is kept.
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

    /// Awaits `work` of an attachment; once the command has ended, only for a limited time.
    ///
    /// # Errors
    /// When it took too long, or when `work` fails.
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

    /// Waits until bytes may be read for this output; returns how many.
    pub(super) async fn room(&self, output: usize) -> usize {
        let room = self.when(|state| {
            let room = state.room(output, self.shared.ahead());
            (room > 0).then_some(room)
        });
        usize::try_from(room.await).unwrap_or_default()
    }

    /// Like `room`, once the command has ended: unread output of its attachments is not
    /// overwritten.
    pub(super) async fn room_after_end(&self, output: usize) -> usize {
        loop {
            let room = self.when(|state| {
                let room = state.room(output, KEPT);
                (room > 0).then_some(room)
            });
            // Nothing signals when the wait for an agent ends.
            if let Ok(room) = timeout(AGAIN, room).await {
                return usize::try_from(room).unwrap_or_default();
            }
        }
    }

    pub(super) fn write(&self, output: usize, bytes: &[u8]) -> io::Result<()> {
        self.change(|state| {
            state.active = Instant::now();
            match state.forgotten {
                true => Ok(()),
                false => state.rings[output].write(bytes, &self.shared.dir),
            }
        })
    }

    /// Records that the command uses CPU.
    pub(super) fn works(&self) {
        self.state.lock().active = Instant::now();
    }

    /// Drops all output: nobody can ask for the command any more.
    pub(super) fn forget(&self) {
        self.change(|state| {
            state.forgotten = true;
            state.rings.iter_mut().for_each(|ring| ring.trim(0));
        });
    }

    pub(super) fn info(&self) -> ExecInfo {
        let state = self.state.lock();
        let started_ms = self.title.started_ms;
        // The agent's own access to files has none; so the agent tells it from a command.
        let started_at =
            (started_ms > 0).then(|| (UNIX_EPOCH + Duration::from_millis(started_ms)).into());
        let (exit, lost) = match &state.end {
            Some(End::Exit(exit)) => (Some(*exit), String::new()),
            Some(End::Lost(why)) => (None, why.clone()),
            None => (None, String::new()),
        };
        let attached = u32::try_from(state.readers.len()).unwrap_or(u32::MAX);
        let inactive = if attached > 0 { Duration::ZERO } else { state.active.elapsed() };
        let runs = state.end.is_none();
        ExecInfo {
            exec_id: self.title.exec_id.clone(),
            command: self.title.title.clone(),
            started_at,
            exit,
            lost,
            stdout_bytes: state.rings[0].end(),
            stderr_bytes: state.rings[1].end(),
            attached,
            tty: self.title.tty,
            inactive: runs.then(|| prost_types::Duration::try_from(inactive).ok()).flatten(),
        }
    }

    /// Stops waiting for an agent that did not come back.
    pub(super) fn expire(&self) {
        let expired = self.state.lock().held.is_some_and(|(_, until)| until <= Instant::now());
        if expired {
            self.change(|state| state.held = None);
            if !self.title.keep {
                self.hung_up.cancel();
            }
        }
    }
}
