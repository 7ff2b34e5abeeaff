//! Writer of the audit log: takes entries from the queue, writes them at once and syncs them in groups.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use daemon::audit::{GAP_IO, GAP_QUEUE, Kind, Record};
use tokio::{
    sync::{mpsc::Receiver, oneshot},
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{Message, Shared, Visible, counts::Counts, log::Log};
use crate::clock::{Clock, Now};

/// Longest time from the write of an entry to its sync, but for the sync itself.
const SYNC: Duration = Duration::from_millis(100);
/// Entries that are synced before that time.
const SYNC_ENTRIES: usize = 1024;
/// Entries that are not synced at most; more wait in the queue.
const PENDING_MAX: usize = 4096;
/// Time between two tries while the disk fails.
const RETRY: Duration = Duration::from_secs(1);
/// Time between two entries about calls that were only counted.
const REFUSED: Duration = Duration::from_mins(1);

/// Runs until the log is closed, or all handles are gone.
pub(super) async fn run(
    log: Log,
    mut queue: Receiver<Message>,
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
) {
    let mut writer = Writer {
        shared,
        clock,
        started: Instant::now(),
        failing: false,
        beyond: Counts::default(),
        waiting: Vec::new(),
    };
    let (mut log, mut due) = (log, Some(Instant::now()));
    let mut minutes = interval(REFUSED);
    minutes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ended = false;
    while !ended {
        let mut batch = Vec::new();
        let room = PENDING_MAX.saturating_sub(log.pending());
        tokio::select! {
            count = queue.recv_many(&mut batch, room), if room > 0 => ended = count == 0,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            // While the disk fails, they stay counted: entries in memory are bounded.
            _ = minutes.tick() => if !writer.failing {
                writer.note_counted(&mut log);
            },
        }
        ended |= writer.take(batch, &mut log);
        let now = Instant::now();
        // While the disk fails, the next try has its time.
        let may_try = !writer.failing || ended || due.is_some_and(|due| due <= now);
        if !may_try {
            continue;
        }
        let full = log.pending() >= SYNC_ENTRIES || !writer.waiting.is_empty() || ended;
        let sync = full || due.is_some_and(|due| due <= now);
        if !writer.failing {
            writer.note_dropped(&mut log, GAP_QUEUE);
        }
        let failed_before = writer.failing;
        let done;
        (log, done) = match writer.step(log, sync).await {
            Some(stepped) => stepped,
            // The runtime ends.
            None => return,
        };
        if failed_before && done.is_ok() {
            // One gap for all that was dropped while the disk failed.
            writer.note_dropped(&mut log, GAP_IO);
        }
        due = match (done, sync) {
            (Err(_), _) => Some(now + RETRY),
            (Ok(()), true) if log.pending() == 0 => None,
            (Ok(()), true) => Some(now + SYNC),
            (Ok(()), false) if log.pending() > 0 => due.or(Some(now + SYNC)),
            (Ok(()), false) => due,
        };
    }
}

struct Writer {
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    started: Instant,
    failing: bool,
    /// Calls of teams that have used up their shares, since the last entries about them.
    beyond: Counts,
    /// Callers of `flush` and `close`.
    waiting: Vec<oneshot::Sender<()>>,
}

impl Writer {
    /// Takes messages; true when the log is to be closed.
    fn take(&mut self, batch: Vec<Message>, log: &mut Log) -> bool {
        let mut closed = false;
        for message in batch {
            match message {
                // What comes after the end has no place in the log.
                Message::Entry(_) | Message::Always(_) | Message::Flush(_) if closed => {}
                Message::Entry(record) if !log.admits(&record.team) => {
                    // A call is counted at its end, not for its begin and its parts, too.
                    if !matches!(record.kind, Kind::Begun | Kind::Part) {
                        self.beyond.count(&record);
                    }
                }
                Message::Entry(record) | Message::Always(record) => log.add(*record),
                Message::Flush(done) => self.waiting.push(done),
                Message::Close(done) => {
                    self.note_counted(log);
                    self.note_dropped(log, if self.failing { GAP_IO } else { GAP_QUEUE });
                    log.add(Record::new(Kind::Closed, self.clock.now_ms()));
                    self.waiting.push(done);
                    closed = true;
                }
            }
        }
        closed
    }

    /// Adds an entry for those that were dropped since the last one.
    fn note_dropped(&self, log: &mut Log, reason: &str) {
        let count = self.shared.dropped.swap(0, Ordering::Relaxed);
        if count > 0 {
            tracing::warn!(count, reason, "audit log: entries are missing");
            let record = Record::new(Kind::Gap, self.clock.now_ms());
            log.add(Record { count, reason: reason.into(), ..record });
        }
    }

    /// Adds entries for the calls that were only counted.
    fn note_counted(&mut self, log: &mut Log) {
        let now_ms = self.clock.now_ms();
        let count = self.shared.refused.swap(0, Ordering::Relaxed);
        if count > 0 {
            log.add(Record { count, ..Record::new(Kind::Refused, now_ms) });
        }
        let refusals = self.shared.refusals.lock().take(Kind::Refused, now_ms);
        let beyond = self.beyond.take(Kind::Counted, now_ms);
        refusals.into_iter().chain(beyond).for_each(|record| log.add(record));
    }

    /// Writes, and syncs where it is time; `None` when the runtime ends.
    async fn step(&mut self, mut log: Log, sync: bool) -> Option<(Log, io::Result<()>)> {
        let run_ms = daemon::clock::millis(self.started.elapsed());
        let now = Now { wall_ms: self.clock.now_ms(), run_ms };
        let work = move || {
            let mut done = log.write(now.wall_ms);
            if sync && done.is_ok() {
                done = log.sync(now);
            }
            (log, done)
        };
        let (log, done) = spawn_blocking(work).await.ok()?;
        self.tell(&log, done.as_ref().err());
        if sync || done.is_err() {
            for waiting in self.waiting.drain(..) {
                // Who does not wait any more needs no answer.
                waiting.send(()).ok();
            }
        }
        Some((log, done))
    }

    /// Shows readers what is on the disk, and logs when that begins or ends to fail.
    fn tell(&mut self, log: &Log, error: Option<&io::Error>) {
        match (self.failing, error) {
            (false, Some(error)) => {
                tracing::error!(%error, "audit log cannot be written; calls go on");
            }
            (true, None) => tracing::info!("audit log is written again"),
            (true, Some(_)) | (false, None) => {}
        }
        self.failing = error.is_some();
        let (before, segments, head) = log.visible();
        let failing = error.map(ToString::to_string);
        *self.shared.visible.lock() = Visible {
            before: Some(before),
            segments,
            head: Some(head),
            failing,
            doubtful: log.doubtful(),
            crowded: log.crowded(),
            over: log.over(),
        };
    }
}
