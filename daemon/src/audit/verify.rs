//! Verification of a log: every line must have the next number and the hash of the line before it.

use std::{
    fmt,
    io::{self, BufRead, Read as _},
    str::FromStr,
};

use proto::id::Invalid;
use serde::Deserialize;

use super::{Hash, Kind, LINE_MAX};

/// Line of a log, by its number and hash. Who has noted one finds out whether the log still has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the line; 0 before the first.
    pub seq: u64,
    /// Hash of the line.
    pub hash: Hash,
}

impl Head {
    /// Place before the first line of a log.
    pub const START: Self = Self { seq: 0, hash: Hash::ZERO };

    /// Returns the number of the next line.
    fn next(self) -> u64 {
        self.seq.saturating_add(1)
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seq, self.hash)
    }
}

impl FromStr for Head {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new("head", "must be NUMBER:HASH, as `audit verify` prints it");
        let (seq, hash) = text.split_once(':').ok_or_else(wrong)?;
        let seq = seq.parse().map_err(|_| wrong())?;
        Ok(Self { seq, hash: hash.parse().map_err(|_| wrong())? })
    }
}

/// Mistake in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Line is no entry.
    NoEntry,
    /// Line is too long or has no end.
    Torn,
    /// Line has another number than the next one.
    Number,
    /// Line does not have the hash of the line before it: one of the two was changed.
    Link,
    /// Line that was noted before has another hash now.
    Changed,
    /// Line that was noted before is missing: the log ends before it, or begins after it.
    Missing,
    /// Lines from here on are in a file that cannot be read.
    Unreadable,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoEntry => "the line is no entry",
            Self::Torn => "the line is too long or has no end",
            Self::Number => "the line does not have the next number: lines are missing or added",
            Self::Link => {
                "the line does not follow from the one before it: one of them was changed"
            }
            Self::Changed => "the line has another hash than the one that was noted",
            Self::Missing => "the line that was noted is missing",
            Self::Unreadable => "the lines from here on are in a file that cannot be read",
        })
    }
}

/// First line that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// Its place in what was read, from 1 on; one behind the end for a missing line.
    pub line: u64,
    /// Number that an entry in this place has.
    pub seq: u64,
    /// Mistake.
    pub fault: Fault,
}

/// Result of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Number of lines that are right.
    pub entries: u64,
    /// Number of the first line; 0 without lines.
    pub first: u64,
    /// Last line that is right, or the place before the first.
    pub head: Head,
    /// Number of gap entries.
    pub gaps: u64,
    /// Sum of the missing entries that gaps have counted.
    pub lost: u64,
    /// First line that is wrong. In an export, nothing behind it is verified.
    pub broken: Option<Broken>,
}

/// Fields that a verification needs.
#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: Hash,
    kind: Kind,
    #[serde(default)]
    count: u64,
}

/// Verifies a log line by line.
#[derive(Debug)]
pub struct Verifier {
    /// Line before the next one; `None` before the first line of an export.
    last: Option<Head>,
    /// Line that was noted before, and must be there.
    wanted: Option<Head>,
    report: Report,
}

impl Verifier {
    /// Begins after a known line; `None`: with whatever the first line says. `wanted` is a line that
    /// was noted before.
    pub fn new(after: Option<Head>, wanted: Option<Head>) -> Self {
        let head = after.unwrap_or(Head::START);
        let report = Report { entries: 0, first: 0, head, gaps: 0, lost: 0, broken: None };
        let mut verifier = Self { last: after, wanted, report };
        if let Some(head) = after {
            verifier.compare(head, 0);
        }
        verifier
    }

    /// Compares a line with the one that was noted; false when it was changed since.
    fn compare(&mut self, head: Head, line: u64) -> bool {
        let Some(wanted) = self.wanted.take_if(|wanted| wanted.seq == head.seq) else {
            return true;
        };
        if wanted.hash != head.hash {
            self.fail(line, head.seq, Fault::Changed);
        }
        wanted.hash == head.hash
    }

    /// Goes on behind a mistake, with whatever the next line says.
    pub fn resume(&mut self) {
        self.last = None;
    }

