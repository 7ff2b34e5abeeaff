//! Audit log: who called what, when, from where, and how it ended. Entries go through a bounded queue
//! to one writer, which writes and syncs them in groups: no call waits for the disk.
//!
//! `log` has the files, `opening` finds what an earlier controller has left, `retention` decides what is
//! removed, `share` how much a team may add, `writer` is the task, `local` brings it what commands on this machine have
//! done, `read` lists, exports and verifies, `counts` counts what is not told one by one. Lines and their chain of hashes are `daemon::audit`.

mod counts;
mod local;
mod log;
mod opening;
mod read;
mod retention;
mod share;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use daemon::{
    audit::{Head, Record},
    sync::Mutex,
};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::clock::Clock;
use counts::{Counts, Noted};

pub use local::{LocalCommand, LocalEntry, LocalError, recorded};
pub use log::OpenError;
use opening::Damage;
pub use read::{AuditError, AuditFilter, AuditQuery};

/// Entries that wait for the writer at most. More are dropped and counted.
const QUEUE: usize = 8192;
/// Age below which no entry goes for the size of the log, unless configured otherwise.
const LEAST: Duration = Duration::from_hours(7 * 24);
/// Teams that a finding names at most.
const NAMED_MAX: usize = 5;
/// Longest wait for the writer to write what it has.
const FLUSH: Duration = Duration::from_secs(10);

/// Returns the directory of the log, in that of the controller's state.
pub fn dir(data_dir: &Path) -> PathBuf {
    data_dir.join("audit")
}

/// Retention and sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Time for which entries are kept.
    pub keep: Duration,
    /// Age below which no entry goes for the size, unless that is far too large.
    pub least: Duration,
    /// Most bytes of all segments; the oldest go first. The teams share what is younger than the least age.
    pub bytes_max: u64,
    /// Size at which a segment ends and the next one begins, bytes.
    pub segment_bytes: u64,
    /// Entries that wait for the writer at most.
    pub queue: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keep: Duration::from_hours(365 * 24),
            least: LEAST,
            bytes_max: 1 << 30,
            segment_bytes: 16 << 20,
            queue: QUEUE,
        }
    }
}

/// Message to the writer.
#[derive(Debug)]
enum Message {
    /// Entry that is written as long as its team has not used up its share, and counted otherwise.
    Entry(Box<Record>),
    /// Entry that is written whatever its team has written before.
    Always(Box<Record>),
    /// Answers when everything before it is synced, or has failed.
    Flush(oneshot::Sender<()>),
    /// Writes the last entry and ends.
    Close(oneshot::Sender<()>),
}

/// Segments and the last line that are safe on the disk: what readers see.
#[derive(Debug, Clone, Default)]
struct Visible {
    /// Line before the first one that is kept.
    before: Option<Head>,
    segments: Vec<retention::Segment>,
    head: Option<Head>,
    /// Why nothing can be written now.
    failing: Option<String>,
    /// Old segments that stay because the wall clock is doubtful.
    doubtful: usize,
    /// Teams that have used up their shares.
    crowded: Vec<String>,
    /// Bytes by which what is younger than the least age is too large.
    over: u64,
}

/// State that calls, the writer and readers share.
#[derive(Debug, Default)]
struct Shared {
    /// Entries that were dropped since the last gap entry.
    dropped: AtomicU64,
    /// Entries that were ever dropped since the start.
    lost: AtomicU64,
    /// Calls that were only counted since the last entry about them.
    refused: AtomicU64,
    /// Refusals of known callers since the last entries about them.
    refusals: Mutex<Counts>,
    calls: AtomicU64,
    /// Damage that was found when the log was opened.
    damage: OnceLock<Vec<Damage>>,
    /// First mistake that the last verification found.
    broken: Mutex<Option<String>>,
    visible: Mutex<Visible>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    queue: mpsc::Sender<Message>,
    shared: Arc<Shared>,
    /// One verification at a time: each reads the whole log.
    verifying: Arc<Semaphore>,
}

/// Handle of the audit log. Dropping all handles without `close` is a crash: the next start notes a gap.
#[derive(Debug, Clone)]
pub struct Audit(Option<Arc<Inner>>);

impl Audit {
    /// Returns a log that keeps nothing, for controllers in simulations.
    pub fn off() -> Self {
        Self(None)
    }

