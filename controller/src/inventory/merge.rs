//! Decides what a node's report of a sandbox changes. Pure.
//!
//! A record is named by its node and its attempt. The reports of the known record replace each
//! other by revision; those of other records count only where the table of `merge` says so.

use std::cmp::Ordering::{Equal, Greater, Less};

use proto::{name::NodeName, sandbox::v1::Sandbox};

use super::compact::{CompactSandbox, Stage, ended, has_moved, is_gone};

/// Known state of a sandbox.
#[derive(Debug)]
pub(super) struct Known<'a> {
    /// Node of the known record; `None` while the sandbox is being placed.
    pub(super) node: Option<&'a NodeName>,
    /// Known record.
    pub(super) sandbox: &'a CompactSandbox,
}

/// Report of a sandbox.
#[derive(Debug)]
pub(super) struct Report<'a> {
    /// Node that reports.
    pub(super) node: &'a NodeName,
    /// Record of that node.
    pub(super) sandbox: &'a Sandbox,
    /// Encoded record, as `compact::encode` does it.
    pub(super) message: &'a [u8],
}

/// Outcome of applying a node's report of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The report changed the entry.
    Changed,
    /// The report contained nothing new.
    Known,
    /// The report is of another record than the known one, and is not shown.
    Ignored,
    /// An attempt that does not count any more is alive on a node, which must cancel it.
    StaleAttempt {
        /// Node that has the attempt.
        node: NodeName,
        /// Number of the attempt.
        attempt: u32,
    },
    /// The container moved to another node; `left` must drop its record.
    Moved {
        /// Node that the container left.
        left: NodeName,
        /// Node that has the container.
        to: NodeName,
    },
    /// An identity in the report is malformed.
    Malformed,
}

/// Change that a report makes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Merge {
    /// Nothing changes.
    Keep(Applied),
    /// The known state is confirmed, with this revision.
    Confirm(u64),
    /// The report becomes the entry's record of another node, or that record is dropped.
    Elsewhere { drop: bool, applied: Applied },
    /// The sandbox continues on the node that it moved to.
    Follow,
    /// The report becomes the known state.
    Replace(Applied),
}

/// Decides what a report changes in the known state.
pub(super) fn merge(known: Option<&Known<'_>>, report: &Report<'_>) -> Merge {
    let (moved, alive) = (has_moved(report.sandbox), !ended(report.sandbox));
    let Some(known) = known else {
        // The node that has the sandbox now reports it.
        return if moved { Merge::Keep(Applied::Known) } else { Merge::Replace(Applied::Changed) };
    };
    let old = known.sandbox;
    let attempt = report.sandbox.attempt.cmp(&old.attempt);
    let here = known.node == Some(report.node);
    // An answer to a call may arrive after what the watch has reported since.
    let outdated = report.sandbox.revision < old.revision;
    match (old.stage(), attempt, here) {
        // During a creation its task decides which attempt stays.
        (Stage::Creating, Greater, false) => later_attempt(old, report),
        // From now on the reports of the other node count.
        (Stage::Alive, Equal, true) if moved && !outdated => Merge::Follow,
        (Stage::Creating | Stage::Alive, Equal, true) => same_record(old, report),
        (Stage::Detached, Equal, true) if outdated => Merge::Confirm(old.revision),
        (Stage::Detached, _, _) if alive => replace(known, report),
        // A tombstone that the controller wrote is not replaced by the node's own.
        (Stage::Ended | Stage::Detached, Equal, true) => Merge::Confirm(old.revision),
        // The old node no longer has even the tombstone, which is older than what nodes keep.
        (Stage::Alive, Equal, false) if old.lost && alive => replace(known, report),
        // A MOVED tombstone concerns its own node only.
        (Stage::Alive, Equal, false) if !moved || is_elsewhere(old, report) => {
            second_record(known, report)
        }
        _ if moved => Merge::Keep(Applied::Ignored),
        // Our store was behind. The tombstone of an earlier attempt does not apply to a later one.
        (_, Greater, _) => replace(known, report),
        (_, Less, _) if alive => Merge::Keep(stale_attempt(report)),
        // The sandbox was deleted where it had moved to.
        (Stage::Ended, Equal, false) if alive && is_gone(report.sandbox) => {
            Merge::Keep(stale_attempt(report))
        }
        (_, Less | Equal, _) => Merge::Keep(Applied::Ignored),
    }
}

