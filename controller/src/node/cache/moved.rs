//! Rules for a sandbox that moves to another node and is on both for a moment: which record counts,
//! and where the sandbox continues.

use proto::{
    Cause, Reason,
    sandbox::v1::{Phase, Sandbox},
};

use super::{Entry, Inner, ended};

/// Returns true for the tombstone of a sandbox that moved: it ended on this node only.
pub(super) fn has_moved(sandbox: &Sandbox) -> bool {
    ended(sandbox) && sandbox.cause() == Cause::Moved
}

/// Returns true when the container is no longer on the node of this record.
pub(super) fn is_gone(sandbox: &Sandbox) -> bool {
    sandbox.failure.as_ref().is_some_and(|failure| {
        let reason = failure.reason();
        // NOT_OURS is what a deletion leads to then.
        reason == Reason::ContainerGone
            || reason == Reason::NotOurs && sandbox.phase() == Phase::Deleting
    })
}

impl Entry {
    /// Returns the importing node's record, while the first node has not dropped its own.
    pub(super) fn twin(&self) -> Option<&Sandbox> {
        let same = |there: &&Sandbox| !self.creating && there.attempt == self.sandbox.attempt;
        self.later.as_deref().filter(same)
    }
}

impl Inner {
    /// Continues a sandbox on the node that it moved to: that node's earlier report counts now.
    pub(super) fn go_on(&self, entry: &mut Entry, left: &Sandbox) {
        let there = entry.later.take().filter(|there| there.attempt == left.attempt);
        let mut node = &left.node;
        match &there {
            Some(there) if !has_moved(there) => entry.sandbox = Sandbox::clone(there),
            // The other node's revisions are of another journal.
            _ => (entry.sandbox.revision, entry.sandbox.failure) = (0, None),
        }
        if let Some(there) = &there {
            node = &there.node;
        }
        entry.sandbox.node.clone_from(node);
        (entry.node, entry.lost) = (node.parse().ok(), false);
        let on = entry.node.as_ref().and_then(|node| self.inventories.get(node));
        entry.inventory = on.copied().unwrap_or_default();
    }

    /// Continues a sandbox on the node that imported it when its own node no longer has it. Returns
    /// false when no other node has a living record.
    pub(super) fn stays(&mut self, entry: &Entry) -> bool {
        let Some(there) = entry.twin().filter(|there| !ended(there)).cloned() else { return false };
        let mut entry = entry.clone();
        self.go_on(&mut entry, &there);
        self.dirty.insert(entry.id);
        self.put(entry);
        true
    }
}
