//! Explains a decision to people, in words and numbers, with the same filter and score.

use std::borrow::Cow;

use proto::{
    name::{NodeName, SnapshotId},
    spec::Size,
};
use serde::{Deserialize, Serialize};

use super::{
    Ask, Choice, Filtered, Fleet, Holder, Look, NodeView, Now,
    filter::{self, Room},
    score,
};

/// One part of a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// One of `score::PARTS`.
    pub name: Cow<'static, str>,
    /// Contribution to the score.
    pub value: f64,
}

/// Evaluation of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Name of the node.
    pub node: NodeName,
    /// Reason for its exclusion; `None` for a candidate.
    pub filtered: Option<Filtered>,
    /// Explanation for people.
    pub detail: String,
    /// Score; lower is better, 0 when excluded.
    pub score: f64,
    /// Parts that add up to the score.
    pub parts: Vec<Part>,
}

/// Chosen node and the reasons. Stored with the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Attempt that it is for.
    pub attempt: u32,
    /// Time of the decision, milliseconds since 1970.
    pub decided_ms: u64,
    /// Number of nodes that hold the snapshot.
    #[serde(default)]
    pub holders: u32,
    /// Candidates, best first, then excluded nodes. All nodes when none fitted, else those that
    /// were examined.
    pub verdicts: Vec<Verdict>,
}

impl Decision {
    /// Returns the best node, if any fits.
    pub fn node(&self) -> Option<&NodeName> {
        self.verdicts.first().filter(|verdict| verdict.filtered.is_none()).map(|best| &best.node)
    }

    /// Returns why no node fits.
    pub fn obstacle(&self, required: Option<&NodeName>) -> Obstacle {
        if let Some(required) = required
            && !self.verdicts.iter().any(|verdict| verdict.node == *required)
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
            Obstacle::Withdrawn,
            Obstacle::NoQuorum,
            Obstacle::Unreachable,
            Obstacle::Failed,
            Obstacle::Unfit,
        ];
        if let Some(kind) = order.into_iter().find(|&kind| found(kind)) {
            return kind;
        }
        if self.verdicts.is_empty() { Obstacle::Unreachable } else { Obstacle::UnknownSnapshot }
    }

    /// Joins the verdicts into one sentence, for an error message.
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

/// Reason why no node fits, by what the caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// The requested node does not exist.
    UnknownNode,
    /// No node holds the snapshot.
    UnknownSnapshot,
    /// The request is larger than any empty node, or no node has the labels.
    Unfit,
    /// Every node that could take it has failed it already.
    Failed,
    /// The nodes that could take it do not answer.
    Unreachable,
    /// The cluster of those nodes has no quorum.
    NoQuorum,
    /// An operator lets the nodes have no new work for now.
    Withdrawn,
    /// The nodes are full now.
    Full,
}

/// Error messages about a node, which its numbers do not contain.
#[derive(Debug, Clone, Default)]
pub struct ExplainText {
    /// Reason why its agent does not answer.
    pub down: Option<String>,
    /// Node that has vmids in common with it, and what to do.
    pub vmids: Option<String>,
    /// Reason of its refusal of this creation.
    pub refused: Option<String>,
    /// Failure of this creation on it.
    pub failed: Option<String>,
}

/// A decision to explain, with its inputs.
#[derive(Debug, Clone, Copy)]
pub struct Decided<'a> {
    /// Requested snapshot.
    pub snapshot: &'a SnapshotId,
    /// Request.
    pub ask: &'a Ask<'a>,
    /// Outcome.
    pub choice: &'a Choice,
    /// Number of nodes that were to be examined.
    pub look: Look,
    /// The only candidates, where restricted.
    pub among: Option<&'a [u32]>,
}

