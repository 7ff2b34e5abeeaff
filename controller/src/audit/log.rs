//! Files of the audit log: segments of lines in a directory of their own, and `head`, the last line that
//! was removed. Blocks.
//!
//! Entries stay in memory until they are synced. After an error the file is cut back to what was synced,
//! and they are written again: a line on the disk is never half of one, and is never skipped.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::{
    audit::{Chain, GAP_RESTART, Hash, Head, Kind, LINE_MAX, Line, Record, read_line},
    replace::{Access, replace},
    text,
};

use super::{
    Options,
    retention::{self, Segment},
};

/// Wait for the process before this one to let go of the log.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_AGAIN: Duration = Duration::from_millis(50);
/// Age at which a segment ends, so that old entries can be removed by whole segments.
const SEGMENT_AGE_MS: u64 = 24 * 3600 * 1000;
/// Segments that are looked at; far more than retention leaves.
const SEGMENTS_MAX: usize = 100_000;

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

/// Number of the first line of a segment, by its file name.
fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten().filter(|first| *first > 0)
}

/// Makes the directory and locks it against other processes.
pub(super) async fn wait_for_lock(dir: &Path) -> Result<File, OpenError> {
    let wrong = |error| OpenError::Io(dir.to_owned(), error);
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(wrong)?;
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(dir.join("lock")).map_err(wrong)?;
    let locked = async {
        while lock.try_lock().is_err() {
            tokio::time::sleep(LOCK_AGAIN).await;
        }
    };
    match tokio::time::timeout(LOCK_WAIT, locked).await {
        Ok(()) => Ok(lock),
        Err(_) => Err(OpenError::Locked(dir.to_owned())),
    }
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
}

impl Log {
    /// Opens the log; cuts a torn last line. Entries about that wait to be written.
    pub(super) fn open(dir: &Path, lock: File, options: Options) -> Result<Self, OpenError> {
        Self::load(dir, lock, options).map_err(|error| OpenError::Io(dir.to_owned(), error))
    }

    fn load(dir: &Path, lock: File, options: Options) -> io::Result<Self> {
        let head = text::read_if_there(&dir.join("head"))?;
        let parsed = |text: String| text.trim().parse::<Head>().map_err(io::Error::other);
        let before: Head = head.map(parsed).transpose()?.unwrap_or(Head::START);
        let mut segments = list(dir)?;
        // What an interrupted removal has left.
        while segments.get(1).is_some_and(|next| next.first <= before.seq.saturating_add(1)) {
            fs::remove_file(segments.remove(0).path(dir))?;
        }
        for segment in &mut segments {
            look(dir, segment)?;
        }
        let mut head = before;
        // After the first line there is always a segment, unless somebody has removed it.
        let (mut clean, mut cut) = (before == Head::START || !segments.is_empty(), false);
        if let Some(last) = segments.last().copied() {
            let tail = scan(&last.path(dir))?;
            cut = tail.bytes < last.bytes;
            if cut {
                tracing::warn!(bytes = last.bytes - tail.bytes, "audit log: cut a torn last line");
                let file = File::options().write(true).open(last.path(dir))?;
                file.set_len(tail.bytes)?;
                file.sync_all()?;
            }
            clean = tail.closed;
            head = Head { seq: last.first + tail.lines - 1, hash: tail.hash };
            if tail.lines == 0 {
                let previous = segments.len().checked_sub(2).map(|at| segments[at]);
                head.hash = previous.map_or(Ok(before.hash), |one| last_hash(&one.path(dir)))?;
                // The line before decides: a segment begins after a line of its own.
                clean = previous.is_none() && before == Head::START;
            }
            if let Some(last) = segments.last_mut() {
                last.bytes = tail.bytes;
            }
        }
        let end = segments.last().map_or(0, |last| last.bytes);
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
        };
        if log.segments.is_empty() {
            log.segments.push(Segment::empty(head.seq.saturating_add(1)));
        }
        if cut || !clean {
            // The time is set when it is written.
            log.add(Record { reason: GAP_RESTART.into(), ..Record::new(Kind::Gap, 0) });
        }
        log.add(Record::new(Kind::Opened, 0));
        Ok(log)
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
            chain.add(record, &mut bytes);
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
    }

    /// Syncs what is written. Then begins a new segment and removes old ones, where it is time.
    ///
    /// # Errors
    /// When the disk fails; then everything since the last sync waits again.
    pub(super) fn sync(&mut self, now_ms: u64) -> io::Result<()> {
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
            }
            self.pending.drain(..self.written);
            self.written = 0;
            self.times = None;
        }
        self.rotate(now_ms);
        Ok(())
    }

    fn rotate(&mut self, now_ms: u64) {
        let Some(last) = self.segments.last() else { return };
        let old = last.first_ms.saturating_add(SEGMENT_AGE_MS) <= now_ms;
        if last.bytes > 0 && (last.bytes >= self.options.segment_bytes || old) {
            self.segments.push(Segment::empty(self.synced.seq.saturating_add(1)));
            self.file = None;
            self.end = 0;
        }
        let expired = retention::expired(&self.segments, now_ms, &self.options);
        if expired > 0
            && let Err(error) = self.remove(expired)
        {
            tracing::warn!(%error, "audit log: could not remove old segments");
        }
    }

    /// Removes the oldest segments; `head` says first after which line the rest begins.
    fn remove(&mut self, count: usize) -> io::Result<()> {
        let (Some(last), Some(next)) = (self.segments.get(count - 1), self.segments.get(count))
        else {
            return Ok(());
        };
        let head = Head { seq: next.first - 1, hash: last_hash(&last.path(&self.dir))? };
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

    /// Returns what readers may see: the line before the first, the segments and the last synced line.
    pub(super) fn visible(&self) -> (Head, Vec<Segment>, Head) {
        (self.before, self.segments.clone(), self.synced)
    }
}

