//! Files of the audit log: segments of lines in a directory of their own, and `head`, the last line that
//! was removed. Blocks.
//!
//! Entries stay in memory until they are synced. After an error the file is cut back to what was synced,
//! and they are written again: a line on the disk is never half of one, and is never skipped.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::{
    audit::{Chain, GAP_RESTART, Head, Kind, Record},
    replace::{Access, replace},
    shares::may_take,
};

use super::{
    Options,
    opening::{self, Damage, Found},
    retention::{self, Segment},
    share::TeamBytes,
};
use crate::clock::{Ages, Now};

/// Wait for the process before this one to let go of the log.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_AGAIN: Duration = Duration::from_millis(50);
/// Age at which a segment ends, so that old entries can be removed by whole segments.
const SEGMENT_AGE_MS: u64 = 24 * 3600 * 1000;

/// Failure to open the log.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file or the directory cannot be used.
    #[error("cannot use the audit log in {0}")]
    Io(PathBuf, #[source] io::Error),
    /// Another process writes the log.
    #[error("another process writes the audit log in {0}")]
    Locked(PathBuf),
    /// The program ends.
    #[error("the controller is stopping")]
    Stopping,
}

/// Makes the directory and locks it against other processes.
pub(super) async fn wait_for_lock(dir: &Path) -> Result<File, OpenError> {
    let wrong = |error| OpenError::Io(dir.to_owned(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(wrong)?;
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(dir.join("lock")).map_err(wrong)?;
    self::lock(&lock).await.map_err(|_| OpenError::Locked(dir.to_owned()))?;
    Ok(lock)
}

/// Locks a file against other processes.
///
/// # Errors
/// When another process keeps it locked for 10 s.
pub(super) async fn lock(file: &File) -> io::Result<()> {
    let locked = async {
        while file.try_lock().is_err() {
            tokio::time::sleep(LOCK_AGAIN).await;
        }
    };
    let locked = tokio::time::timeout(LOCK_WAIT, locked).await;
    locked.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "another process keeps it locked"))
}

/// Log that is written to.
#[derive(Debug)]
pub(super) struct Log {
    dir: PathBuf,
    options: Options,
    /// Locked as long as this log lives.
    _lock: File,
    /// Line before the first one that is kept.
    before: Head,
    /// Segments in order; the last one is written to.
    segments: Vec<Segment>,
    /// Last segment, opened for writing.
    file: Option<File>,
    /// Last line that is written, and the bytes of its segment up to it.
    chain: Chain,
    end: u64,
    /// Last line that is synced.
    synced: Head,
    /// Entries that are not synced; the first `written` are written.
    pending: Vec<Record>,
    written: usize,
    /// Time of the oldest and the newest entry that are written and not synced.
    times: Option<(u64, u64)>,
    /// Bytes that teams have written and that are not synced.
    unsynced: BTreeMap<String, u64>,
    /// Bytes that teams have written of what is younger than the least age.
    shares: TeamBytes,
    /// Bytes that may be written before what is younger than that is more than there may be.
    free: u64,
    /// Bytes by which it is more.
    over: u64,
    /// Teams that have used up their shares.
    crowded: BTreeSet<String>,
    damage: Vec<Damage>,
    /// Verdict on the wall clock, from the first look on.
    ages: Option<Ages>,
    /// Old segments that stay because the wall clock is doubtful.
    doubtful: usize,
}

impl Log {
    /// Opens the log; cuts a torn last line. Entries about that wait to be written. Damage of older lines
    /// is told, and never keeps the log from going on.
    pub(super) fn open(dir: &Path, lock: File, options: Options) -> Result<Self, OpenError> {
        Self::load(dir, lock, options).map_err(|error| OpenError::Io(dir.to_owned(), error))
    }

