//! How the cache keeps a sandbox: in a fraction of the memory of its message, which is mostly
//! pointers. The message is kept as it goes over the wire, beside the few numbers that are looked at
//! without it; owners and nodes, of which there are few, are kept by number.

use std::collections::BTreeMap;

use prost::Message;
use proto::{
    Cause,
    id::SandboxId,
    sandbox::v1::{Phase, Sandbox},
};

/// True for a sandbox that is gone.
pub(super) fn ended(sandbox: &Sandbox) -> bool {
    matches!(sandbox.phase(), Phase::Deleted | Phase::Failed)
}

/// True when an operator ended it without its container: that may be recovered on another node, or be there
/// when a node comes back that was given up.
pub(super) fn was_let_go(sandbox: &Sandbox) -> bool {
    ended(sandbox) && matches!(sandbox.cause(), Cause::Released | Cause::NodeLost)
}

/// A sandbox.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    /// Without its id, under which it is kept.
    message: Box<[u8]>,
    /// In place of the message's: 0 when it is of a journal that is gone.
    pub(super) revision: u64,
    /// As in `Entry`.
    pub(super) ended_ms: u64,
    /// The last inventory of its node in which it was.
    pub(super) inventory: u64,
    /// As in `Entry`.
    pub(super) later: Option<Box<Sandbox>>,
    /// Its owner's number.
    pub(super) team: u32,
    /// Its node's number.
    pub(super) node: Option<u32>,
    /// As in the message.
    pub(super) vmid: u32,
    /// As in the message.
    pub(super) attempt: u32,
    /// As in `Entry`.
    pub(super) creating: bool,
    /// As in `Entry`.
    pub(super) lost: bool,
    /// It is deleted or has failed, by the message.
    pub(super) over: bool,
    /// An operator ended it without its container.
    pub(super) let_go: bool,
}

impl Kept {
    /// Of an owner and on a node, settled.
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

    /// A sandbox that is gone.
    pub(super) fn ended(&self) -> bool {
        !self.creating && self.over
    }

    /// The message, with its id and the revision that holds.
    pub(super) fn sandbox(&self, id: &SandboxId) -> Sandbox {
        let mut sandbox = Sandbox::decode(&*self.message).expect("it was encoded here");
        (sandbox.id, sandbox.revision) = (id.to_string(), self.revision);
        sandbox
    }

    /// Its last message was this very one, whatever became of the journal meanwhile.
    pub(super) fn was_told(&self, sandbox: &mut Sandbox) -> bool {
        // Maps are ordered, so the same has the same bytes.
        *self.message == *encode(sandbox)
    }
}

/// Without its id.
fn encode(sandbox: &mut Sandbox) -> Vec<u8> {
    let id = std::mem::take(&mut sandbox.id);
    let message = sandbox.encode_to_vec();
    sandbox.id = id;
    message
}

/// Gives each name a number. There are few, and none is taken back.
#[derive(Debug)]
pub(super) struct Numbers<T> {
    by_name: BTreeMap<T, u32>,
    names: Vec<T>,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { by_name: BTreeMap::new(), names: Vec::new() }
    }
}

impl<T: Ord + Clone> Numbers<T> {
    /// The number of a name, which has one from now on.
    pub(super) fn give(&mut self, name: &T) -> u32 {
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let number = u32::try_from(self.names.len()).expect("fewer names than 2^32");
        self.names.push(name.clone());
        self.by_name.insert(name.clone(), number);
        number
    }

    /// The number of a name, if it has one.
    pub(super) fn find(&self, name: &T) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// The name of a number that was given.
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
        let mut kept = Kept::new(1, None, &mut told);
        assert_eq!(kept.sandbox(&id), told);
        kept.revision = 0;
        assert_eq!(kept.sandbox(&id), Sandbox { revision: 0, ..told.clone() });
        assert!(kept.was_told(&mut told), "although the journal is another");
        assert!(!kept.was_told(&mut Sandbox { revision: 8, ..told }));
    }

    #[test]
    fn a_name_keeps_its_number() {
        let mut numbers = Numbers::default();
        assert_eq!((numbers.give(&"a"), numbers.give(&"b"), numbers.give(&"a")), (0, 1, 0));
        assert_eq!(
            (numbers.find(&"b"), numbers.find(&"c"), *numbers.name(1)),
            (Some(1), None, "b")
        );
    }
}