    /// Opens the log of a directory, and starts its writer on the current runtime.
    ///
    /// # Errors
    /// When the directory cannot be read, or another process writes to it.
    pub async fn open(
        dir: &Path,
        clock: Arc<dyn Clock>,
        options: Options,
    ) -> Result<Self, OpenError> {
        let (path, segment, queue) = (dir.to_owned(), options.clone(), options.queue);
        let opened = log::wait_for_lock(dir).await?;
        let opened = tokio::task::spawn_blocking(move || log::Log::open(&path, opened, segment));
        let log = opened.await.map_err(|_| OpenError::Stopping)??;
        let shared = Arc::new(Shared::default());
        shared.damage.get_or_init(|| log.damage().to_vec());
        let (sender, receiver) = mpsc::channel(queue);
        tokio::spawn(writer::run(log, receiver, shared.clone(), clock));
        let verifying = Arc::new(Semaphore::new(1));
        let inner = Inner { dir: dir.to_owned(), queue: sender, shared, verifying };
        let inner = Arc::new(inner);
        tokio::spawn(local::take_all(dir.to_owned(), Arc::downgrade(&inner)));
        let audit = Self(Some(inner));
        audit.flush().await;
        Ok(audit)
    }

    /// Adds an entry. Never waits: one too many is counted. Of a team that has used up its share of the log, it is
    /// counted with others like it.
    pub fn record(&self, record: Record) {
        self.send(Message::Entry(Box::new(record)));
    }

    /// Adds an entry of an operator, or of nobody's team. Never waits: one too many is counted.
    pub fn record_always(&self, record: Record) {
        self.send(Message::Always(Box::new(record)));
    }

    fn send(&self, message: Message) {
        let Some(inner) = &self.0 else { return };
        if inner.queue.try_send(message).is_err() {
            inner.shared.dropped.fetch_add(1, Ordering::Relaxed);
            inner.shared.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a call that was refused before its caller was known.
    pub fn count_refused(&self) {
        if let Some(inner) = &self.0 {
            inner.shared.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds the refusal of a call whose caller is known. Of many of one kind, all but the first are counted.
    pub fn refuse(&self, record: Record) {
        let Some(inner) = &self.0 else { return };
        let noted = inner.shared.refusals.lock().note(&record);
        if noted == Noted::Alone {
            self.record(record);
        }
    }

    /// Returns a number for a call.
    pub fn number(&self) -> u64 {
        let number = |inner: &Arc<Inner>| inner.shared.calls.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.as_ref().map_or(0, number)
    }

    /// Waits until what was recorded before is on the disk, at most 10 s.
    pub async fn flush(&self) {
        self.ask(Message::Flush).await;
    }

    /// Writes what was recorded and that the controller stopped in order. Later entries are lost.
    pub async fn close(&self) {
        self.ask(Message::Close).await;
    }

    async fn ask(&self, message: impl FnOnce(oneshot::Sender<()>) -> Message) {
        let Some(inner) = &self.0 else { return };
        let (done, written) = oneshot::channel();
        let asked = async {
            if inner.queue.send(message(done)).await.is_ok() {
                // An error is a writer that has ended: then there is nothing to wait for.
                written.await.ok();
            }
        };
        if tokio::time::timeout(FLUSH, asked).await.is_err() {
            tracing::warn!("the audit log was not written in time");
        }
    }

    /// Says what is wrong with the log now, in a text for `fsck`.
    pub fn trouble(&self) -> Option<String> {
        let inner = self.0.as_ref()?;
        let shared = &inner.shared;
        let lost = shared.lost.load(Ordering::Relaxed);
        let visible = shared.visible.lock().clone();
        let mut all = Vec::new();
        match (visible.failing, lost) {
            (Some(why), lost) => all.push(format!(
                "nothing can be written now, and {lost} entries are missing since the start: {why}"
            )),
            (None, 0) => {}
            (None, lost) => all.push(format!("{lost} entries are missing since the start")),
        }
        if visible.doubtful > 0 {
            all.push(format!(
                "{} files of entries older than retention_days stay: the clock of this machine may have gone ahead; \
                 set it right if it is wrong, or wait for a week",
                visible.doubtful
            ));
        }
        if visible.over > 0 {
            all.push(format!(
                "entries younger than min_days are {} MiB more than max_mib: raise max_mib; with twice as much, the \
                 oldest go whatever their age",
                visible.over.div_ceil(1 << 20)
            ));
        }
        if !visible.crowded.is_empty() {
            let (many, named) = (visible.crowded.len(), visible.crowded.iter().take(NAMED_MAX));
            let named: Vec<_> = named.map(String::as_str).collect();
            all.push(format!(
                "teams that have used up their share of max_mib: their calls are only counted ({}; {many} in all). Find \
                 out what they call, or raise max_mib",
                named.join(", ")
            ));
        }
        let kept = |first: u64| visible.segments.iter().any(|segment| segment.first == first);
        let damage = shared.damage.get().into_iter().flatten();
        let damage =
            damage.filter(|damage| damage.aside || damage.first == 0 || kept(damage.first));
        all.extend(damage.map(|damage| format!("{}: {}", damage.file, damage.why)));
        all.extend(shared.broken.lock().clone());
        (!all.is_empty()).then(|| all.join("; "))
    }
}

#[cfg(test)]
mod tests;
