//! Entries of the audit log, and the chain that numbers and links them.

use serde::{Deserialize, Serialize};

use super::{Hash, Head};

/// Longest line, bytes. Every field is bounded, so that no entry comes near it.
pub const LINE_MAX: usize = 8 * 1024;
/// Longest text of a caller in an entry, bytes.
const TEXT_MAX: usize = 128;

/// Reason of a gap: entries came faster than they could be written.
pub const GAP_QUEUE: &str = "QUEUE_FULL";
/// Reason of a gap: the controller ended without closing the log, and what it had not written is lost.
pub const GAP_RESTART: &str = "RESTART";
/// Reason of a gap: the log could not be written.
pub const GAP_IO: &str = "IO_ERROR";

/// Kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Call that has ended.
    Call,
    /// Stream that has begun; its end is a `Call` with the same number.
    Begun,
    /// Entries are missing here; the reason says why.
    Gap,
    /// Controller began to write.
    Opened,
    /// Controller stopped in order.
    Closed,
    /// Calls that were refused and only counted: before the caller was known, or again and again for the
    /// same token, method and reason.
    Refused,
    /// One of the sandboxes of a call that changes many; joined with its `Call` by the number.
    Part,
    /// Calls that were only counted because their team had used up its share of the log.
    Counted,
    /// Kind of a later version.
    #[serde(other)]
    Later,
}

/// Entry before it has its place in the chain. Empty fields are left out of the line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Time of the entry, milliseconds since 1970.
    pub at_ms: u64,
    /// Kind of the entry.
    pub kind: Kind,
    /// Number of the call since the log was opened.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub call: u64,
    /// Name of the called method.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// Team of the token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub team: String,
    /// Public id of the token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    /// User label of the token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Address of the peer, `address:port`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub peer: String,
    /// Id of the sandbox of the call.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Other object that the request names, such as `node:pve1`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub object: String,
    /// Team of the object, where it is not the token's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub owner: String,
    /// `request_id` of a creation.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// Name of the gRPC code.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub code: String,
    /// Reason of an error or of a gap.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Duration of the call, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Number of missing entries of a gap, or of calls that were only counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub count: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Record {
    /// Creates an entry without fields.
    pub fn new(kind: Kind, at_ms: u64) -> Self {
        Self {
            at_ms,
            kind,
            call: 0,
            method: String::new(),
            team: String::new(),
            token: String::new(),
            user: String::new(),
            peer: String::new(),
            sandbox: String::new(),
            object: String::new(),
            owner: String::new(),
            request_id: String::new(),
            code: String::new(),
            reason: String::new(),
            duration_ms: None,
            count: 0,
        }
    }

    /// Whether the entry is about this team: a call of its tokens, or of others on what it owns.
    pub fn is_about(&self, team: &str) -> bool {
        self.team == team || self.owner == team
    }
}

/// Cuts a text of a caller to what an entry holds. Control characters become `?`: JSON needs six bytes for one, and a
/// terminal may obey it.
pub fn bounded(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(TEXT_MAX)];
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Entry as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Number of the line in the log, from 1 on.
    pub seq: u64,
    /// Hash of the line before it.
    pub prev: Hash,
    /// Entry.
    #[serde(flatten)]
    pub record: Record,
}

impl Line {
    /// Parses a line without its line break; `None` when it is none.
    pub fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok()
    }
}

/// End of a log, to which lines are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain(Head);

impl Chain {
    /// Continues after a line.
    pub fn after(head: Head) -> Self {
        Self(head)
    }

    /// Returns the last line: its number and hash.
    pub fn head(&self) -> Head {
        self.0
    }

    /// Adds an entry; appends its line, with the line break, to `out`.
    pub fn add(&mut self, record: &Record, out: &mut Vec<u8>) {
        let Head { seq, hash } = self.0;
        let line = Line { seq: seq + 1, prev: hash, record: record.clone() };
        let start = out.len();
        serde_json::to_writer(&mut *out, &line).expect("texts and numbers are JSON");
        self.0 = Head { seq: line.seq, hash: Hash::of(&out[start..]) };
        out.push(b'\n');
    }
}

/// Names of the gRPC codes, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Returns the name of a gRPC code.
pub fn code_name(number: i32) -> &'static str {
    let known = usize::try_from(number).ok().and_then(|number| CODES.get(number));
    known.copied().unwrap_or("UNKNOWN")
}

/// Returns the number of a gRPC code; 2, which is UNKNOWN, for another text.
pub fn code_number(name: &str) -> i32 {
    let known = CODES.iter().position(|code| *code == name);
    known.and_then(|number| i32::try_from(number).ok()).unwrap_or(2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_of_a_caller_are_not_written() {
        assert_eq!(bounded("a\u{1b}[2J\r\n\u{85}b"), "a?[2J???b");
        assert_eq!(bounded("tür-1"), "tür-1");
        assert_eq!(bounded(&"\0".repeat(1000)), "?".repeat(TEXT_MAX));
    }

    proptest! {
        #[test]
        fn text_of_a_caller_takes_few_bytes_in_a_line(text in any::<String>()) {
            let bounded = bounded(&text);
            prop_assert!(bounded.len() <= TEXT_MAX);
            // Quotes and backslashes take two bytes.
            let json = serde_json::to_string(&bounded).expect("a text is JSON");
            prop_assert!(json.len() <= 2 * TEXT_MAX + 2, "{}", json.len());
        }
    }
}