    fn load(dir: &Path, lock: File, options: Options) -> io::Result<Self> {
        let Found { before, segments, head, clean, damage } = opening::survey(dir)?;
        for damage in &damage {
            tracing::error!(
                file = damage.file,
                why = damage.why,
                "audit log: damage found; the log goes on"
            );
        }
        let end = segments.last().map_or(0, |last| last.bytes);
        // Until the first look at the ages, all of it counts as young.
        let free = options.bytes_max.saturating_sub(retention::young_bytes(&segments, 0));
        let mut log = Self {
            dir: dir.to_owned(),
            options,
            _lock: lock,
            before,
            segments,
            file: None,
            chain: Chain::after(head),
            end,
            synced: head,
            pending: Vec::new(),
            written: 0,
            times: None,
            unsynced: BTreeMap::new(),
            shares: TeamBytes::default(),
            free,
            over: 0,
            crowded: BTreeSet::new(),
            damage,
            ages: None,
            doubtful: 0,
        };
        if log.segments.is_empty() {
            log.segments.push(Segment::empty(head.seq.saturating_add(1)));
        }
        if !clean {
            // The time is set when it is written.
            log.add(Record { reason: GAP_RESTART.into(), ..Record::new(Kind::Gap, 0) });
        }
        log.add(Record::new(Kind::Opened, 0));
        Ok(log)
    }

    /// Returns the damage that was found when the log was opened.
    pub(super) fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Returns whether a team has room in its share for an entry. What is of no team always has.
    pub(super) fn admits(&mut self, team: &str) -> bool {
        let has_room = self.has_room(team);
        if !has_room && self.crowded.insert(team.to_owned()) {
            tracing::warn!(team, "audit log: a team has used up its share; its calls are counted");
        }
        has_room
    }

    fn has_room(&self, team: &str) -> bool {
        let places = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        team.is_empty() || may_take(places(self.shares.of(team)), places(self.free))
    }

    /// Adds an entry to those that wait.
    pub(super) fn add(&mut self, record: Record) {
        self.pending.push(record);
    }

    /// Number of the entries that are not synced.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Number of the entries that are not written.
    pub(super) fn unwritten(&self) -> usize {
        self.pending.len() - self.written
    }

    /// Writes what waits, without waiting for the disk.
    ///
    /// # Errors
    /// When the file cannot be written; then everything since the last sync waits again.
    pub(super) fn write(&mut self, now_ms: u64) -> io::Result<()> {
        let done = self.try_write(now_ms);
        if done.is_err() {
            self.roll_back();
        }
        done
    }

    fn try_write(&mut self, now_ms: u64) -> io::Result<()> {
        if self.unwritten() == 0 {
            return Ok(());
        }
        let (mut chain, mut bytes) = (self.chain, Vec::new());
        for record in &mut self.pending[self.written..] {
            if record.at_ms == 0 {
                record.at_ms = now_ms;
            }
            let before = bytes.len();
            chain.add(record, &mut bytes);
            if !record.team.is_empty() {
                let line = (bytes.len() - before) as u64;
                *self.unsynced.entry(record.team.clone()).or_default() += line;
            }
            let first = self.times.map_or(record.at_ms, |(first, _)| first);
            self.times = Some((first, record.at_ms));
        }
        let end = self.end;
        self.file()?.write_all_at(&bytes, end)?;
        self.end += bytes.len() as u64;
        self.chain = chain;
        self.written = self.pending.len();
        Ok(())
    }

    /// Opens the last segment, cut to what was synced.
    fn file(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            let last = self.segments.last().copied().unwrap_or(Segment::empty(1));
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(last.path(&self.dir))?;
            file.set_len(last.bytes)?;
            File::open(&self.dir)?.sync_all()?;
            self.file = Some(file);
        }
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Forgets what was written and not synced: it waits again.
    fn roll_back(&mut self) {
        self.file = None;
        self.chain = Chain::after(self.synced);
        self.end = self.segments.last().map_or(0, |last| last.bytes);
        self.written = 0;
        self.times = None;
        self.unsynced.clear();
    }

    /// Syncs what is written. Then begins a new segment and removes old ones, where it is time.
    ///
    /// # Errors
    /// When the disk fails; then everything since the last sync waits again.
    pub(super) fn sync(&mut self, now: Now) -> io::Result<()> {
        if self.written > 0 {
            let done = self.file().and_then(File::sync_data);
            if let Err(error) = done {
                self.roll_back();
                return Err(error);
            }
            self.synced = self.chain.head();
            let end = self.end;
            if let (Some(last), Some((first, newest))) = (self.segments.last_mut(), self.times) {
                if last.bytes == 0 {
                    last.first_ms = first;
                }
                (last.bytes, last.last_ms) = (end, newest);
                self.shares.add(last.first, std::mem::take(&mut self.unsynced));
            }
            self.pending.drain(..self.written);
            self.written = 0;
            self.times = None;
        }
        self.rotate(now);
        Ok(())
    }

