//! Previews the next actions of the reconciler and their reasons, without executing them.

use std::sync::Arc;

use super::{Action, Options, Waker, intended, plan};
use crate::sandbox::{
    Sandboxes,
    garbage::{Garbage, Item},
    observe,
};

/// Preview of the next pass.
#[derive(Debug)]
pub struct Preview {
    sandboxes: Arc<Sandboxes>,
    options: Options,
    waker: Waker,
}

impl Preview {
    /// Creates the preview for the reconciler with these options, which `waker` wakes.
    pub fn new(sandboxes: Arc<Sandboxes>, options: Options, waker: Waker) -> Self {
        Self { sandboxes, options, waker }
    }
}

#[async_trait::async_trait]
impl Garbage for Preview {
    async fn look(&self) -> Vec<Item> {
        match observe::observe(&**self.sandboxes.pve()).await {
            Ok(observed) if observed.cluster.quorate => {
                let actions = plan(&intended(&self.sandboxes, &self.options), &observed);
                actions.iter().map(item).collect()
            }
            Ok(_) => vec![nothing("without quorum nothing is done, for absence proves nothing")],
            Err(error) => vec![nothing(&error.to_string())],
        }
    }

    fn collect(&self) {
        self.waker.wake();
    }
}

fn nothing(why: &str) -> Item {
    Item { action: "unchecked", subject: "/etc/pve".into(), why: why.into() }
}

fn item(action: &Action) -> Item {
    let of = |word, subject: &dyn ToString, why: &str| Item {
        action: word,
        subject: subject.to_string(),
        why: why.into(),
    };
    match action {
        Action::Unlock(vmid) => {
            of("unlock", vmid, "a clone of ours died and left this template locked")
        }
        Action::Undo(id) => of("undo", id, "its creation was cut short, and nobody works on it"),
        Action::Delete(id) => of("delete", id, "its deletion was asked for and has not ended"),
        Action::Stop(id) => of("stop", id, "a stop was asked for and has not ended"),
        Action::Start(id) => of("start", id, "a start was asked for and has not ended"),
        Action::EnforcePause(id) => of(
            "enforce_pause",
            id,
            "it is not frozen and locked, or not thawed and unlocked, as it should",
        ),
        Action::Look(id) => {
            of("look", id, "its container has drifted from its record, which will be recorded")
        }
        Action::Adopt(id) => of("adopt", id, "its adoption was cut short"),
        Action::Release(id) => of("release", id, "it was to be given back, and that has not ended"),
        Action::Unmark { id, vmid } => {
            of("release", vmid, &format!("it carries the mark of {id} again, which was given back"))
        }
        Action::Sweep { id, vmid } => of(
            "destroy",
            vmid,
            &format!("it carries the mark of {id}, which has ended; if it is seen twice"),
        ),
        Action::Clear(vmid) => {
            of("destroy", vmid, "a destruction of ours was cut off, and only its lock is left")
        }
        Action::Quarantine { vmid, mark } => of(
            "quarantined",
            vmid,
            &format!(
                "it carries the mark of {}, which this node's journal does not know: left alone, \
                 until it is recovered or loses its mark",
                mark.sandbox_id
            ),
        ),
        Action::TooMany { sweeps, marked } => of(
            "too_many",
            sweeps,
            &format!("of {marked} containers with a mark so many have ended: none is destroyed"),
        ),
        Action::Forget { before_ms } => {
            of("forget", before_ms, "tombstones from before this moment are old enough")
        }
    }
}
