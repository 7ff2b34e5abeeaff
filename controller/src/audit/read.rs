//! Readers of the audit log: lists, exports, verification. A reader has a position and one page of
//! lines; it holds nothing that the writer or another reader waits for.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    path::Path,
    sync::Arc,
};

use daemon::audit::{Broken, Fault, Head, Line, Report, Verifier, read_line};
use futures_util::{Stream, stream};
use nix::errno::Errno;
use tokio::task::spawn_blocking;

use super::{Audit, Inner, Shared, Visible, opening::Damage, retention::Segment};

/// Bytes of lines in one read.
const PAGE: u64 = 128 * 1024;
/// Difference between the times of neighbouring entries: clocks are set back.
const SLACK_MS: u64 = 3600 * 1000;
/// Tries of a verification, while old segments are removed under it.
const TRIES: u32 = 3;

/// Failure to read the log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// This controller keeps no log.
    #[error("this controller keeps no audit log")]
    Off,
    /// Entries were removed while they were read.
    #[error("the oldest of these entries were removed meanwhile; try again")]
    Gone,
    /// Another verification runs.
    #[error("the audit log is being verified already; try again in a moment")]
    Busy,
    /// A file cannot be read.
    #[error("the audit log cannot be read")]
    Io(#[source] io::Error),
    /// This process or machine is short of something, which says nothing about the log.
    #[error("the controller is short of open files or memory just now; try again in a moment")]
    Short(#[source] io::Error),
    /// The program ends.
    #[error("the controller is stopping")]
    Stopping,
}

impl From<io::Error> for AuditError {
    fn from(error: io::Error) -> Self {
        let short = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EINTR, Errno::EAGAIN];
        let code = error.raw_os_error().map(Errno::from_raw);
        if code.is_some_and(|code| short.contains(&code)) {
            Self::Short(error)
        } else {
            Self::Io(error)
        }
    }
}

/// Entries that are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Team of the token or of the object; `None`: any.
    pub team: Option<String>,
    /// Id of the sandbox; `None`: any.
    pub sandbox: Option<String>,
    /// Earliest time, milliseconds since 1970.
    pub since_ms: u64,
    /// Latest time, milliseconds since 1970; `None`: no bound.
    pub until_ms: Option<u64>,
}

impl AuditFilter {
    fn fits(&self, line: &Line) -> bool {
        let record = &line.record;
        let until = self.until_ms.is_none_or(|until| record.at_ms <= until);
        let team = self.team.as_ref().is_none_or(|team| record.is_about(team));
        let sandbox = self.sandbox.as_ref().is_none_or(|id| record.sandbox == *id);
        record.at_ms >= self.since_ms && until && team && sandbox
    }

    /// Whether the times of a segment may have such an entry.
    fn may_fit(&self, segment: &Segment) -> bool {
        let late =
            self.until_ms.is_some_and(|until| segment.first_ms > until.saturating_add(SLACK_MS));
        segment.last_ms.saturating_add(SLACK_MS) >= self.since_ms && !late
    }
}

/// Query of the log.
#[derive(Debug, Clone, Default)]
pub struct AuditQuery {
    /// Entries that are asked for.
    pub filter: AuditFilter,
    /// Number of the newest of them; `None`: all.
    pub last: Option<usize>,
}

/// Position in the segments that there were when it was made.
#[derive(Debug, Clone, Default)]
struct Cursor {
    segments: VecDeque<Segment>,
    offset: u64,
}

impl Cursor {
    /// Reads the next page: whole lines of one segment. `None` at the end.
    fn page(&mut self, dir: &Path) -> Result<Option<Vec<Vec<u8>>>, AuditError> {
        while self.segments.front().is_some_and(|segment| self.offset >= segment.bytes) {
            self.segments.pop_front();
            self.offset = 0;
        }
        let Some(segment) = self.segments.front().copied() else { return Ok(None) };
        let lines = match self.lines(dir, &segment) {
            Err(AuditError::Io(error)) => {
                // The others are there; `verify` and `fsck` tell of this one.
                tracing::warn!(%error, file = segment.name(), "audit log: segment cannot be read");
                Vec::new()
            }
            lines => lines?,
        };
        if lines.is_empty() {
            // Or somebody has cut the file.
            self.offset = segment.bytes;
        }
        Ok(Some(lines))
    }

