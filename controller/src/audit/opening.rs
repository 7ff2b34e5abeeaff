//! Survey of the files that an earlier controller has left. Blocks.
//!
//! A log goes on whatever has become of its older lines: what cannot be read, or does not fit, is damage
//! that is told, and stays where it is. Of the newest segment, a torn last line is what a crash leaves, and
//! is cut. A newest segment that cannot be read is set aside, and the log goes on from the line before it.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
    path::Path,
    time::UNIX_EPOCH,
};

use daemon::{
    audit::{Hash, Head, Kind, LINE_MAX, Line, read_line},
    text,
};

use nix::errno::Errno;

use super::retention::Segment;

/// Segments that are looked at; far more than retention leaves.
const SEGMENTS_MAX: usize = 100_000;
/// Damaged files that are told.
const DAMAGE_MAX: usize = 16;
/// Files with one name that are set aside at most.
const ASIDE_MAX: u32 = 100;
/// End of the name of a file that is set aside.
const ASIDE: &str = "damaged";

/// File of the log that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Damage {
    /// Name of the file.
    pub(super) file: String,
    /// Number of the first line that it has, or had; 0 for `head`.
    pub(super) first: u64,
    /// Sentence about it.
    pub(super) why: String,
    /// Whether the lines are not in the log any more.
    pub(super) aside: bool,
}

/// Log as it was found.
pub(super) struct Found {
    /// Line before the first one that is kept.
    pub(super) before: Head,
    pub(super) segments: Vec<Segment>,
    /// Last line.
    pub(super) head: Head,
    /// Whether the log ends as a controller leaves it that stops in order.
    pub(super) clean: bool,
    pub(super) damage: Vec<Damage>,
}

/// Number of the first line of a segment, by its file name.
fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten().filter(|first| *first > 0)
}

/// Survey that is under way.
struct Survey<'a> {
    dir: &'a Path,
    damage: Vec<Damage>,
}

/// Looks at the files of a log.
///
/// # Errors
/// When the directory cannot be read, or the newest segment neither be written nor be set aside.
pub(super) fn survey(dir: &Path) -> io::Result<Found> {
    let mut survey = Survey { dir, damage: Vec::new() };
    let mut segments = survey.list()?;
    let before = survey.before(&mut segments);
    for at in 0..segments.len() {
        let next = segments.get(at + 1).copied();
        survey.look(&mut segments[at], next);
    }
    let (head, clean) = survey.end(before, &mut segments)?;
    Ok(Found { before, segments, head, clean, damage: survey.damage })
}

