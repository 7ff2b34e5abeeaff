//! Ranges of vmids from which the nodes number their sandboxes. Host names have these numbers, so two nodes with common
//! ones would give sandboxes of two teams one address. Of two such nodes one gets no new sandboxes. Pure.
//!
//! The range belongs to the node that has sandboxes from it, else to the one that is known longer. What was decided once
//! stays so while the controller runs: a node that is down, or joins again, keeps its range. A node tells its range when it
//! connects. Until then it keeps the numbers of the sandboxes that it has made, as far as the store knows them: it may be
//! away since the controller's start. Numbers of sandboxes that moved to it say nothing about its range. A node that has
//! changed its range while it had sandboxes holds back nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use proto::{agent::v1::HelloResponse, name::NodeName};

/// Range of vmids, inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VmidRange {
    first: u32,
    last: u32,
}

impl VmidRange {
    /// Reads the range that an agent tells; `None` where it tells none.
    pub(super) fn told(hello: &HelloResponse) -> Option<Self> {
        let (first, last) = (hello.vmid_first, hello.vmid_last);
        (first > 0 && first <= last).then_some(Self { first, last })
    }

    /// Returns true for a number of the range.
    pub(super) const fn has(self, vmid: u32) -> bool {
        self.first <= vmid && vmid <= self.last
    }

    const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Returns the smallest range with those of the numbers that it has, if it has any.
    fn around(self, numbers: &BTreeSet<u32>) -> Option<Self> {
        let mut inside = numbers.range(self.first..=self.last);
        let first = *inside.next()?;
        Some(Self { first, last: inside.next_back().copied().unwrap_or(first) })
    }
}

impl fmt::Display for VmidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Precedence of a node's claim to its range. The lowest one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Precedence {
    /// Whether the node had no sandbox from the range when it told it.
    is_unused: bool,
    /// Position among all claims, the earliest first.
    position: u64,
}

#[derive(Debug, Clone, Copy)]
struct Claim {
    range: VmidRange,
    precedence: Precedence,
}

/// Range of a node that has numbers in common with the range of a node before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Overlap {
    own: VmidRange,
    other: VmidRange,
    node: NodeName,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { own, other, node } = self;
        write!(
            f,
            "no new sandboxes are made on it: its vmids {own} overlap with {other} of {node}; set another \
             vmids.stripe in its agent.toml, and restart its agent; or, where {node} is gone for good: \
             sandboxctl node forget {node}"
        )
    }
}

/// Ranges of all nodes.
#[derive(Debug, Default)]
pub(super) struct VmidRanges {
    /// Positions of the nodes, in the order in which they became known.
    known: BTreeMap<NodeName, u64>,
    next: u64,
    claims: BTreeMap<NodeName, Claim>,
    /// Numbers of the sandboxes that a node has made, until it tells its range.
    given: BTreeMap<NodeName, BTreeSet<u32>>,
}

impl VmidRanges {
    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Gives a node its position, unless it has one.
    pub(super) fn add(&mut self, node: &NodeName) {
        if !self.known.contains_key(node) {
            let position = self.next();
            self.known.insert(node.clone(), position);
        }
    }

    /// Records a number that a node has given to a sandbox, from before the node tells its range.
    pub(super) fn gave(&mut self, node: &NodeName, vmid: u32) {
        self.given.entry(node.clone()).or_default().insert(vmid);
    }

    /// Returns the range that a node has told last.
    pub(super) fn of(&self, node: &NodeName) -> Option<VmidRange> {
        self.claims.get(node).map(|claim| claim.range)
    }

    /// Takes over what a node's agent tells; `is_used`: whether the node has a sandbox from that range. Returns the
    /// nodes whose overlap may be another one now.
    pub(super) fn told(
        &mut self,
        node: &NodeName,
        range: Option<VmidRange>,
        is_used: bool,
    ) -> BTreeSet<NodeName> {
        let before = self.of(node);
        let given = self.given.remove(node).unwrap_or_default();
        if before == range && given.is_empty() {
            return BTreeSet::new();
        }
        // With another range than before it comes last: no node takes the numbers of another one by a change of its own.
        let position = if before.is_none() { self.known.get(node).copied() } else { None };
        match range {
            Some(range) => {
                let position = position.unwrap_or_else(|| self.next());
                let precedence = Precedence { is_unused: !is_used, position };
                self.claims.insert(node.clone(), Claim { range, precedence });
            }
            None => drop(self.claims.remove(node)),
        }
        let changed = before.into_iter().chain(range);
        let mut touched: BTreeSet<_> =
            changed.flat_map(|range| self.overlapping(node, range)).cloned().collect();
        touched.extend(self.with_any(&given));
        touched.insert(node.clone());
        touched
    }

