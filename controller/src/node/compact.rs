//! Compact form of a sandbox in the cache: a fraction of the memory of the decoded message, which
//! is mostly pointers. The encoded message is kept, beside the few numbers that are read without
//! decoding. Teams and nodes, which are few, are stored as numbers.

use std::collections::BTreeMap;

use prost::Message;
use proto::{
    Cause,
    id::SandboxId,
    sandbox::v1::{Phase, Sandbox},
};

/// Returns true for a deleted or failed sandbox.
pub(super) fn ended(sandbox: &Sandbox) -> bool {
    matches!(sandbox.phase(), Phase::Deleted | Phase::Failed)
}

/// Returns true when an operator ended the sandbox without its container. The container may be
/// recovered on another node, or reappear when a forgotten node comes back.
pub(super) fn was_let_go(sandbox: &Sandbox) -> bool {
    ended(sandbox) && matches!(sandbox.cause(), Cause::Released | Cause::NodeLost)
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
    pub(super) later: Option<Box<Sandbox>>,
    /// Number of its team.
    pub(super) team: u32,
    /// Number of its node.
    pub(super) node: Option<u32>,
    /// As in the message.
    pub(super) vmid: u32,
    /// As in the message.
    pub(super) attempt: u32,
    /// As in `Entry`.
    pub(super) creating: bool,
    /// As in `Entry`.
    pub(super) lost: bool,
    /// Whether the message says that it is deleted or failed.
    pub(super) over: bool,
    /// Whether an operator ended it without its container.
    pub(super) let_go: bool,
}

impl CompactSandbox {
    /// Encodes a sandbox of a team on a node, with its creation over.
    pub(super) fn new(team: u32, node: Option<u32>, sandbox: &mut Sandbox) -> Self {
        Self {
            message: encode(sandbox).into(),
            revision: sandbox.revision,
            ended_ms: 0,
            inventory: 0,
            later: None,
            team,
            node,
            vmid: sandbox.vmid,
            attempt: sandbox.attempt,
            creating: false,
            lost: false,
            over: ended(sandbox),
            let_go: was_let_go(sandbox),
        }
    }

    /// Returns true when the sandbox is deleted or failed and its creation is over.
    pub(super) fn ended(&self) -> bool {
        !self.creating && self.over
    }

    /// Decodes the message, with its id and the current revision.
    pub(super) fn sandbox(&self, id: &SandboxId) -> Sandbox {
        let mut sandbox = Sandbox::decode(&*self.message).expect("it was encoded here");
        (sandbox.id, sandbox.revision) = (id.to_string(), self.revision);
        sandbox
    }

    /// Returns true when the last message was the same, even if the journal changed meanwhile.
    pub(super) fn was_told(&self, sandbox: &mut Sandbox) -> bool {
        // Maps are ordered, so equal messages have equal bytes.
        *self.message == *encode(sandbox)
    }
}

/// Encodes a sandbox without its id.
fn encode(sandbox: &mut Sandbox) -> Vec<u8> {
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
    pub(super) fn give(&mut self, name: &T) -> u32 {
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
    use proto::sandbox::v1::Phase;

    use super::*;

    #[test]
    fn what_is_kept_is_the_message_with_the_revision_that_holds() {
        let id = SandboxId::new(1, &[1; 10]);
        let mut told = Sandbox {
            id: id.to_string(),
            vmid: 100,
            metadata: BTreeMap::from([("a".into(), "b".into())]),
            attempt: 2,
            revision: 7,
            ..Sandbox::default()
        };
        told.set_phase(Phase::Running);
        let mut kept = CompactSandbox::new(1, None, &mut told);
        assert_eq!(kept.sandbox(&id), told);
        kept.revision = 0;
        assert_eq!(kept.sandbox(&id), Sandbox { revision: 0, ..told.clone() });
        assert!(kept.was_told(&mut told), "although the journal is another");
        assert!(!kept.was_told(&mut Sandbox { revision: 8, ..told }));
    }

    #[test]
    fn a_name_keeps_its_number() {
        let mut numbers = Interner::default();
        assert_eq!((numbers.give(&"a"), numbers.give(&"b"), numbers.give(&"a")), (0, 1, 0));
        assert_eq!(
            (numbers.find(&"b"), numbers.find(&"c"), *numbers.name(1)),
            (Some(1), None, "b")
        );
    }
}