/// Keeps the latest attempt for the creation's task. Ended attempts count too: a deleted sandbox is
/// not created again.
fn later_attempt(old: &CompactSandbox, report: &Report<'_>) -> Merge {
    let latest = old.elsewhere.as_ref().map_or(0, |later| later.attempt);
    if report.sandbox.attempt < latest {
        return Merge::Keep(Applied::Ignored);
    }
    Merge::Elsewhere { drop: false, applied: Applied::Ignored }
}

fn same_record(old: &CompactSandbox, report: &Report<'_>) -> Merge {
    if report.sandbox.revision < old.revision {
        return Merge::Confirm(old.revision);
    }
    // Byte for byte what is known, and so stored already. Most of an inventory after a restart is
    // like this, and each entry would cost a write.
    if !old.lost && old.is_encoded_as(report.message) {
        return Merge::Confirm(report.sandbox.revision);
    }
    replace_of_node(old, report)
}

/// Handles the same attempt on a second node: one of the two has the container.
fn second_record(known: &Known<'_>, report: &Report<'_>) -> Merge {
    let gone = (is_gone(&known.sandbox.decoded()), is_gone(report.sandbox));
    let applied = match (known.node.filter(|_| !ended(report.sandbox)), gone) {
        (Some(on), (false, true)) => Applied::Moved { left: report.node.clone(), to: on.clone() },
        (Some(on), (true, false)) => Applied::Moved { left: on.clone(), to: report.node.clone() },
        (None, _) | (Some(_), (true, true) | (false, false)) => Applied::Ignored,
    };
    // Without a container the sandbox cannot continue there, nor when it has moved to where it is.
    let moved_here = has_moved(report.sandbox)
        && known.node.is_some_and(|node| node.as_str() == report.sandbox.node);
    Merge::Elsewhere { drop: gone.1 || moved_here, applied }
}

/// Replaces the known record, and cancels it where it is an earlier attempt that is still alive.
fn replace(known: &Known<'_>, report: &Report<'_>) -> Merge {
    let old = known.sandbox;
    match known.node.filter(|node| *node != report.node) {
        Some(node) if old.stage() == Stage::Alive && report.sandbox.attempt > old.attempt => {
            let (node, attempt) = (node.clone(), old.attempt);
            Merge::Replace(Applied::StaleAttempt { node, attempt })
        }
        Some(_) | None => replace_of_node(old, report),
    }
}

/// Replaces the known record. A node that has lost the container drops its record where another
/// node has imported the sandbox.
fn replace_of_node(old: &CompactSandbox, report: &Report<'_>) -> Merge {
    let there = old.elsewhere.as_ref().filter(|there| {
        let same = !old.creating && there.attempt == report.sandbox.attempt;
        same && !ended(there) && is_gone(report.sandbox)
    });
    let to = there.and_then(|there| there.node.parse().ok());
    let moved = to.map(|to| Applied::Moved { left: report.node.clone(), to });
    Merge::Replace(moved.unwrap_or(Applied::Changed))
}

fn is_elsewhere(old: &CompactSandbox, report: &Report<'_>) -> bool {
    old.elsewhere.as_ref().is_some_and(|there| there.node == report.node.as_str())
}

fn stale_attempt(report: &Report<'_>) -> Applied {
    Applied::StaleAttempt { node: report.node.clone(), attempt: report.sandbox.attempt }
}