    fn lines(&mut self, dir: &Path, segment: &Segment) -> Result<Vec<Vec<u8>>, AuditError> {
        let mut file = open(&segment.path(dir))?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(file.take(segment.bytes - self.offset));
        let (mut lines, mut line, start) = (Vec::new(), Vec::new(), self.offset);
        while self.offset - start < PAGE
            && let Some(ended) = read_line(&mut reader, &mut line)?
        {
            self.offset += line.len() as u64 + u64::from(ended);
            lines.push(line.clone());
        }
        Ok(lines)
    }
}

fn open(path: &Path) -> Result<File, AuditError> {
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    File::open(path).map_err(|error| if missing(&error) { AuditError::Gone } else { error.into() })
}

/// Reads a page on a thread of its own.
async fn next_page(
    inner: &Arc<Inner>,
    mut cursor: Cursor,
) -> Result<(Cursor, Option<Vec<Vec<u8>>>), AuditError> {
    let inner = inner.clone();
    let read = spawn_blocking(move || {
        let page = cursor.page(&inner.dir)?;
        Ok((cursor, page))
    });
    read.await.map_err(|_| AuditError::Stopping)?
}

impl Audit {
    fn inner(&self) -> Result<&Arc<Inner>, AuditError> {
        self.0.as_ref().ok_or(AuditError::Off)
    }

