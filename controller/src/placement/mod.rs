//! Where a new sandbox goes: a pure function over what is known of the nodes. It knows no clock, no
//! network and no store; the same input gives the same answer, and the answer explains itself.
//!
//! `filter` says which nodes cannot take it and why, `score` ranks the others, `ledger` keeps count
//! of what has been decided but not been seen in a report yet.

mod filter;
mod ledger;
mod score;

use std::time::Duration;

use proto::{
    name::{NodeName, SnapshotId},
    sandbox::v1::NodeLoad,
    spec::{Size, Spec},
};
use serde::{Deserialize, Serialize};

pub use filter::Filtered;
pub use ledger::{Ledger, Reserved};

/// A node that has reported within this is current.
pub const FRESH: Duration = Duration::from_secs(3);
/// One that has not reported for this long gets no new work at all.
pub const STALE: Duration = Duration::from_secs(30);
/// Of very many nodes only so many are looked at (not yet: all are; the sample comes in here).
pub const SAMPLE: usize = usize::MAX;

/// How far nodes may be filled.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sum of the memory limits handed out, over the memory that is there.
    pub memory_overcommit: f64,
    /// Share of the memory that may be in use before a node takes nothing more.
    pub memory_used_max: f64,
    /// Share of the storage that stays free.
    pub storage_free_min: f64,
    /// Cores that a sandbox uses in the long run, over the cores that it was given.
    pub cpu_habit: f64,
    /// Memory that a sandbox uses in the long run, over the memory that it was given.
    pub memory_habit: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_overcommit: 1.5,
            memory_used_max: 0.9,
            storage_free_min: 0.05,
            cpu_habit: 0.14,
            memory_habit: 0.40,
        }
    }
}

/// What is known of one node at the moment of a decision.
#[derive(Debug, Clone)]
pub struct NodeView {
    /// Its name.
    pub name: NodeName,
    /// Why its agent cannot be talked to; `None` when it can.
    pub down: Option<String>,
    /// Its agent let a call time out a moment ago.
    pub breaker_open: bool,
    /// Its last load report and the age of it.
    pub report: Option<(NodeLoad, Duration)>,
    /// Decided for it and not in that report yet.
    pub reserved: Reserved,
    /// Living sandboxes of the asking team on it.
    pub team_sandboxes: u32,
    /// It refused this very creation, and the hint when to come back still stands.
    pub refused: Option<String>,
    /// It failed this very creation.
    pub failed: Option<String>,
}

impl NodeView {
    /// What `spec` would take of this node; `None` when it does not hold the snapshot.
    pub fn need(&self, spec: &Spec) -> Option<Size> {
        let (load, _) = self.report.as_ref()?;
        snapshot_size(load, &spec.snapshot).map(|default| spec.size.or(default))
    }
}

/// What a node gives a sandbox of this snapshot; `None` when it does not hold it.
pub fn snapshot_size(load: &NodeLoad, snapshot: &SnapshotId) -> Option<Size> {
    let at = load.snapshots.iter().position(|held| held == snapshot.as_str())?;
    let size = load.snapshot_sizes.get(at).copied().unwrap_or_default();
    Some(Size { cpu_cores: size.cpu_cores, memory_mib: size.memory_mib })
}

/// One part of a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// cpu, memory, starting, latency, age, pressure, spread.
    pub name: String,
    /// Its share.
    pub value: f64,
}

/// What was thought of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The node.
    pub node: NodeName,
    /// Why it was out; `None` if it was in the choice.
    pub filtered: Option<Filtered>,
    /// A sentence to it.
    pub detail: String,
    /// Lower is better; 0 when filtered.
    pub score: f64,
    /// The parts add up to the score.
    pub parts: Vec<Part>,
}

/// Where it should go, and why. Kept with the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Which try of the creation it is for.
    pub attempt: u32,
    /// When it was made, milliseconds since 1970.
    pub decided_ms: u64,
    /// Best first, then those that were filtered out.
    pub verdicts: Vec<Verdict>,
}

impl Decision {
    /// The best node, if any fits.
    pub fn node(&self) -> Option<&NodeName> {
        self.verdicts.first().filter(|verdict| verdict.filtered.is_none()).map(|best| &best.node)
    }

    /// What stands in the way when no node fits.
    pub fn obstacle(&self, wish: Option<&NodeName>) -> Obstacle {
        if let Some(wish) = wish
            && !self.verdicts.iter().any(|verdict| verdict.node == *wish)
        {
            return Obstacle::UnknownNode;
        }
        // The most hopeful reason decides: a single node that is full now makes waiting worthwhile.
        let found = |kind: Obstacle| {
            self.verdicts
                .iter()
                .any(|verdict| verdict.filtered.is_some_and(|filtered| filtered.obstacle() == kind))
        };
        let order = [
            Obstacle::Full,
            Obstacle::NoQuorum,
            Obstacle::Unreachable,
            Obstacle::Failed,
            Obstacle::TooLarge,
        ];
        if let Some(kind) = order.into_iter().find(|&kind| found(kind)) {
            return kind;
        }
        if self.verdicts.is_empty() { Obstacle::Unreachable } else { Obstacle::UnknownSnapshot }
    }

    /// The verdicts in one sentence, for an error message.
    pub fn why(&self) -> String {
        if self.verdicts.is_empty() {
            return "no node is registered".into();
        }
        let parts: Vec<_> = self
            .verdicts
            .iter()
            .map(|verdict| format!("{}: {}", verdict.node, verdict.detail))
            .collect();
        parts.join("; ")
    }
}

/// Why no node fits, by what the caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no node of the wished name.
    UnknownNode,
    /// No node holds the snapshot.
    UnknownSnapshot,
    /// Larger than any node could take even when empty.
    TooLarge,
    /// Every node that could take it has failed it already.
    Failed,
    /// The nodes that could take it do not answer.
    Unreachable,
    /// Their cluster has no quorum.
    NoQuorum,
    /// They have no room now.
    Full,
}

/// Ranks the nodes for a creation. Nodes may come in any order; the answer does not depend on it.
pub fn place(
    nodes: &[NodeView],
    spec: &Spec,
    limits: &Limits,
    attempt: u32,
    decided_ms: u64,
) -> Decision {
    let median_start_ms = score::median_start_ms(nodes);
    let (mut fresh, mut aging, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for node in nodes.iter().take(SAMPLE) {
        match filter::check(node, spec, limits) {
            Err((filtered, detail)) => out.push(Verdict {
                node: node.name.clone(),
                filtered: Some(filtered),
                detail,
                score: 0.0,
                parts: Vec::new(),
            }),
            Ok(fit) => {
                let verdict = score::verdict(&fit, limits, median_start_ms);
                if fit.age < FRESH { fresh.push(verdict) } else { aging.push(verdict) }
            }
        }
    }
    // An old report is better than none, and worse than any current one.
    if !fresh.is_empty() {
        out.extend(aging.drain(..).map(|verdict| Verdict {
            filtered: Some(Filtered::ReportOld),
            detail: "its report is old and others are current".into(),
            score: 0.0,
            parts: Vec::new(),
            ..verdict
        }));
    }
    let mut verdicts = if fresh.is_empty() { aging } else { fresh };
    verdicts.sort_by(|a, b| a.score.total_cmp(&b.score).then_with(|| a.node.cmp(&b.node)));
    out.sort_by(|a, b| a.node.cmp(&b.node));
    verdicts.extend(out);
    Decision { attempt, decided_ms, verdicts }
}

#[cfg(test)]
mod tests;
