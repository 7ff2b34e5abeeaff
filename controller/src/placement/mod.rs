//! Where a new sandbox goes. Pure: it is told the time and the chance, and knows no network and no
//! store; the same input with the same seed gives the same answer.
//!
//! ```text
//!  reports, time-outs ---> fleet (view: the nodes in numbers; ledger: decided, not reported yet;
//!                            |     habits: what sandboxes use of what they are given)
//!  what is asked --------> choose: sample (random) -> filter -> score -> up to three nodes
//!                            |
//!                          explain: the same filter and score in words, when somebody reads it
//! ```

mod choose;
mod explain;
mod filter;
mod fleet;
mod habits;
mod ledger;
mod random;
mod score;
mod view;

use serde::Deserialize;

pub use choose::{BEST, Best, Choice, Look, Pick, choose};
pub use explain::{Decided, Decision, Obstacle, Part, Verdict, Words};
pub use filter::Filtered;
pub use fleet::Fleet;
pub use habits::Habits;
pub use ledger::{Ledger, Reserved};
pub use random::{SAMPLE, Sample, SplitMix64};
pub use score::PARTS;
pub use view::{Affinity, Ask, Before, Holder, Load, NodeView, Now};

/// How often agents report, milliseconds.
pub const REPORT_PERIOD_MS: u64 = 1000;
/// A node that has not reported for this long, milliseconds, gets no new work at all.
pub const STALE_MS: u64 = 30_000;
/// One call that got no answer keeps new work away for this long, milliseconds; then one creation
/// tries the node.
pub const BREAKER_MS: u64 = 30_000;

/// How far nodes may be filled.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sum of the memory limits handed out, over the memory that is there.
    pub memory_overcommit: f64,
    /// Sum of the cores handed out, over the cores that are there; 0 is without bound.
    pub cpu_overcommit: f64,
    /// Share of the memory that may be in use before a node takes nothing more.
    pub memory_used_max: f64,
    /// Share of the storage that stays free.
    pub storage_free_min: f64,
    /// Cores that a sandbox uses in the long run, over the cores that it was given; to begin with,
    /// until it has been learnt.
    pub cpu_habit: f64,
    /// Memory that a sandbox uses in the long run, over the memory that it was given; to begin with,
    /// until it has been learnt.
    pub memory_habit: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_overcommit: 1.5,
            cpu_overcommit: 0.0,
            memory_used_max: 0.9,
            storage_free_min: 0.05,
            cpu_habit: 0.14,
            memory_habit: 0.40,
        }
    }
}

#[cfg(test)]
mod tests;