    fn rotate(&mut self, now: Now) {
        let Some(last) = self.segments.last() else { return };
        // Also where it begins far in the future: the clock was set back.
        let old = last.first_ms.abs_diff(now.wall_ms) >= SEGMENT_AGE_MS;
        if last.bytes > 0 && (last.bytes >= self.options.segment_bytes || old) {
            self.segments.push(Segment::empty(self.synced.seq.saturating_add(1)));
            self.file = None;
            self.end = 0;
        }
        let expired = self.expired(now);
        if expired > 0
            && let Err(error) = self.remove(expired)
        {
            tracing::warn!(%error, "audit log: could not remove old segments");
        }
        self.share_out(now);
    }

    /// Looks what is younger than the least age, and how much room that leaves.
    fn share_out(&mut self, now: Now) {
        // While the wall clock is doubtful, the time that has passed tells the ages.
        let now_ms = self.ages.as_ref().map_or(now.wall_ms, |ages| ages.expected_ms(now));
        let ripe = retention::ripe(&self.segments, now_ms, &self.options);
        if let Some(young) = self.segments.get(ripe) {
            self.shares.forget_before(young.first);
        }
        let young = retention::young_bytes(&self.segments, ripe);
        self.free = self.options.bytes_max.saturating_sub(young);
        self.over = young.saturating_sub(self.options.bytes_max);
        let crowded = std::mem::take(&mut self.crowded);
        self.crowded = crowded.into_iter().filter(|team| !self.has_room(team)).collect();
    }

    /// Returns how many of the oldest segments are removed. While the wall clock is doubtful, none is for its age, and
    /// the time that has passed tells which may go for their size.
    fn expired(&mut self, now: Now) -> usize {
        let ages = self.ages.get_or_insert_with(|| retention::ages(&self.segments, now));
        let by_age = retention::by_age(&self.segments, now.wall_ms, &self.options);
        let are_true = ages.are_true(now);
        let ripe = retention::ripe(&self.segments, ages.expected_ms(now), &self.options);
        let by_size = retention::by_size(&self.segments, ripe, &self.options);
        let doubtful = if are_true { 0 } else { by_age };
        if doubtful > 0 && self.doubtful == 0 {
            tracing::warn!(
                segments = doubtful,
                "audit log: the wall clock may have gone ahead; old segments stay until it has been so for a week"
            );
        }
        self.doubtful = doubtful;
        if are_true { by_age.max(by_size) } else { by_size }
    }

    /// Removes the oldest segments; `head` says first after which line the rest begins.
    fn remove(&mut self, count: usize) -> io::Result<()> {
        let (Some(last), Some(next)) = (self.segments.get(count - 1), self.segments.get(count))
        else {
            return Ok(());
        };
        let seq = next.first.saturating_sub(1);
        let hash = match self.synced.seq == seq {
            true => self.synced.hash,
            false => opening::hash_before(&self.dir, last, next)?,
        };
        let head = Head { seq, hash };
        replace(&self.dir.join("head"), format!("{head}\n").as_bytes(), Access::PRIVATE)?;
        self.before = head;
        for segment in self.segments.drain(..count) {
            tracing::info!(
                first = segment.first,
                bytes = segment.bytes,
                "audit log: old segment removed"
            );
            // One that stays is removed at the next start.
            fs::remove_file(segment.path(&self.dir))?;
        }
        Ok(())
    }

    /// Returns the teams that have used up their shares.
    pub(super) fn crowded(&self) -> Vec<String> {
        self.crowded.iter().cloned().collect()
    }

    /// Returns by how many bytes what is younger than the least age is too large.
    pub(super) fn over(&self) -> u64 {
        self.over
    }

    /// Returns how many old segments stay because the wall clock is doubtful.
    pub(super) fn doubtful(&self) -> usize {
        self.doubtful
    }

    /// Returns what readers may see: the line before the first, the segments and the last synced line.
    pub(super) fn visible(&self) -> (Head, Vec<Segment>, Head) {
        (self.before, self.segments.clone(), self.synced)
    }
}
