//! Random numbers from one seed: SplitMix64.

use std::sync::atomic::{AtomicU64, Ordering};

/// A stream of random numbers; streams of one seed with different `stream` are independent.
#[derive(Debug)]
pub(crate) struct Chance(AtomicU64);

impl Chance {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        Self(AtomicU64::new(seed ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    pub(crate) fn next(&self) -> u64 {
        let mut z = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 to `end`, exclusive.
    pub(crate) fn below(&self, end: u64) -> u64 {
        self.next() % end
    }

    /// Returns true in `share` percent of the calls.
    pub(crate) fn percent(&self, share: u64) -> bool {
        self.below(100) < share
    }

    pub(crate) fn pick<'a, T>(&self, list: &'a [T]) -> Option<&'a T> {
        let length = u64::try_from(list.len()).expect("a length");
        (length > 0).then(|| &list[usize::try_from(self.below(length)).expect("an index")])
    }
}

impl controller::clock::Random for Chance {
    fn fill(&self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.next().to_le_bytes()[0];
        }
    }
}
