//! Positions in a command's streams, to continue after a broken connection: repeated output is
//! dropped, and stdin that was not accepted is sent again. Pure; for either end.

use std::collections::VecDeque;

use bytes::Bytes;

/// Most bytes of stdin that are kept until they are known to be accepted. More than a connection
/// has in transit.
pub const STDIN_KEPT_MAX: usize = 4 * 1024 * 1024;
/// Size of the pieces in which they are kept.
const PIECE: usize = 16 * 1024;

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
///
/// Its bytes are copies: a part of a message that was received would hold all of that message, and many small parts
/// would cost far more than their bytes.
#[derive(Debug, Default)]
pub struct Sent {
    /// Offset behind the last byte.
    end: u64,
    /// Whole pieces, the oldest first.
    whole: VecDeque<Bytes>,
    /// Bytes behind them, fewer than a piece.
    last: Vec<u8>,
    /// Whether stdin has ended.
    pub eof: bool,
}

impl Sent {
    /// Starts at `offset`.
    pub fn begin(&mut self, offset: u64) {
        self.end = offset;
        self.keep_at_most(0);
    }

    /// Keeps bytes that are sent next. Beyond [`STDIN_KEPT_MAX`] the oldest bytes are dropped.
    pub fn keep(&mut self, mut bytes: &[u8]) {
        self.end += bytes.len() as u64;
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(PIECE - self.last.len()));
            self.last.extend_from_slice(part);
            if self.last.len() == PIECE {
                // Without room to grow, so that it takes as much memory as it has bytes.
                self.whole.push_back(std::mem::take(&mut self.last).into_boxed_slice().into());
            }
            bytes = rest;
        }
        self.keep_at_most(STDIN_KEPT_MAX);
    }

    /// Returns the bytes of memory that are used for what is kept.
    pub fn memory(&self) -> usize {
        self.whole.len() * PIECE + self.last.capacity()
    }

    /// Drops the oldest bytes until what is kept uses at most `max` bytes of memory.
    pub fn keep_at_most(&mut self, max: usize) {
        while self.memory() > max {
            if self.whole.pop_front().is_none() {
                self.last = Vec::new();
            }
        }
    }

    /// Drops bytes before `offset`, which is the amount that the command has accepted.
    pub fn accepted(&mut self, offset: u64) {
        let missing = self.missing(offset);
        while !self.whole.is_empty() && self.kept() - PIECE >= missing {
            self.whole.pop_front();
        }
        if missing == 0 {
            self.last = Vec::new();
        }
    }

    /// Returns all bytes from `offset` on, which is the amount that the command has accepted;
    /// `None` when some of them are no longer kept.
    pub fn from(&mut self, offset: u64) -> Option<Vec<Bytes>> {
        if offset > self.end {
            // Another caller, or an earlier run of ours, wrote more: continue behind that.
            self.begin(offset);
        }
        self.accepted(offset);
        let mut known = self.kept().checked_sub(self.missing(offset))?;
        let last = Bytes::copy_from_slice(&self.last);
        let rest = self.whole.iter().cloned().chain([last]).map(|mut piece| {
            let part = known.min(piece.len());
            known -= part;
            piece.split_off(part)
        });
        Some(rest.filter(|piece| !piece.is_empty()).collect())
    }

    fn kept(&self) -> usize {
        self.whole.len() * PIECE + self.last.len()
    }

    /// Returns the number of bytes from `offset` to the end.
    fn missing(&self, offset: u64) -> usize {
        usize::try_from(self.end.saturating_sub(offset)).unwrap_or(usize::MAX)
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
        sent.keep(b"hello ");
        sent.keep(b"world");
        assert_eq!(sent.from(103).expect("kept").concat(), b"lo world");
        assert_eq!(sent.from(106).expect("kept").concat(), b"world");
        assert_eq!(sent.from(111), Some(Vec::new()));
        assert_eq!(sent.from(110), None, "it had said that it took that one");
        assert_eq!(sent.from(120), Some(Vec::new()), "another caller wrote");
        sent.keep(b"x");
        assert_eq!(sent.from(120).expect("kept").concat(), b"x");
        for _ in 0..100 {
            sent.keep(&[0; 256 * 1024]);
        }
        assert!(sent.memory() <= STDIN_KEPT_MAX && sent.from(121).is_none());
    }

    #[test]
    fn small_and_empty_pieces_of_stdin_cost_no_more_than_their_bytes() {
        let mut sent = Sent::default();
        for _ in 0..1_000_000 {
            sent.keep(b"");
        }
        assert_eq!((sent.whole.len(), sent.memory()), (0, 0));
        for byte in (0..=255).cycle().take(1_000_000) {
            sent.keep(&[byte]);
        }
        assert_eq!(sent.whole.len(), 1_000_000 / PIECE);
        assert!(sent.memory() <= 1_000_000 + PIECE, "{}", sent.memory());
        let all = sent.from(0).expect("all of it is kept").concat();
        assert!(all.iter().copied().eq((0..=255).cycle().take(1_000_000)));
    }

    #[test]
    fn accepted_stdin_takes_no_memory() {
        let mut sent = Sent::default();
        sent.keep(&[7; 3 * PIECE + 5]);
        sent.accepted(PIECE as u64 + 1);
        assert_eq!(sent.whole.len(), 2, "one of them was accepted in part");
        assert_eq!(sent.from(PIECE as u64 + 1).expect("kept").concat(), [7; 2 * PIECE + 4]);
        sent.accepted(3 * PIECE as u64 + 5);
        assert_eq!((sent.memory(), sent.from(3 * PIECE as u64 + 5)), (0, Some(Vec::new())));
        assert_eq!(sent.from(3 * PIECE as u64 + 4), None, "it was accepted");
        sent.keep(b"next");
        assert_eq!(sent.from(3 * PIECE as u64 + 5).expect("kept").concat(), b"next");
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
        /// Compares with all of stdin: whatever is still kept is what was sent.
        #[test]
        fn kept_stdin_is_the_end_of_what_was_sent(
            steps in prop::collection::vec(
                (0..3 * PIECE, any::<u8>(), 0..4 * PIECE, 0..6 * PIECE),
                1..12,
            ),
        ) {
            let (mut sent, mut all) = (Sent::default(), Vec::new());
            for (length, byte, back, max) in steps {
                let bytes = vec![byte; length];
                sent.keep(&bytes);
                all.extend(bytes);
                sent.keep_at_most(max);
                prop_assert!(sent.memory() <= max);
                let offset = all.len().saturating_sub(back);
                let kept = sent.kept();
                match sent.from(offset as u64) {
                    Some(rest) => prop_assert!(rest.concat() == all[offset..]),
                    None => prop_assert!(kept < all.len() - offset),
                }
            }
        }

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