    /// Drops a node that was forgotten. Returns the nodes whose overlap may be another one now.
    pub(super) fn forget(&mut self, node: &NodeName) -> BTreeSet<NodeName> {
        self.known.remove(node);
        let given = self.given.remove(node).unwrap_or_default();
        let mut touched = self.with_any(&given);
        if let Some(claim) = self.claims.remove(node) {
            touched.extend(self.overlapping(node, claim.range).cloned());
        }
        touched
    }

    /// Returns what keeps new sandboxes from a node, if anything does.
    pub(super) fn overlap(&self, node: &NodeName) -> Option<Overlap> {
        let own = self.claims.get(node)?;
        let told = self.overlapping(node, own.range).filter_map(|other| {
            let claim = self.claims.get(other)?;
            Some((claim.precedence, claim.range, other))
        });
        let given = self.given.iter().filter_map(|(other, numbers)| {
            // One that is not known any more comes last.
            let position = self.known.get(other).copied().unwrap_or(u64::MAX);
            let precedence = Precedence { is_unused: false, position };
            Some((precedence, own.range.around(numbers)?, other))
        });
        let before = told.chain(given).filter(|(precedence, ..)| *precedence < own.precedence);
        let (_, other, node) = before.min_by_key(|(precedence, ..)| *precedence)?;
        Some(Overlap { own: own.range, other, node: node.clone() })
    }

    /// Returns the nodes whose range has any of these numbers.
    fn with_any(&self, numbers: &BTreeSet<u32>) -> BTreeSet<NodeName> {
        let has = |(_, claim): &(&NodeName, &Claim)| claim.range.around(numbers).is_some();
        self.claims.iter().filter(has).map(|(node, _)| node.clone()).collect()
    }