impl Fleet {
    /// Explains a decision: about all nodes when none fits or all were requested, else about those
    /// of the sample and the best.
    pub fn explain(
        &self,
        decided: &Decided<'_>,
        now_ms: u64,
        text: &dyn Fn(u32) -> ExplainText,
    ) -> Vec<Verdict> {
        let Decided { snapshot, ask, choice, look, among } = *decided;
        let holders = self.holders(snapshot);
        let now = self.now(now_ms);
        let of = |node: u32| holders.binary_search_by_key(&node, |held| held.node).ok();
        let all = look == Look::All || choice.best.first().is_none();
        let listed: Vec<u32> = if let Some(among) = among {
            among.to_vec()
        } else if all {
            self.in_use().collect()
        } else {
            // Only the few examined nodes, without a pass over all nodes.
            let sample = choice.sample.picked().iter().filter_map(|at| holders.get(*at as usize));
            let best = choice.best.iter().map(|pick| pick.node);
            let mut listed: Vec<u32> = sample.map(|holder| holder.node).chain(best).collect();
            listed.sort_unstable();
            listed.dedup();
            listed
        };
        let best = choice.best.first();
        let any_fresh = best.is_some_and(|pick| is_fresh(self.view(pick.node), &now));
        let (mut fit, mut out) = (Vec::new(), Vec::new());
        for node in listed {
            let view = self.view(node);
            let verdict = |filtered, detail| Verdict {
                node: self.name(node).clone(),
                filtered,
                detail,
                score: 0.0,
                parts: Vec::new(),
            };
            let case = Case { fleet: self, node, view, ask, now: &now, text };
            match of(node).map(|at| &holders[at]) {
                None => {
                    let (why, detail) = case.without_snapshot(node, snapshot);
                    out.push(verdict(Some(why), detail));
                }
                Some(holder) => match filter::check(view, holder, ask, &self.limits, &now) {
                    Err(why) => out.push(verdict(Some(why), case.sentence(holder, why))),
                    Ok(()) if any_fresh && !is_fresh(view, &now) => {
                        let why = Filtered::ReportOld;
                        out.push(verdict(Some(why), case.sentence(holder, why)));
                    }
                    Ok(()) => {
                        let parts = score::parts(view, holder, ask, &now);
                        let part =
                            |(name, value): (&'static str, f64)| Part { name: name.into(), value };
                        fit.push(Verdict {
                            score: score::sum(&parts),
                            parts: parts.into_iter().map(part).collect(),
                            ..verdict(None, case.figures(holder))
                        });
                    }
                },
            }
        }
        fit.sort_by(|a, b| a.score.total_cmp(&b.score).then_with(|| a.node.cmp(&b.node)));
        out.sort_by(|a, b| a.node.cmp(&b.node));
        fit.extend(out);
        fit
    }
}

fn is_fresh(view: &NodeView, now: &Now) -> bool {
    view.age_ms(now.ms).is_some_and(|age_ms| age_ms < now.fresh_ms())
}

/// One node in one decision.
struct Case<'a> {
    fleet: &'a Fleet,
    node: u32,
    view: &'a NodeView,
    ask: &'a Ask<'a>,
    now: &'a Now,
    /// Called only where a sentence needs them.
    text: &'a dyn Fn(u32) -> ExplainText,
}

