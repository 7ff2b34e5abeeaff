//! Rules for a sandbox that moves to another node and is on both for a moment: which record counts,
//! and where the sandbox continues.

use proto::sandbox::v1::Sandbox;

use super::{
    Entry,
    compact::{ended, has_moved},
    index::Index,
};

impl Entry {
    /// Returns the importing node's record, while the first node has not dropped its own.
    pub(super) fn imported_record(&self) -> Option<&Sandbox> {
        let same = |there: &&Sandbox| !self.creating && there.attempt == self.sandbox.attempt;
        self.elsewhere.as_deref().filter(same)
    }
}

impl Index {
    /// Continues a sandbox on the node that it moved to: that node's earlier report counts now.
    pub(super) fn follow(&self, entry: &mut Entry, left: &Sandbox) {
        let there = entry.elsewhere.take().filter(|there| there.attempt == left.attempt);
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
    pub(super) fn continue_elsewhere(&mut self, entry: &Entry) -> bool {
        let Some(there) = entry.imported_record().filter(|there| !ended(there)).cloned() else {
            return false;
        };
        let mut entry = entry.clone();
        self.follow(&mut entry, &there);
        self.dirty.insert(entry.id);
        self.put(entry);
        true
    }
}
