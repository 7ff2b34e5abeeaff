//! Compact form of a sandbox in the cache: a fraction of the memory of the decoded message, which
//! is mostly pointers. The encoded message is kept, beside the few numbers that are read without
//! decoding. Teams and nodes, which are few, are stored as numbers.

use std::collections::BTreeMap;

use prost::Message;
use proto::{
    Cause, Progress, Reason,
    id::SandboxId,
    sandbox::v1::{Phase, Sandbox},
    spec::Size,
};

/// Returns true for a deleted or failed sandbox.
pub(super) fn ended(sandbox: &Sandbox) -> bool {
    sandbox.phase().has_ended()
}

/// Returns true for a sandbox under creation whose clone has not begun: its node takes it out of the queue before.
pub(super) fn is_before_clone(sandbox: &Sandbox) -> bool {
    matches!(sandbox.progress(), Progress::Unspecified | Progress::Placing | Progress::Queued)
}

/// Returns true when an operator ended the sandbox without its container. The container may be
/// recovered on another node, or reappear when a forgotten node comes back.
pub(super) fn is_detached(sandbox: &Sandbox) -> bool {
    ended(sandbox) && matches!(sandbox.cause(), Cause::Released | Cause::NodeLost)
}

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

/// Changes a sandbox to what callers see.
pub(super) fn mask(sandbox: &mut Sandbox, creating: bool, reachable: bool) {
    if creating {
        sandbox.set_phase(Phase::Creating);
        // The failure of one attempt stays internal until the creation gives up.
        sandbox.failure = None;
    } else if !ended(sandbox) && !reachable {
        sandbox.set_phase(Phase::Unreachable);
    }
}

/// Stage of a sandbox's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The creation is under way.
    Creating,
    /// Alive, as far as its node reports.
    Alive,
    /// Deleted or failed.
    Ended,
    /// Ended by an operator without its container.
    Detached,
}

/// A sandbox in compact form.
#[derive(Debug, Clone)]
pub(super) struct CompactSandbox {
    /// Encoded message without the id, which is the key in the cache.
    message: Box<[u8]>,
    /// Replaces the message's revision: 0 when that is of a lost journal.
    pub(super) revision: u64,
    /// As in `Entry`.
    pub(super) ended_ms: u64,
    /// Number of the last inventory of its node that contained it.
    pub(super) inventory: u64,
    /// As in `Entry`.
    pub(super) elsewhere: Option<Box<Sandbox>>,
    /// Number of its team.
    pub(super) team: u32,
    /// Number of its node.
    pub(super) node: Option<u32>,
    /// As in the message; `None` for no name.
    pub(super) name: Option<Box<str>>,
    /// Whether it has an open port.
    pub(super) open: bool,
    /// As in the message.
    pub(super) size: Size,
    /// Number of its snapshot, if it asked for no disk: that of the snapshot counts.
    pub(super) disk_of: Option<u32>,
    /// As in the message.
    pub(super) vmid: u32,
    /// As in the message.
    pub(super) attempt: u32,
    /// As in `Entry`.
    pub(super) creating: bool,
    /// Whether its creation waits on its node for the clone.
    pub(super) queued: bool,
    /// As in `Entry`.
    pub(super) lost: bool,
    /// Whether the message says that it is deleted or failed.
    pub(super) over: bool,
    /// Whether an operator ended it without its container.
    pub(super) detached: bool,
}

impl CompactSandbox {
    /// Encodes a sandbox of a team on a node, with its creation over.
    pub(super) fn new(team: u32, node: Option<u32>, sandbox: &mut Sandbox) -> Self {
        Self {
            message: encode(sandbox).into(),
            revision: sandbox.revision,
            ended_ms: 0,
            inventory: 0,
            elsewhere: None,
            team,
            node,
            name: (!sandbox.name.is_empty()).then(|| sandbox.name.as_str().into()),
            open: !sandbox.services.is_empty(),
            size: sandbox.size.unwrap_or_default().into(),
            disk_of: None,
            vmid: sandbox.vmid,
            attempt: sandbox.attempt,
            creating: false,
            queued: false,
            lost: false,
            over: ended(sandbox),
            detached: is_detached(sandbox),
        }
    }

    /// Returns true when the sandbox is deleted or failed and its creation is over.
    pub(super) fn ended(&self) -> bool {
        !self.creating && self.over
    }

    /// Decodes the message as it is, without an id.
    pub(super) fn decoded(&self) -> Sandbox {
        Sandbox::decode(&*self.message).expect("it was encoded here")
    }

    /// Decodes the message, with its id and the current revision.
    pub(super) fn sandbox(&self, id: &SandboxId) -> Sandbox {
        Sandbox { id: id.to_string(), revision: self.revision, ..self.decoded() }
    }

    /// Returns true when the last message was the same, even if the journal changed meanwhile.
    pub(super) fn is_encoded_as(&self, message: &[u8]) -> bool {
        // Maps are ordered, so equal messages have equal bytes.
        *self.message == *message
    }

    /// Returns the stage of its life.
    pub(super) fn stage(&self) -> Stage {
        match (self.creating, self.over, self.detached) {
            (true, _, _) => Stage::Creating,
            (false, false, _) => Stage::Alive,
            (false, true, false) => Stage::Ended,
            (false, true, true) => Stage::Detached,
        }
    }
}

/// Encodes a sandbox without its id.
pub(super) fn encode(sandbox: &mut Sandbox) -> Vec<u8> {
    let id = std::mem::take(&mut sandbox.id);
    let message = sandbox.encode_to_vec();
    sandbox.id = id;
    message
}

/// Interner: gives each name a number. There are few names, and none is removed.
#[derive(Debug)]
pub(super) struct Interner<T> {
    by_name: BTreeMap<T, u32>,
    names: Vec<T>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { by_name: BTreeMap::new(), names: Vec::new() }
    }
}

impl<T: Ord + Clone> Interner<T> {
    /// Returns the number of a name; a new name gets one.
    pub(super) fn intern(&mut self, name: &T) -> u32 {
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let number = u32::try_from(self.names.len()).expect("fewer names than 2^32");
        self.names.push(name.clone());
        self.by_name.insert(name.clone(), number);
        number
    }

    /// Returns the number of a known name.
    pub(super) fn find(&self, name: &T) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Returns the name of a number.
    pub(super) fn name(&self, number: u32) -> &T {
        &self.names[number as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_form_keeps_the_message_and_the_current_revision() {
        let id = SandboxId::new(1, &[1; 10]);
        let mut report = Sandbox {
            id: id.to_string(),
            vmid: 100,
            metadata: BTreeMap::from([("a".into(), "b".into())]),
            attempt: 2,
            revision: 7,
            ..Sandbox::default()
        };
        report.set_phase(Phase::Running);
        let mut known = CompactSandbox::new(1, None, &mut report);
        assert_eq!(known.sandbox(&id), report);
        known.revision = 0;
        assert_eq!(known.sandbox(&id), Sandbox { revision: 0, ..report.clone() });
        assert!(known.is_encoded_as(&encode(&mut report)), "although the journal is another");
        assert!(!known.is_encoded_as(&encode(&mut Sandbox { revision: 8, ..report })));
    }

    #[test]
    fn interner_gives_each_name_one_number() {
        let mut numbers = Interner::default();
        assert_eq!((numbers.intern(&"a"), numbers.intern(&"b"), numbers.intern(&"a")), (0, 1, 0));
        assert_eq!(
            (numbers.find(&"b"), numbers.find(&"c"), *numbers.name(1)),
            (Some(1), None, "b")
        );
    }
}
