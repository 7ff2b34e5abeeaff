//! The decision: filters and scores a sample of the nodes that hold the snapshot, and the rest only
//! when the sample has no candidate. Allocates nothing; costs the same for ten nodes and thousands.
//!
//! Why a sample: controllers decide on reports that are seconds old and do not know each other's
//! decisions. If each took the best of all, they would all take the same node.

use std::cmp::Ordering;

use super::{Ask, Holder, Limits, NodeView, Now, SAMPLE, Sample, SplitMix64, filter, score};

/// Number of nodes in a choice, best first.
pub const BEST: usize = 3;

/// A candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick {
    /// Index of the node.
    pub node: u32,
    /// Score; lower is better.
    pub score: f64,
    rank: u32,
}

impl Pick {
    fn order(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.rank.cmp(&other.rank))
    }
}

/// The best candidates so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Best {
    picks: [Option<Pick>; BEST],
}

impl Best {
    fn offer(&mut self, new: Pick) {
        let mut new = Some(new);
        for place in &mut self.picks {
            let better = match (&new, &place) {
                (Some(new), Some(old)) => new.order(old) == Ordering::Less,
                (Some(_), None) => true,
                (None, _) => return,
            };
            if better {
                std::mem::swap(place, &mut new);
            }
        }
    }

    /// Returns the candidates, best first.
    pub fn iter(&self) -> impl Iterator<Item = Pick> + '_ {
        self.picks.iter().flatten().copied()
    }

    /// Returns the best candidate.
    pub fn first(&self) -> Option<Pick> {
        self.picks[0]
    }
}

/// Number of nodes to examine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// A sample of this size, 16 at most, and the rest when it has no candidate.
    Sample(usize),
    /// Every node.
    All,
}

impl Default for Look {
    fn default() -> Self {
        Self::Sample(SAMPLE)
    }
}

/// Outcome of a decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Best candidates; with current reports if there are any.
    pub best: Best,
    /// Holders that were in the sample.
    pub sample: Sample,
    /// Whether all holders were examined.
    pub all: bool,
}

/// Chooses the best of the nodes that hold the snapshot. `holders` are ordered by node.
pub fn choose(
    nodes: &[NodeView],
    holders: &[Holder],
    ask: &Ask<'_>,
    limits: &Limits,
    now: &Now,
    look: Look,
    random: &mut SplitMix64,
) -> Choice {
    let n = u32::try_from(holders.len()).unwrap_or(u32::MAX);
    let k = match (look, ask.required) {
        (Look::Sample(k), None) => k,
        (Look::All, _) | (Look::Sample(_), Some(_)) => 0,
    };
    let sample = Sample::draw(n, k, random);
    let mut seen = Drawn::default();
    for &at in sample.picked() {
        seen.look(nodes, &holders[at as usize], ask, limits, now);
    }
    if seen.fresh.first().is_some() {
        return Choice { best: seen.fresh, sample, all: sample.picked().len() == holders.len() };
    }
    // A refusal, or a node with an old report, is the last resort after all nodes.
    for (at, holder) in (0u32..).zip(holders) {
        let preferred = ask.required.is_none_or(|required| required == holder.node);
        if preferred && !sample.contains(at) {
            seen.look(nodes, holder, ask, limits, now);
        }
    }
    let best = if seen.fresh.first().is_some() { seen.fresh } else { seen.aging };
    Choice { best, sample, all: true }
}

#[derive(Default)]
struct Drawn {
    fresh: Best,
    /// Nodes whose last report is old: better than none, and worse than any current one.
    aging: Best,
}

impl Drawn {
    fn look(
        &mut self,
        nodes: &[NodeView],
        holder: &Holder,
        ask: &Ask<'_>,
        limits: &Limits,
        now: &Now,
    ) {
        let node = &nodes[holder.node as usize];
        if filter::check(node, holder, ask, limits, now).is_err() {
            return;
        }
        let pick = Pick {
            node: holder.node,
            score: score::score(node, holder, ask, now),
            rank: node.rank,
        };
        if node.age_ms(now.ms).is_some_and(|age_ms| age_ms < now.fresh_ms()) {
            self.fresh.offer(pick);
        } else {
            self.aging.offer(pick);
        }
    }
}