impl Survey<'_> {
    fn tell(&mut self, file: String, first: u64, why: impl ToString) {
        if self.damage.len() < DAMAGE_MAX {
            self.damage.push(Damage { file, first, why: why.to_string(), aside: false });
        }
    }

    fn tell_of(&mut self, segment: &Segment, why: impl ToString) {
        self.tell(segment.name(), segment.first, why);
    }

    /// Lists the segments in the order of their lines, with their sizes.
    fn list(&mut self) -> io::Result<Vec<Segment>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.dir)?.take(SEGMENTS_MAX) {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(first) = first_of(name) {
                // One that is no file cannot be read, and has something to tell.
                let about = entry.metadata();
                let bytes = about.map_or(1, |about| about.len().max(u64::from(!about.is_file())));
                found.push(Segment { bytes, ..Segment::empty(first) });
            } else if let Some((segment, _)) = name.split_once(&format!(".{ASIDE}"))
                && let Some(first) = first_of(segment)
            {
                self.tell(name.to_owned(), first, "it could not be read, and was set aside");
                if let Some(damage) = self.damage.last_mut() {
                    damage.aside = true;
                }
            }
        }
        found.sort_by_key(|segment| segment.first);
        Ok(found)
    }

    /// Finds the line before the first one that is kept, and removes what an interrupted removal has left.
    fn before(&mut self, segments: &mut Vec<Segment>) -> Head {
        let stored = text::read_if_there(&self.dir.join("head"));
        let stored = stored.and_then(|text| match text {
            Some(text) => text.trim().parse::<Head>().map_err(io::Error::other),
            None => Ok(Head::START),
        });
        let first = segments.first().map_or(0, |segment| segment.first);
        let wrong = match stored {
            Ok(stored) => {
                let next = stored.seq.saturating_add(1);
                if let Some(at) = segments.iter().position(|segment| segment.first == next) {
                    for segment in segments.drain(..at) {
                        if let Err(error) = fs::remove_file(segment.path(self.dir)) {
                            tracing::warn!(%error, file = segment.name(), "audit log: old segment stays");
                        }
                    }
                    return stored;
                }
                if segments.is_empty() {
                    return stored;
                }
                // Nothing is removed by a text that does not fit.
                format!(
                    "it says that line {next} is the first, and there are others from {first} on"
                )
            }
            Err(error) => format!("it cannot be read: {error}"),
        };
        self.tell("head".into(), 0, wrong);
        let line = segments.first().and_then(|segment| first_line(&segment.path(self.dir)).ok());
        let line = line.and_then(|line| Line::parse(&line)).filter(|line| line.seq == first);
        line.map_or(Head { seq: first.saturating_sub(1), hash: Hash::ZERO }, |line| Head {
            seq: first.saturating_sub(1),
            hash: line.prev,
        })
    }

    /// Reads the first and the last line of a segment: its times, and whether it fits to the next one.
    fn look(&mut self, segment: &mut Segment, next: Option<Segment>) {
        let path = segment.path(self.dir);
        let lines = first_line(&path).and_then(|first| Ok((first, last_line(&path)?)));
        // Until then it is kept for its age.
        let changed_ms = fs::metadata(&path).and_then(|about| about.modified()).ok();
        let changed_ms = changed_ms.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let changed_ms = changed_ms.map_or(0, daemon::clock::millis);
        (segment.first_ms, segment.last_ms) = (changed_ms, changed_ms);
        let (first, last) = match lines {
            Ok(lines) => lines,
            Err(error) => {
                // The newest one is looked at again.
                if next.is_some() {
                    self.tell_of(segment, format!("it cannot be read: {error}"));
                }
                return;
            }
        };
        let parsed = (Line::parse(&first), Line::parse(&last.line));
        if let (Some(first), Some(last)) = &parsed {
            (segment.first_ms, segment.last_ms) = (first.record.at_ms, last.record.at_ms);
        }
        let Some(next) = next else { return };
        let follows = || {
            let line = first_line(&next.path(self.dir)).ok()?;
            // An empty one, or one that is damaged itself, says nothing about this.
            Some(Line::parse(&line)?.prev == Hash::of(&last.line))
        };
        let why = match parsed {
            (Some(first), _) if first.seq != segment.first => "its first line has another number",
            (None, _) => "its first line is no entry",
            (_, None) => "its last line is no entry",
            _ if !last.ended => "its last line has no end",
            (_, Some(last)) if last.seq.saturating_add(1) != next.first => {
                "its last line does not have the number before the next segment's"
            }
            _ if follows() == Some(false) => "the next segment does not follow from its last line",
            _ => return,
        };
        self.tell_of(segment, why);
    }

    /// Finds the last line, and whether the log was closed; leaves a newest segment that can be written to.
    fn end(&mut self, before: Head, segments: &mut Vec<Segment>) -> io::Result<(Head, bool)> {
        // After the first line there is always a segment, unless somebody has removed it.
        let Some((last, earlier)) = segments.split_last() else {
            return Ok((before, before == Head::START));
        };
        let (last, path, first) = (*last, last.path(self.dir), earlier.is_empty());
        let start = Head {
            seq: last.first.saturating_sub(1),
            hash: earlier.last().map_or(before.hash, |previous| {
                hash_before(self.dir, previous, &last).unwrap_or(Hash::ZERO)
            }),
        };
        let tail = match scan(&path) {
            Ok(tail) => tail,
            // These say nothing about the file: who may read it, or may read more files, finds it whole.
            Err(error) if is_of_the_reader(&error) => return Err(error),
            Err(error) => {
                self.set_aside(&last, &format!("it cannot be read: {error}"))?;
                segments.pop();
                segments.push(Segment::empty(last.first));
                return Ok((start, false));
            }
        };
        let rest = last.bytes.saturating_sub(tail.bytes);
        let (head, closed) = match tail.lines {
            // The line before decides: a segment begins after a line of its own.
            0 => (start, first && before == Head::START),
            lines => (Head { seq: start.seq.saturating_add(lines), hash: tail.hash }, tail.closed),
        };
        if rest > LINE_MAX as u64 {
            let why = format!("the {rest} bytes behind its last whole line are no torn line");
            if tail.lines == 0 {
                self.set_aside(&last, &why)?;
                segments.pop();
            } else {
                self.tell_of(&last, why);
            }
            segments.push(Segment::empty(head.seq.saturating_add(1)));
            return Ok((head, false));
        }
        if rest > 0 {
            tracing::warn!(bytes = rest, "audit log: cut a torn last line");
            let file = File::options().write(true).open(&path)?;
            file.set_len(tail.bytes)?;
            file.sync_all()?;
        }
        if let Some(last) = segments.last_mut() {
            last.bytes = tail.bytes;
        }
        Ok((head, closed && rest == 0))
    }

    /// Renames the newest segment, so that another takes its place.
    fn set_aside(&mut self, segment: &Segment, why: &str) -> io::Result<()> {
        let names = (0..ASIDE_MAX).map(|number| match number {
            0 => format!("{}.{ASIDE}", segment.name()),
            number => format!("{}.{ASIDE}.{number}", segment.name()),
        });
        let is_free = |name: &String| fs::symlink_metadata(self.dir.join(name)).is_err();
        let name = names.into_iter().find(is_free).ok_or(io::ErrorKind::AlreadyExists)?;
        fs::rename(segment.path(self.dir), self.dir.join(&name))?;
        File::open(self.dir)?.sync_all()?;
        self.tell(name, segment.first, format!("{why}; it was set aside"));
        if let Some(damage) = self.damage.last_mut() {
            damage.aside = true;
        }
        Ok(())
    }
}

