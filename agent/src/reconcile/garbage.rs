//! Previews the next actions of the reconciler and their reasons, without executing them.

use std::sync::Arc;

use proto::sandbox::v1::GarbageAction;

use super::{Action, Options, Waker, intended, plan};
use crate::{
    pve::pmxcfs,
    sandbox::{
        Sandboxes,
        drift::{
            garbage::{Garbage, Item},
            observe,
        },
    },
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
    Item { action: GarbageAction::Unchecked, subject: pmxcfs::ROOT.into(), why: why.into() }
}

fn item(action: &Action) -> Item {
    let of = |word, subject: &dyn ToString, why: &str| Item {
        action: word,
        subject: subject.to_string(),
        why: why.into(),
    };
    match action {
        Action::Unlock(vmid) => {
            of(GarbageAction::Unlock, vmid, "a clone of ours died and left this template locked")
        }
        Action::Undo(id) => of(GarbageAction::Undo, id, "its creation was interrupted"),
        Action::Delete(id) => of(GarbageAction::Delete, id, "its deletion was interrupted"),
        Action::Stop(id) => of(GarbageAction::Stop, id, "its stop was interrupted"),
        Action::Start(id) => of(GarbageAction::Start, id, "its start was interrupted"),
        Action::EnforcePause(id) => {
            of(GarbageAction::EnforcePause, id, "its freezer and its lock do not match its phase")
        }
        Action::SettleSize(id) => {
            of(GarbageAction::SettleSize, id, "a change of its size was interrupted")
        }
        Action::RecordDrift(id) => of(
            GarbageAction::Look,
            id,
            "its container differs from its record; the record will be corrected",
        ),
        Action::Adopt(id) => of(GarbageAction::Adopt, id, "its adoption was interrupted"),
        Action::Release(id) => of(GarbageAction::Release, id, "its release was interrupted"),
        Action::Unmark { id, vmid } => of(
            GarbageAction::Release,
            vmid,
            &format!("it carries the mark of {id} again, which was released"),
        ),
        Action::DestroyOrphan { id, vmid } => of(
            GarbageAction::Destroy,
            vmid,
            &format!(
                "it carries the mark of {id}, which has ended; destroyed when a second pass still finds it"
            ),
        ),
        Action::RemoveRemnant(vmid) => of(
            GarbageAction::Destroy,
            vmid,
            "a destruction was interrupted, and only its lock is left",
        ),
        Action::Quarantine { vmid, mark } => of(
            GarbageAction::Quarantined,
            vmid,
            &format!(
                "it carries the mark of {}, which the journal of this node does not know: left alone \
                 until it is recovered or loses its mark",
                mark.sandbox_id
            ),
        ),
        Action::TooManyOrphans { orphans, marked } => of(
            GarbageAction::TooMany,
            orphans,
            &format!(
                "so many of {marked} marked containers belong to ended sandboxes: none is destroyed"
            ),
        ),
        Action::Forget { before_ms } => {
            of(GarbageAction::Forget, before_ms, "older tombstones are dropped")
        }
    }
}