/// Lists the segments in the order of their lines, with their sizes.
fn list(dir: &Path) -> io::Result<Vec<Segment>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)?.take(SEGMENTS_MAX) {
        let entry = entry?;
        if let Some(first) = entry.file_name().to_str().and_then(first_of) {
            found.push(Segment { bytes: entry.metadata()?.len(), ..Segment::empty(first) });
        }
    }
    found.sort_by_key(|segment| segment.first);
    Ok(found)
}

/// Reads the times of a segment's first and last line. A line that is none has the time 0.
fn look(dir: &Path, segment: &mut Segment) -> io::Result<()> {
    let path = segment.path(dir);
    let time = |line: &[u8]| Line::parse(line).map_or(0, |line| line.record.at_ms);
    let mut first = Vec::new();
    read_line(&mut BufReader::new(File::open(&path)?), &mut first)?;
    segment.first_ms = time(&first);
    segment.last_ms = time(&last_line(&path)?);
    Ok(())
}

/// Reads the last whole line of a segment, without its line break.
fn last_line(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let most = 2 * LINE_MAX as u64;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(most)))?;
    let mut tail = Vec::new();
    file.take(most).read_to_end(&mut tail)?;
    let end = tail.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    let start = tail[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok(tail[start..end].to_vec())
}

fn last_hash(path: &Path) -> io::Result<Hash> {
    Ok(Hash::of(&last_line(path)?))
}

/// End of a segment.
struct Tail {
    /// Number of its whole lines, their bytes, and the hash of the last one.
    lines: u64,
    bytes: u64,
    hash: Hash,
    /// Whether the last line says that the controller stopped in order.
    closed: bool,
}

/// Reads a segment up to its last whole line.
fn scan(path: &Path) -> io::Result<Tail> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut tail = Tail { lines: 0, bytes: 0, hash: Hash::ZERO, closed: false };
    let (mut line, mut read, mut last) = (Vec::new(), 0, Vec::new());
    while let Some(ended) = read_line(&mut reader, &mut line)? {
        read += line.len() as u64 + u64::from(ended);
        if ended {
            tail.lines += 1;
            tail.bytes = read;
            last.clone_from(&line);
        }
    }
    tail.hash = Hash::of(&last);
    tail.closed = Line::parse(&last).is_some_and(|line| line.record.kind == Kind::Closed);
    Ok(tail)
}
