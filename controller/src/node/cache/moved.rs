//! A sandbox that goes to another node is on both of them for a moment: which one counts, and where it
//! goes on.

use proto::{
    Cause, Reason,
    sandbox::v1::{Phase, Sandbox},
};

use super::{Entry, Inner, ended};

/// A node took it over: this is the end of it on one node, and not its end.
pub(super) fn has_moved(sandbox: &Sandbox) -> bool {
    ended(sandbox) && sandbox.cause() == Cause::Moved
}

/// Its container is not on its node any more.
pub(super) fn is_gone(sandbox: &Sandbox) -> bool {
    sandbox.failure.as_ref().is_some_and(|failure| match failure.reason() {
        Reason::ContainerGone => true,
        // What a deletion comes to then.
        Reason::NotOurs => sandbox.phase() == Phase::Deleting,
        _ => false,
    })
}

impl Entry {
    /// What the node says of it that has taken it over, before its own node has left it.
    pub(super) fn twin(&self) -> Option<&Sandbox> {
        let same = |there: &&Sandbox| !self.creating && there.attempt == self.sandbox.attempt;
        self.later.as_deref().filter(same)
    }
}

impl Inner {
    /// A sandbox goes on where it has moved to; what that node said of it before counts now.
    pub(super) fn go_on(&self, entry: &mut Entry, left: &Sandbox) {
        let there = entry.later.take().filter(|there| there.attempt == left.attempt);
        let mut node = &left.node;
        match &there {
            Some(there) if !has_moved(there) => entry.sandbox = Sandbox::clone(there),
            // Its revisions are of another journal.
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

    /// Its node has it no more, but another had taken it over, and it goes on there.
    pub(super) fn stays(&mut self, entry: &Entry) -> bool {
        let Some(there) = entry.twin().filter(|there| !ended(there)).cloned() else { return false };
        let mut entry = entry.clone();
        self.go_on(&mut entry, &there);
        self.dirty.insert(entry.id);
        self.put(entry);
        true
    }
}