    /// Notes lines that cannot be read, from this number on.
    pub fn unreadable(&mut self, seq: u64) {
        self.fail(self.report.entries + 1, seq, Fault::Unreadable);
    }

    fn fail(&mut self, line: u64, seq: u64, fault: Fault) {
        self.report.broken.get_or_insert(Broken { line, seq, fault });
    }

    /// Takes the next line without its line break; false when it is wrong.
    pub fn line(&mut self, line: &[u8]) -> bool {
        let place = self.report.entries + 1;
        let next = self.last.map_or(0, Head::next);
        let Ok(link) = serde_json::from_slice::<Link>(line) else {
            self.fail(place, next, Fault::NoEntry);
            return false;
        };
        // An export begins anywhere, and its first line says after what.
        let last = *self
            .last
            .get_or_insert_with(|| Head { seq: link.seq.saturating_sub(1), hash: link.prev });
        let fault = if link.seq != last.next() {
            Some(Fault::Number)
        } else {
            (link.prev != last.hash).then_some(Fault::Link)
        };
        if let Some(fault) = fault {
            self.fail(place, last.next(), fault);
            return false;
        }
        let mut right = true;
        if place == 1 {
            self.report.first = link.seq;
            right = self.compare(last, 0);
        }
        let head = Head { seq: link.seq, hash: Hash::of(line) };
        self.last = Some(head);
        self.report.entries = place;
        self.report.head = head;
        if link.kind == Kind::Gap {
            self.report.gaps += 1;
            self.report.lost = self.report.lost.saturating_add(link.count);
        }
        let same = self.compare(head, place);
        right && same
    }

    /// Notes a line that cannot be read as one.
    pub fn torn(&mut self) {
        let next = self.last.map_or(0, Head::next);
        self.fail(self.report.entries + 1, next, Fault::Torn);
    }

    /// Ends the verification.
    pub fn finish(mut self) -> Report {
        if let Some(wanted) = self.wanted {
            self.fail(self.report.entries + 1, wanted.seq, Fault::Missing);
        }
        self.report
    }
}

/// Reads the next line into `line`, without its line break. `None` at the end; false when it is too
/// long or has no end.
///
/// # Errors
/// When the reader fails.
pub fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    let most = LINE_MAX as u64 + 1;
    if reader.by_ref().take(most).read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    let ended = line.pop_if(|last| *last == b'\n').is_some();
    Ok(Some(ended))
}