/// Returns the hash of the line before a segment: that of the last line of the segment before it, or else
/// what its own first line says.
///
/// # Errors
/// When neither can be read.
pub(super) fn hash_before(dir: &Path, previous: &Segment, segment: &Segment) -> io::Result<Hash> {
    let last = last_line(&previous.path(dir));
    if let Ok(last) = &last
        && Line::parse(&last.line).is_some_and(|line| line.seq.saturating_add(1) == segment.first)
    {
        return Ok(Hash::of(&last.line));
    }
    let first = first_line(&segment.path(dir)).ok().and_then(|line| Line::parse(&line));
    first.map_or_else(|| Ok(Hash::of(&last?.line)), |first| Ok(first.prev))
}

/// True for errors of whoever reads, which are gone with their cause.
fn is_of_the_reader(error: &io::Error) -> bool {
    let errnos = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EACCES, Errno::EPERM];
    error.raw_os_error().is_some_and(|code| errnos.contains(&Errno::from_raw(code)))
}

fn first_line(path: &Path) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    read_line(&mut BufReader::new(File::open(path)?), &mut line)?;
    Ok(line)
}

/// Last whole line of a segment, without its line break.
struct LastLine {
    line: Vec<u8>,
    /// Whether nothing is behind it.
    ended: bool,
}

fn last_line(path: &Path) -> io::Result<LastLine> {
    let mut file = File::open(path)?;
    let most = 2 * LINE_MAX as u64;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(most)))?;
    let mut tail = Vec::new();
    file.take(most).read_to_end(&mut tail)?;
    let ended = tail.last().is_none_or(|byte| *byte == b'\n');
    let end = tail.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    let start = tail[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok(LastLine { line: tail[start..end].to_vec(), ended })
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
