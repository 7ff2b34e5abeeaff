//! Chooses the node of a new sandbox. Pure: time and randomness are passed in, network and store
//! are not used; the same input with the same seed gives the same answer.
//!
//! ```text
//!  reports, time-outs ---> fleet (view: the nodes in numbers; ledger: decided, not reported yet;
//!                            |     usage_model: share of their size that sandboxes use)
//!  request --------------> choose: sample (random) -> filter -> score -> up to three nodes
//!                            |
//!                          explain: the same filter and score in words, when somebody reads it
//! ```

mod choose;
mod explain;
mod filter;
mod fleet;
mod growth;
mod ledger;
mod random;
mod score;
mod usage_model;
mod view;

use serde::Deserialize;

pub use choose::{BEST, Best, Choice, Look, Pick, choose};
pub use explain::{Decided, Decision, ExplainText, Obstacle, Part, Verdict};
pub use filter::Filtered;
pub use fleet::Fleet;
pub use growth::{Growth, NoRoom};
pub use ledger::{Ledger, Reserved};
pub use random::{SAMPLE, Sample, SplitMix64};
pub use score::PARTS;
pub use usage_model::UsageModel;
pub use view::{Affinity, Ask, Holder, Load, NodeView, Now, PriorOutcome};

/// Period of the agents' reports, milliseconds.
pub const REPORT_PERIOD_MS: u64 = 1000;
/// Age of the last report above which a node gets no new work, milliseconds.
pub const STALE_MS: u64 = 30_000;
/// Pause of new work after a call without an answer, milliseconds; then one creation tries it.
pub const BREAKER_MS: u64 = 30_000;

/// Limits of how full nodes get.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most memory handed out, as a multiple of the node's memory.
    pub memory_overcommit: f64,
    /// Most cores handed out, as a multiple of the node's cores; 0 is unlimited.
    pub cpu_overcommit: f64,
    /// Share of the memory in use above which a node gets no new work.
    pub memory_used_max: f64,
    /// Share of the storage that stays free.
    pub storage_free_min: f64,
    /// Initial estimate of the cores that a sandbox uses in the long run, as a share of its size;
    /// later learnt.
    #[serde(alias = "cpu_habit")]
    pub assumed_cpu_use: f64,
    /// Initial estimate of the memory that a sandbox uses in the long run, as a share of its size;
    /// later learnt.
    #[serde(alias = "memory_habit")]
    pub assumed_memory_use: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_overcommit: 1.5,
            cpu_overcommit: 0.0,
            memory_used_max: 0.9,
            storage_free_min: 0.05,
            assumed_cpu_use: 0.14,
            assumed_memory_use: 0.40,
        }
    }
}

#[cfg(test)]
mod tests;
