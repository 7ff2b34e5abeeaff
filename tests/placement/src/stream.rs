//! Streams of random numbers. Each drawn thing has its own stream, so that two runs of one seed
//! differ only in what is under test.

use controller::placement::SplitMix64;

/// Stream of the workload.
pub(crate) const WORKLOAD: u64 = 1;
/// Stream of the nodes.
pub(crate) const NODES: u64 = 2;
/// Stream of the times when nodes fail.
pub(crate) const FAULTS: u64 = 3;
/// Stream of the delays of messages.
pub(crate) const NETWORK: u64 = 4;
/// Stream of the durations of starts.
pub(crate) const SERVICE: u64 = 5;
/// Stream of the first controller; those of the others follow.
pub(crate) const CONTROLLERS: u64 = 50;

#[derive(Debug, Clone)]
pub(crate) struct Stream(pub(crate) SplitMix64);

impl Stream {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut random = SplitMix64::new(seed ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        random.next();
        Self(random)
    }

    /// Creates the stream of a sandbox's behaviour.
    pub(crate) fn of_sandbox(seed: u64, id: usize) -> Self {
        Self::new(seed ^ 0xABCD, id as u64 + 1000)
    }

    /// Returns a number from 0 to 1.
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

    /// Draws from a bounded Pareto of shape 1.
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
