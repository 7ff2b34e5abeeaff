//! Positions in a command's streams, to continue after a broken connection: repeated output is
//! dropped, and stdin that was not accepted is sent again. Pure; for either end.

use std::collections::VecDeque;

use bytes::Bytes;

/// Most bytes of stdin that are kept until they are known to be accepted. More than a connection
/// has in transit.
pub const STDIN_KEPT_MAX: usize = 4 * 1024 * 1024;

/// Receive position in stdout or stderr of a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// Number of bytes received.
    bytes: u64,
    /// Number of bytes that will be repeated and must be dropped.
    again: u64,
}

impl Received {
    /// Returns the position in the output, in bytes from its beginning.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Starts at `offset`, whatever was received before.
    pub fn begin(&mut self, offset: u64) {
        *self = Self { bytes: offset, again: 0 };
    }

    /// Continues with data from `offset` on. Returns false when data in between is missing.
    #[must_use]
    pub fn resume(&mut self, offset: u64) -> bool {
        self.again = self.bytes.saturating_sub(offset);
        offset <= self.bytes
    }

    /// Returns the new part of `bytes`; `None` when all of them are a repetition.
    pub fn fresh(&mut self, mut bytes: Bytes) -> Option<Bytes> {
        let again = usize::try_from(self.again).unwrap_or(usize::MAX).min(bytes.len());
        if again > 0 {
            self.again -= again as u64;
            drop(bytes.split_to(again));
            if bytes.is_empty() {
                return None;
            }
        }
        self.bytes += bytes.len() as u64;
        Some(bytes)
    }
}

/// Most recent part of a command's stdin, to be sent again when a connection breaks.
#[derive(Debug, Default)]
pub struct Sent {
    /// Offset behind the last byte.
    end: u64,
    kept: VecDeque<Bytes>,
    bytes: usize,
    /// Whether stdin has ended.
    pub eof: bool,
}

impl Sent {
    /// Starts at `offset`.
    pub fn begin(&mut self, offset: u64) {
        (self.end, self.bytes) = (offset, 0);
        self.kept.clear();
    }

    /// Keeps bytes that are sent next. Beyond [`STDIN_KEPT_MAX`] the oldest bytes are dropped.
    pub fn keep(&mut self, bytes: Bytes) {
        self.end += bytes.len() as u64;
        self.bytes += bytes.len();
        self.kept.push_back(bytes);
        while self.bytes > STDIN_KEPT_MAX
            && let Some(oldest) = self.kept.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }

    /// Returns all bytes from `offset` on, which is the amount that the command has accepted;
    /// `None` when some of them are no longer kept.
    pub fn from(&mut self, offset: u64) -> Option<Vec<Bytes>> {
        if offset > self.end {
            // Another caller, or an earlier run of ours, wrote more: continue behind that.
            self.begin(offset);
        }
        let missing = usize::try_from(self.end - offset).unwrap_or(usize::MAX);
        let mut taken = self.bytes.checked_sub(missing)?;
        while let Some(first) = self.kept.front_mut()
            && taken > 0
        {
            let part = taken.min(first.len());
            drop(first.split_to(part));
            taken -= part;
            self.bytes -= part;
            if first.is_empty() {
                self.kept.pop_front();
            }
        }
        Some(self.kept.iter().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stdin_is_resent_from_the_accepted_offset() {
        let mut sent = Sent::default();
        sent.begin(100);
        sent.keep(Bytes::from_static(b"hello "));
        sent.keep(Bytes::from_static(b"world"));
        assert_eq!(sent.from(103).expect("kept").concat(), b"lo world");
        assert_eq!(sent.from(106).expect("kept").concat(), b"world");
        assert_eq!(sent.from(111), Some(Vec::new()));
        assert_eq!(sent.from(110), None, "it had said that it took that one");
        assert_eq!(sent.from(120), Some(Vec::new()), "another caller wrote");
        sent.keep(Bytes::from_static(b"x"));
        assert_eq!(sent.from(120).expect("kept").concat(), b"x");
        for _ in 0..100 {
            sent.keep(Bytes::from(vec![0; 256 * 1024]));
        }
        assert!(sent.bytes <= STDIN_KEPT_MAX && sent.from(121).is_none());
    }

    #[test]
    fn repeated_output_is_dropped() {
        let mut output = Received::default();
        output.begin(10);
        assert!(output.resume(7));
        assert_eq!(output.fresh(Bytes::from_static(b"ab")), None);
        assert_eq!(output.fresh(Bytes::from_static(b"cde")).as_deref(), Some(&b"de"[..]));
        assert_eq!(output.fresh(Bytes::from_static(b"f")).as_deref(), Some(&b"f"[..]));
        assert_eq!(output.bytes(), 13);
        assert!(!output.resume(14), "something is missing");
        assert!(output.resume(13));
        assert_eq!(output.fresh(Bytes::new()).as_deref(), Some(&b""[..]), "a sign of life");
    }

    proptest! {
        /// Each byte arrives once and in order, however often and wherever the connection breaks.
        #[test]
        fn no_output_byte_is_lost_or_duplicated(
            whole in prop::collection::vec(any::<u8>(), 0..300),
            breaks in prop::collection::vec((0..300_usize, 1..50_usize, 0..50_u64), 0..8),
        ) {
            let mut output = Received::default();
            let mut got = Vec::new();
            let mut from = 0_usize;
            for (length, chunk, back) in breaks.into_iter().chain([(usize::MAX, 7, 0)]) {
                prop_assert!(output.resume(from as u64));
                let to = from.saturating_add(length).min(whole.len());
                for bytes in whole[from..to].chunks(chunk) {
                    got.extend(output.fresh(Bytes::copy_from_slice(bytes)).unwrap_or_default());
                }
                from = usize::try_from(output.bytes().saturating_sub(back)).expect("small");
            }
            prop_assert_eq!(got, whole);
        }
    }
}