    /// Streams the entries that a query asks for, in pages, in the order of the log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn list(
        &self,
        query: AuditQuery,
    ) -> Result<impl Stream<Item = Result<Vec<Line>, AuditError>> + Send + use<>, AuditError> {
        self.flush().await;
        let inner = self.inner()?.clone();
        let AuditQuery { filter, last } = query;
        let mut segments = inner.shared.visible.lock().segments.clone();
        segments.retain(|segment| filter.may_fit(segment));
        let mut cursor = Cursor { segments: segments.into(), offset: 0 };
        if let Some(last) = last {
            cursor = start_of_last(&inner, cursor, &filter, last).await?;
        }
        Ok(stream::try_unfold((inner, cursor), move |(inner, mut cursor)| {
            let filter = filter.clone();
            async move {
                loop {
                    let page;
                    (cursor, page) = next_page(&inner, cursor).await?;
                    let Some(lines) = page else { return Ok::<_, AuditError>(None) };
                    let lines = lines.iter().filter_map(|line| Line::parse(line));
                    let lines: Vec<_> = lines.filter(|line| filter.fits(line)).collect();
                    if !lines.is_empty() {
                        return Ok(Some((lines, (inner, cursor))));
                    }
                }
            }
        }))
    }

    /// Streams lines as they are stored, in pages: those from the first entry that is not before
    /// `since_ms` to the last one before the first that is after `until_ms`.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn export(
        &self,
        since_ms: u64,
        until_ms: Option<u64>,
    ) -> Result<impl Stream<Item = Result<Vec<u8>, AuditError>> + Send + use<>, AuditError> {
        self.flush().await;
        let inner = self.inner()?.clone();
        let mut segments: VecDeque<_> = inner.shared.visible.lock().segments.clone().into();
        let early = |segment: &Segment| segment.last_ms.saturating_add(SLACK_MS) < since_ms;
        while segments.len() > 1 && segments.front().is_some_and(early) {
            segments.pop_front();
        }
        let start = (inner, Cursor { segments, offset: 0 }, false, false);
        Ok(stream::try_unfold(start, move |(inner, mut cursor, mut begun, mut over)| async move {
            loop {
                if over {
                    return Ok(None);
                }
                let page;
                (cursor, page) = next_page(&inner, cursor).await?;
                let Some(lines) = page else { return Ok::<_, AuditError>(None) };
                let mut bytes = Vec::new();
                for line in lines {
                    // A line that is none is exported, too: whoever verifies is to find it.
                    let at_ms = Line::parse(&line).map(|line| line.record.at_ms);
                    begun |= at_ms.is_none_or(|at_ms| at_ms >= since_ms);
                    over = begun && at_ms.zip(until_ms).is_some_and(|(at, until)| at > until);
                    if over {
                        break;
                    }
                    if begun {
                        bytes.extend_from_slice(&line);
                        bytes.push(b'\n');
                    }
                }
                if !bytes.is_empty() {
                    return Ok(Some((bytes, (inner, cursor, begun, over))));
                }
            }
        }))
    }

    /// Verifies everything that is kept. `wanted` is a line that was noted before.
    ///
    /// # Errors
    /// When the log cannot be read, or another verification runs.
    pub async fn verify(&self, wanted: Option<Head>) -> Result<Report, AuditError> {
        self.verify_files(wanted).await.map(|(report, _)| report)
    }

    /// Verifies as `verify` does, and names the file with the first mistake. A segment that is wrong, or that
    /// cannot be read, does not keep the others from being verified.
    ///
    /// # Errors
    /// When another verification runs, or files are removed meanwhile.
    pub async fn verify_files(
        &self,
        wanted: Option<Head>,
    ) -> Result<(Report, Option<String>), AuditError> {
        self.flush().await;
        let inner = self.inner()?.clone();
        let turn = inner.verifying.clone().try_acquire_owned();
        let _turn = turn.map_err(|_| AuditError::Busy)?;
        let mut missing = None;
        for _ in 0..TRIES {
            let visible = inner.shared.visible.lock().clone();
            let (Some(before), Some(head)) = (visible.before, visible.head) else {
                return Err(AuditError::Stopping);
            };
            let Walked { verifier, gone, mut file } =
                walk(&inner, before, &visible, wanted).await?;
            let mut report = verifier.finish();
            if gone.is_some() && gone != missing {
                // Removed by retention, or by somebody: the next look tells.
                missing = gone;
                continue;
            }
            if let Some(first) = gone {
                report.broken = Some(Broken { line: 0, seq: first, fault: Fault::Missing });
            } else if report.broken.is_none() && report.head != head {
                let same = report.head.seq == head.seq;
                let fault = if same { Fault::Changed } else { Fault::Missing };
                report.broken = Some(Broken { line: report.entries, seq: head.seq, fault });
            }
            if report.broken.is_none()
                && let Some(aside) = inner.shared.aside()
            {
                let (seq, fault) = (aside.first, Fault::Unreadable);
                report.broken = Some(Broken { line: 0, seq, fault });
                file = Some(aside.file.clone());
            }
            inner.shared.note_verified(&report, file.as_deref());
            return Ok((report, file));
        }
        Err(AuditError::Gone)
    }
}

/// Verification of all segments.
struct Walked {
    verifier: Verifier,
    /// Number of the first line of a segment that is not there.
    gone: Option<u64>,
    /// File with the first mistake.
    file: Option<String>,
}