impl Case<'_> {
    fn without_snapshot(&self, node: u32, snapshot: &SnapshotId) -> (Filtered, String) {
        // Its snapshots are unknown before its first report.
        let unheard =
            Holder { node, size: Size::default(), queued: 0, queue_max: 0, cached: false };
        let preferred = self.ask.required.is_none_or(|required| required == node);
        if preferred && self.view.reported_ms.is_none() {
            let why = if self.view.down { Filtered::NotReady } else { Filtered::NeverReported };
            return (why, self.sentence(&unheard, why));
        }
        let why = if preferred { Filtered::SnapshotMissing } else { Filtered::NotRequested };
        let detail = if preferred {
            format!("does not hold {snapshot}")
        } else {
            self.sentence(&unheard, why)
        };
        (why, detail)
    }

    fn sentence(&self, holder: &Holder, why: Filtered) -> String {
        let (load, limits) = (&self.view.load, &self.fleet.limits);
        let room = Room::of(self.view, holder, self.ask, limits);
        let gib = |bytes: f64| bytes / (1024.0 * 1024.0 * 1024.0);
        let percent = |share: f64| share * 100.0;
        let text = || (self.text)(self.node);
        let or = |word: Option<String>| word.unwrap_or_else(|| "no reason given".into());
        let age_s = self.view.age_ms(self.now.ms).unwrap_or_default() / 1000;
        match why {
            Filtered::NotRequested => {
                let required =
                    self.ask.required.and_then(|required| self.fleet.names.get(required as usize));
                let required = required.map_or("another", NodeName::as_str);
                format!("{required} was asked for")
            }
            Filtered::NotReady => format!("its agent does not answer: {}", or(text().down)),
            Filtered::NeverReported => "its agent has not reported yet".into(),
            Filtered::BreakerOpen => "its agent let a call time out a moment ago".into(),
            Filtered::ReportStale => format!("last reported {age_s} s ago"),
            Filtered::ReportOld => "its report is old and others are current".into(),
            Filtered::NoReservation => "gave no reservation".into(),
            Filtered::SnapshotMissing => "does not hold the snapshot".into(),
            Filtered::NoQuorum => "its cluster has no quorum".into(),
            Filtered::Cordoned => "it is cordoned: it gets no new work".into(),
            Filtered::Draining => "it is being drained".into(),
            Filtered::Maintenance => "PVE has it in maintenance".into(),
            Filtered::Renumbered => {
                "its number in the cluster has changed, and nobody has confirmed it".into()
            }
            Filtered::VmidsOverlap => or(text().vmids),
            Filtered::Labels => "its labels are not those that are asked for".into(),
            Filtered::Refused => format!("refused it a moment ago: {}", or(text().refused)),
            Filtered::FailedBefore => {
                format!("this creation failed here: {}", or(text().failed))
            }
            Filtered::TooLarge if room.memory_asked > room.memory => {
                let (asked, all) = (gib(room.memory_asked), gib(room.memory));
                format!("asks {asked:.1} GiB of {all:.1} GiB in all")
            }
            Filtered::TooLarge => {
                format!("asks {} cores of {:.1} in all", room.cores_asked, room.cores)
            }
            Filtered::MemorySum => format!(
                "{:.1} of {:.1} GiB are handed out, {:.1} more do not fit",
                gib(room.memory_given),
                gib(room.memory),
                gib(room.memory_asked)
            ),
            Filtered::CpuSum => format!(
                "{} of {:.1} cores are handed out, {} more do not fit",
                room.cores_given, room.cores, room.cores_asked
            ),
            Filtered::MemoryUsed => {
                format!("{:.0} % of its memory is in use", percent(load.memory_used_share()))
            }
            Filtered::Stalled => format!(
                "all its work waits for memory {:.0} %, for a disk {:.0} % of the time",
                percent(load.psi_memory_full),
                percent(load.psi_io_full)
            ),
            Filtered::QueueFull => {
                let (waiting, max) = (holder.queued, holder.queue_max);
                let of_team = (self.ask.queued)(holder.node);
                format!(
                    "{waiting} of {max} places of the snapshot's queue are taken, and {of_team} creations of this \
                     team wait on the node"
                )
            }
            Filtered::StorageFull => match load.storage_free {
                Some(free) if free < limits.storage_free_min => {
                    format!("{:.0} % of its storage is free", percent(free))
                }
                Some(_) | None => format!("its thin pool is {:.0} % full", percent(load.thin_used)),
            },
            Filtered::VmidsExhausted => "no vmid is left in its range".into(),
            Filtered::AddressesExhausted => "no address is left in its pool".into(),
        }
    }

    fn figures(&self, holder: &Holder) -> String {
        let load = &self.view.load;
        let needs = score::needs(self.view, holder, self.ask, self.now);
        format!(
            "cpu {:.2}: {:.0} % of {:.1} cores busy, pressure {:.0} %; memory {:.2}: {:.0} % used; \
             {} starting, {} reserved, {} of this team",
            needs.cpu,
            load.cpu_busy * 100.0,
            load.cores,
            load.psi_cpu * 100.0,
            needs.memory,
            load.memory_used_share() * 100.0,
            load.starting,
            self.view.reserved.sandboxes,
            (self.ask.team)(holder.node),
        )
    }
}