    /// Returns the other nodes that have numbers of a range.
    fn overlapping<'a>(
        &'a self,
        node: &'a NodeName,
        range: VmidRange,
    ) -> impl Iterator<Item = &'a NodeName> {
        let others = self.claims.iter().filter(move |(name, _)| *name != node);
        others.filter(move |(_, claim)| claim.range.overlaps(range)).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: (u32, u32) = (100_000, 156_249);
    const SECOND: (u32, u32) = (156_250, 212_499);

    fn node(name: &str) -> NodeName {
        name.parse().expect("a name")
    }

    fn told((vmid_first, vmid_last): (u32, u32)) -> Option<VmidRange> {
        VmidRange::told(&HelloResponse { vmid_first, vmid_last, ..HelloResponse::default() })
    }

    /// Returns each node that is held back, with the one that has its numbers.
    fn held(ranges: &VmidRanges) -> Vec<(String, String)> {
        let overlap =
            |node: &NodeName| Some((node.to_string(), ranges.overlap(node)?.node.to_string()));
        ranges.known.keys().filter_map(overlap).collect()
    }

    fn pair(node: &str, other: &str) -> Vec<(String, String)> {
        vec![(node.to_owned(), other.to_owned())]
    }

    /// Makes the ranges of these nodes, known in this order.
    fn known(names: &[&str]) -> VmidRanges {
        let mut ranges = VmidRanges::default();
        names.iter().for_each(|name| ranges.add(&node(name)));
        ranges
    }

    #[test]
    fn later_known_of_two_nodes_with_common_vmids_is_held_back_whichever_connects_first() {
        for order in [["z", "a"], ["a", "z"]] {
            let mut ranges = known(&["z", "a"]);
            for name in order {
                ranges.told(&node(name), told(FIRST), false);
            }
            assert_eq!(held(&ranges), pair("a", "z"), "{order:?}");
            // It joins again, and moves.
            ranges.add(&node("z"));
            assert!(ranges.told(&node("z"), told(FIRST), false).is_empty(), "nothing changed");
            assert_eq!(held(&ranges), pair("a", "z"));
        }
    }

    #[test]
    fn node_with_sandboxes_from_the_range_keeps_it() {
        let mut ranges = known(&["new", "old"]);
        ranges.told(&node("new"), told(FIRST), false);
        assert_eq!(held(&ranges), []);
        let touched = ranges.told(&node("old"), told(FIRST), true);
        assert_eq!(touched, ["new", "old"].map(node).into());
        assert_eq!(held(&ranges), pair("new", "old"));
        let why = ranges.overlap(&node("new")).expect("held back").to_string();
        assert!(why.contains("100000-156249 of old") && why.contains("vmids.stripe"), "{why}");
    }

    #[test]
    fn another_stripe_ends_it_and_takes_nothing_from_a_third_node() {
        let mut ranges = known(&["a", "b", "c"]);
        for (name, range) in [("a", FIRST), ("b", FIRST), ("c", SECOND)] {
            ranges.told(&node(name), told(range), false);
        }
        assert_eq!(held(&ranges), pair("b", "a"));
        // A mistake: that one is taken, too.
        let touched = ranges.told(&node("b"), told(SECOND), false);
        assert_eq!(touched, ["a", "b", "c"].map(node).into());
        assert_eq!(held(&ranges), pair("b", "c"));
        ranges.told(&node("b"), told((212_500, 268_749)), false);
        assert_eq!(held(&ranges), []);
        // The range that was given up is free for others.
        ranges.told(&node("c"), told((300_000, 300_099)), false);
        ranges.told(&node("b"), told(SECOND), false);
        assert_eq!(held(&ranges), []);
    }

    #[test]
    fn forgotten_node_frees_its_range_and_comes_last_when_it_is_back() {
        let mut ranges = known(&["a", "b"]);
        for name in ["a", "b"] {
            ranges.told(&node(name), told(FIRST), false);
        }
        assert_eq!(ranges.forget(&node("a")), [node("b")].into());
        assert_eq!(held(&ranges), []);
        ranges.add(&node("a"));
        ranges.told(&node("a"), told(FIRST), false);
        assert_eq!(held(&ranges), pair("a", "b"));
    }

    #[test]
    fn numbers_that_a_node_has_given_are_kept_until_it_tells_its_range() {
        let mut ranges = known(&["away", "here", "other"]);
        for vmid in [100_004, 100_001, 900_000] {
            ranges.gave(&node("away"), vmid);
        }
        assert_eq!(ranges.told(&node("here"), told(FIRST), false), [node("here")].into());
        ranges.told(&node("other"), told(SECOND), false);
        assert_eq!(held(&ranges), pair("here", "away"));
        let why = ranges.overlap(&node("here")).expect("held back").to_string();
        assert!(why.contains("100001-100004 of away"), "{why}");
        // It is back with another range.
        let touched = ranges.told(&node("away"), told((300_000, 300_099)), false);
        assert_eq!(touched, ["away", "here"].map(node).into());
        assert_eq!(held(&ranges), []);
    }

    #[test]
    fn numbers_that_a_node_has_given_hold_back_as_its_range_would() {
        // Both have sandboxes, so the one that is known longer keeps the range, with the other one away or not.
        for (first, held_back) in [("away", pair("here", "away")), ("here", Vec::new())] {
            let second = if first == "away" { "here" } else { "away" };
            let mut ranges = known(&[first, second]);
            ranges.gave(&node("away"), 100_001);
            ranges.told(&node("here"), told(FIRST), true);
            assert_eq!(held(&ranges), held_back, "{first} is known longer");
        }
        // A forgotten one keeps nothing.
        let mut ranges = known(&["away", "here"]);
        ranges.gave(&node("away"), 100_001);
        ranges.told(&node("here"), told(FIRST), false);
        assert_eq!(ranges.forget(&node("away")), [node("here")].into());
        assert_eq!(held(&ranges), []);
        // One that is in no configuration any more holds back only who has no sandboxes.
        for is_used in [true, false] {
            let mut ranges = known(&["here"]);
            ranges.gave(&node("away"), 100_001);
            ranges.told(&node("here"), told(FIRST), is_used);
            assert_eq!(held(&ranges).is_empty(), is_used);
        }
        // An agent that tells no range.
        let mut ranges = known(&["away", "here"]);
        ranges.gave(&node("away"), 100_001);
        ranges.told(&node("here"), told(FIRST), false);
        assert_eq!(ranges.told(&node("away"), None, false), ["away", "here"].map(node).into());
        assert_eq!(held(&ranges), []);
    }

    #[test]
    fn agents_that_tell_no_range_are_not_compared() {
        for none in [(0, 0), (0, 9), (9, 8)] {
            assert_eq!(told(none), None, "{none:?}");
        }
        let mut ranges = known(&["a", "b"]);
        for name in ["a", "b"] {
            ranges.told(&node(name), None, false);
        }
        assert_eq!(held(&ranges), []);
    }

    #[test]
    fn ranges_overlap_if_they_have_a_number_in_common() {
        let range = |first, last| VmidRange { first, last };
        let one = range(200, 299);
        for other in [range(299, 400), range(100, 200), range(250, 250), range(1, 999)] {
            assert!(one.overlaps(other) && other.overlaps(one), "{other}");
        }
        for other in [range(300, 400), range(100, 199)] {
            assert!(!one.overlaps(other) && !other.overlaps(one), "{other}");
        }
        assert!(one.has(200) && one.has(299) && !one.has(199) && !one.has(300));
    }
}