/// Verifies an export.
///
/// # Errors
/// When the reader fails.
pub fn verify(reader: &mut impl BufRead, wanted: Option<Head>) -> io::Result<Report> {
    let mut verifier = Verifier::new(None, wanted);
    let mut line = Vec::new();
    while let Some(ended) = read_line(reader, &mut line)? {
        if !ended {
            verifier.torn();
        }
        if !ended || !verifier.line(&line) {
            break;
        }
    }
    Ok(verifier.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Chain, GAP_QUEUE, Line, Record, bounded},
        *,
    };

    fn record(number: u64) -> Record {
        let kind = if number % 5 == 4 { Kind::Gap } else { Kind::Call };
        Record {
            team: "red".into(),
            method: "StatFile".into(),
            object: bounded(&"é\"\n".repeat(100)),
            count: u64::from(kind == Kind::Gap) * 3,
            reason: if kind == Kind::Gap { GAP_QUEUE.into() } else { String::new() },
            ..Record::new(kind, 1_700_000_000_000 + number)
        }
    }

    /// Log of this many lines after a line, and its head.
    fn log(after: Head, lines: u64) -> (Vec<u8>, Head) {
        let (mut chain, mut bytes) = (Chain::after(after), Vec::new());
        (0..lines).for_each(|number| chain.add(&record(number), &mut bytes));
        (bytes, chain.head())
    }

    fn check(bytes: &[u8], wanted: Option<Head>) -> Report {
        verify(&mut &bytes[..], wanted).expect("memory is readable")
    }

    #[test]
    fn log_is_right_as_it_was_written() {
        let (bytes, head) = log(Head::START, 10);
        let report = check(&bytes, Some(head));
        assert_eq!(report.broken, None);
        assert_eq!((report.entries, report.first, report.head), (10, 1, head));
        assert_eq!((report.gaps, report.lost), (2, 6));
        let first = bytes.split(|byte| *byte == b'\n').next().expect("a line");
        assert_eq!(Line::parse(first).expect("an entry").record, record(0));
        assert_eq!(head.to_string().parse::<Head>(), Ok(head));
        assert_eq!(check(b"", None).entries, 0);
    }

    #[test]
    fn export_from_the_middle_is_verified_with_the_line_before_it() {
        let (_, before) = log(Head::START, 7);
        let (rest, head) = log(before, 3);
        let report = check(&rest, Some(before));
        assert_eq!((report.broken, report.first, report.head), (None, 8, head));
        let older = Head { seq: 3, ..before };
        let broken = check(&rest, Some(older)).broken.expect("cannot be told");
        assert_eq!(broken.fault, Fault::Missing);
    }

    proptest! {
        #[test]
        fn flipped_byte_is_found(lines in 1_u64..8, at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let (mut bytes, head) = log(Head::START, lines);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let broken = check(&bytes, Some(head)).broken;
            prop_assert!(broken.is_some(), "byte {at}");
            // Never later than in the line after the changed one.
            let line = bytes[..at].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
            prop_assert!(broken.is_some_and(|broken| broken.line <= line + 1));
        }

        #[test]
        fn moved_removed_doubled_and_inserted_lines_are_found(
            lines in 3_u64..9,
            at in any::<prop::sample::Index>(),
            how in 0..4,
        ) {
            let (bytes, head) = log(Head::START, lines);
            let mut parts: Vec<_> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
            let at = at.index(parts.len() - 1);
            let (foreign, _) = log(Head { seq: at as u64, hash: Hash::of(b"x") }, 1);
            match how {
                0 => parts.swap(at, at + 1),
                1 => drop(parts.remove(at)),
                2 => parts.insert(at, parts[at]),
                _ => parts.insert(at, &foreign),
            }
            // With the head of the export alone, and with the start of the log.
            prop_assert!(check(&parts.concat(), Some(head)).broken.is_some() || (how == 1 && at == 0));
            let mut verifier = Verifier::new(Some(Head::START), None);
            let right = parts.iter().all(|line| verifier.line(&line[..line.len() - 1]));
            prop_assert!(!right);
        }

        #[test]
        fn cut_tail_is_found_by_the_head(lines in 1_u64..8, cut in any::<prop::sample::Index>()) {
            let (bytes, head) = log(Head::START, lines);
            let cut = &bytes[..cut.index(bytes.len())];
            prop_assert!(check(cut, Some(head)).broken.is_some());
            // Half a line is found without one.
            let whole = cut.is_empty() || cut.ends_with(b"\n");
            prop_assert_eq!(check(cut, None).broken.is_none(), whole);
        }

        #[test]
        fn any_bytes_end_in_a_report(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let report = check(&bytes, None);
            prop_assert!(report.broken.is_some() || bytes.is_empty());
        }
    }

    #[test]
    fn verification_goes_on_behind_a_mistake_and_names_the_first_one() {
        let (_, before) = log(Head::START, 3);
        let (rest, head) = log(before, 4);
        let mut verifier = Verifier::new(Some(Head::START), Some(head));
        assert!(!verifier.line(b"nothing"));
        verifier.unreadable(2);
        verifier.resume();
        assert!(rest.split(|byte| *byte == b'\n').take(4).all(|line| verifier.line(line)));
        let report = verifier.finish();
        assert_eq!((report.entries, report.head), (4, head));
        let broken = report.broken.expect("broken");
        assert_eq!((broken.seq, broken.fault), (1, Fault::NoEntry));
    }

    #[test]
    fn line_without_an_end_is_read_with_a_bound() {
        let long = vec![b'x'; 3 * LINE_MAX];
        let broken = check(&long, None).broken.expect("broken");
        assert_eq!((broken.line, broken.fault), (1, Fault::Torn));
    }
}