async fn walk(
    inner: &Arc<Inner>,
    before: Head,
    visible: &Visible,
    wanted: Option<Head>,
) -> Result<Walked, AuditError> {
    let mut walked =
        Walked { verifier: Verifier::new(Some(before), wanted), gone: None, file: None };
    for segment in visible.segments.iter().filter(|segment| segment.bytes > 0) {
        let (path, bytes, verifier) = (segment.path(&inner.dir), segment.bytes, walked.verifier);
        let read = spawn_blocking(move || verify_segment(&path, bytes, verifier));
        let (verifier, read) = read.await.map_err(|_| AuditError::Stopping)?;
        walked.verifier = verifier;
        match read {
            Ok(true) => continue,
            Ok(false) => {}
            Err(AuditError::Gone) => {
                walked.gone = Some(segment.first);
                walked.verifier = Verifier::new(Some(before), None);
                return Ok(walked);
            }
            // That is no verdict on the log.
            Err(AuditError::Short(error)) => return Err(AuditError::Short(error)),
            Err(error) => {
                tracing::error!(%error, file = segment.name(), "audit log: segment cannot be read");
                walked.verifier.unreadable(segment.first);
            }
        }
        walked.file.get_or_insert_with(|| segment.name());
        walked.verifier.resume();
    }
    Ok(walked)
}

impl Shared {
    /// Returns a file whose lines are not in the log any more.
    fn aside(&self) -> Option<&Damage> {
        self.damage.get()?.iter().find(|damage| damage.aside)
    }

    /// Keeps what a verification has found for `fsck`, until one finds nothing.
    fn note_verified(&self, report: &Report, file: Option<&str>) {
        let found = report.broken.map(|broken| {
            let file = file.unwrap_or("the log");
            (broken.fault, format!("{file}: entry {} is wrong: {}", broken.seq, broken.fault))
        });
        match found {
            None => *self.broken.lock() = None,
            // These may come of a line that was noted wrongly.
            Some((Fault::Changed | Fault::Missing, _)) => {}
            Some((_, text)) => *self.broken.lock() = Some(text),
        }
    }
}

fn verify_segment(
    path: &Path,
    bytes: u64,
    mut verifier: Verifier,
) -> (Verifier, Result<bool, AuditError>) {
    let read = open(path).and_then(|file| verify_lines(file, bytes, &mut verifier));
    (verifier, read)
}

fn verify_lines(file: File, bytes: u64, verifier: &mut Verifier) -> Result<bool, AuditError> {
    let mut reader = BufReader::new(file.take(bytes));
    let mut line = Vec::new();
    while let Some(ended) = read_line(&mut reader, &mut line)? {
        if !ended {
            verifier.torn();
        }
        if !ended || !verifier.line(&line) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Finds the position of the newest entries that fit: segments are read from the newest on.
async fn start_of_last(
    inner: &Arc<Inner>,
    all: Cursor,
    filter: &AuditFilter,
    last: usize,
) -> Result<Cursor, AuditError> {
    let mut left = last;
    for at in (0..all.segments.len()).rev() {
        if left == 0 {
            break;
        }
        let mut cursor =
            Cursor { segments: all.segments.range(at..=at).copied().collect(), offset: 0 };
        let mut offsets = VecDeque::new();
        loop {
            let (mut offset, page) = (cursor.offset, next_page(inner, cursor).await?);
            let (next, Some(lines)) = page else { break };
            cursor = next;
            for line in lines {
                if Line::parse(&line).is_some_and(|line| filter.fits(&line)) {
                    offsets.push_back(offset);
                    if offsets.len() > left {
                        offsets.pop_front();
                    }
                }
                offset += line.len() as u64 + 1;
            }
        }
        if offsets.len() >= left {
            let segments = all.segments.range(at..).copied().collect();
            return Ok(Cursor { segments, offset: offsets.front().copied().unwrap_or(0) });
        }
        left -= offsets.len();
    }
    if last == 0 { Ok(Cursor::default()) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_with_a_file_is_held_against_it() {
        let is_short = |error| matches!(AuditError::from(error), AuditError::Short(_));
        let of = |code: Errno| is_short(io::Error::from_raw_os_error(code as i32));
        for short in [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM] {
            assert!(of(short), "{short}");
        }
        for wrong in [Errno::EACCES, Errno::EIO, Errno::EISDIR, Errno::ELOOP, Errno::ENOTDIR] {
            assert!(!of(wrong), "{wrong}");
        }
        assert!(!is_short(io::Error::other("no text")));
    }
}
