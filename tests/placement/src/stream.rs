//! Streams of chance. Each thing that is drawn has a stream of its own, so that two runs of one seed
//! differ only in what is under test.

use controller::placement::SplitMix64;

/// The workload.
pub(crate) const WORKLOAD: u64 = 1;
/// The nodes.
pub(crate) const NODES: u64 = 2;
/// When nodes fail.
pub(crate) const FAULTS: u64 = 3;
/// Delays of messages.
pub(crate) const NETWORK: u64 = 4;
/// What starts take.
pub(crate) const SERVICE: u64 = 5;
/// What the first controller draws; the others follow.
pub(crate) const CONTROLLERS: u64 = 50;

/// One stream.
#[derive(Debug, Clone)]
pub(crate) struct Stream(pub(crate) SplitMix64);

impl Stream {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut random = SplitMix64::new(seed ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        random.next();
        Self(random)
    }

    /// What a sandbox does in its life.
    pub(crate) fn of_sandbox(seed: u64, id: usize) -> Self {
        Self::new(seed ^ 0xABCD, id as u64 + 1000)
    }

    /// 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Bounded Pareto of shape 1.
    pub(crate) fn pareto(&mut self, low: f64, high: f64) -> f64 {
        low / (1.0 - self.unit() * (1.0 - low / high))
    }

    pub(crate) fn normal(&mut self) -> f64 {
        let (a, b) = (1.0 - self.unit(), self.unit());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0.below(u32::try_from(n).unwrap_or(u32::MAX)) as usize
    }
}
