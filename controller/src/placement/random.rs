//! Randomness of decisions: small, fast, and the same for the same seed.

/// SplitMix64 (Steele, Lea and Flood 2014). Not for secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Creates a generator with this seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number below `n`, by multiplication: the bias is below 2^-32 for any `n`.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is below n")]
    pub const fn below(&mut self, n: u32) -> u32 {
        ((self.next() as u128 * n as u128) >> 64) as u32
    }
}

/// Largest sample of nodes, which are examined before the rest.
pub const SAMPLE: usize = 16;

/// A subset of `0..n`; each set of its size is equally likely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    picked: [u32; SAMPLE],
    len: usize,
}

impl Sample {
    /// Draws `min(n, k, SAMPLE)` of `0..n` by Floyd's algorithm: one draw per pick, no other
    /// memory.
    pub fn draw(n: u32, k: usize, random: &mut SplitMix64) -> Self {
        let mut sample = Self { picked: [0; SAMPLE], len: 0 };
        let k = u32::try_from(k.min(SAMPLE)).unwrap_or(u32::MAX).min(n);
        for last in n - k..n {
            let drawn = if k == n { last } else { random.below(last + 1) };
            let pick = if sample.contains(drawn) { last } else { drawn };
            sample.picked[sample.len] = pick;
            sample.len += 1;
        }
        sample
    }

    /// Returns the picks, in arbitrary order.
    pub fn picked(&self) -> &[u32] {
        &self.picked[..self.len]
    }

    /// Returns true when the number was picked.
    pub fn contains(&self, number: u32) -> bool {
        self.picked().contains(&number)
    }
}
