//! Reconciles the host with the journal: at the start, periodically, and when woken. Takes no
//! input, is idempotent, and works by the same operations that callers use.
//!
//! `plan` decides and is pure; `apply` acts. Depends on `sandbox`, not on the wire.

mod apply;
pub mod garbage;
pub mod plan;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proto::id::{SandboxId, Vmid};
use tokio::sync::Notify;

use crate::sandbox::{
    Sandboxes,
    drift::observe::{self, Observed},
};
pub use plan::{Action, Intended, plan};

/// Settings of the reconciler.
#[derive(Debug, Clone)]
pub struct Options {
    /// Interval between two passes.
    pub period: Duration,
    /// Retention of tombstones.
    pub tombstones: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { period: Duration::from_secs(10), tombstones: Duration::from_secs(24 * 3600) }
    }
}

/// Handle that wakes the reconciler.
#[derive(Debug, Clone, Default)]
pub struct Waker(Arc<Notify>);

impl Waker {
    /// Starts the next pass now.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

/// Task that makes the host match the journal.
#[derive(Debug)]
pub struct Reconciler {
    sandboxes: Arc<Sandboxes>,
    options: Options,
    waker: Waker,
    /// Containers with a mark that the journal does not know, as of the last pass: each is reported
    /// once.
    quarantined: BTreeSet<Vmid>,
    /// Containers that the last plan would destroy. Only those that are planned a second time are destroyed.
    orphans: BTreeSet<(Option<SandboxId>, Vmid)>,
}

fn orphans(actions: &[Action]) -> BTreeSet<(Option<SandboxId>, Vmid)> {
    actions.iter().filter_map(orphan).collect()
}

fn orphan(action: &Action) -> Option<(Option<SandboxId>, Vmid)> {
    match action {
        Action::DestroyOrphan { id, vmid } => Some((Some(*id), *vmid)),
        Action::RemoveRemnant(vmid) => Some((None, *vmid)),
        Action::Unlock(_)
        | Action::Undo(_)
        | Action::Delete(_)
        | Action::Stop(_)
        | Action::Start(_)
        | Action::EnforcePause(_)
        | Action::SettleSize(_)
        | Action::RecordDrift(_)
        | Action::Adopt(_)
        | Action::Release(_)
        | Action::Unmark { .. }
        | Action::Quarantine { .. }
        | Action::TooManyOrphans { .. }
        | Action::Forget { .. } => None,
    }
}

impl Reconciler {
    /// Makes the task; `run` runs it.
    pub fn new(sandboxes: Arc<Sandboxes>, options: Options) -> Self {
        Self {
            sandboxes,
            options,
            waker: Waker::default(),
            quarantined: BTreeSet::new(),
            orphans: BTreeSet::new(),
        }
    }

    /// Returns a handle that starts the next pass.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Runs passes until the agent stops.
    pub async fn run(mut self) {
        let stop = self.sandboxes.tasks().stopping().clone();
        while stop.run_until_cancelled(self.pass()).await.is_some() {
            let woken = Arc::clone(&self.waker.0);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.options.period) => {}
                () = woken.notified() => {}
            }
        }
    }

    /// Runs one pass. Returns the actions taken.
    pub async fn pass(&mut self) -> Vec<Action> {
        self.sandboxes.enforce_isolation().await;
        self.sandboxes.enforce_cgroup_limits().await;
        // What an earlier agent has closed is cut, whether the host can be observed or not.
        self.sandboxes.resume_cuts().await;
        let observed = match observe::observe(&**self.sandboxes.pve()).await {
            Ok(observed) => observed,
            Err(error) => {
                tracing::warn!(%error, "the host could not be observed, so nothing is reconciled");
                Observed::default()
            }
        };
        // After the observation, so that an operation that created something in between is known to
        // be under way.
        let intended = self.intended();
        if observed.cluster.quorate {
            self.sandboxes.note_foreign_addresses(&observed).await;
        }
        if let Err(error) = self.sandboxes.note_number(&observed.cluster).await {
            tracing::warn!(%error, "the node's number was not written");
        }
        let mut actions = plan(&intended, &observed);
        // A container that has come back is removed only if the next pass still finds it.
        let twice = |action: &Action| orphan(action).is_none_or(|one| self.orphans.contains(&one));
        let planned = orphans(&actions);
        actions.retain(twice);
        self.orphans = planned;
        self.report(&actions);
        apply::apply(&self.sandboxes, &actions).await;
        actions
    }

    fn intended(&self) -> Intended {
        intended(&self.sandboxes, &self.options)
    }

    fn report(&mut self, actions: &[Action]) {
        let mut quarantined = BTreeSet::new();
        for action in actions {
            if let Action::Quarantine { vmid, mark } = action {
                if !self.quarantined.contains(vmid) {
                    tracing::error!(
                        %vmid, sandbox_id = %mark.sandbox_id,
                        "a container has a mark that the journal does not know; it is left alone"
                    );
                }
                quarantined.insert(*vmid);
            } else if let Action::TooManyOrphans { orphans, marked } = action {
                tracing::error!(
                    orphans,
                    marked,
                    "too many containers of ended sandboxes to destroy at once; none is destroyed"
                );
            } else {
                tracing::info!(?action, "reconciling");
            }
        }
        self.quarantined = quarantined;
    }
}

fn intended(sandboxes: &Sandboxes, options: &Options) -> Intended {
    let templates = sandboxes.options().templates.iter().map(|template| template.vmid);
    let kept = daemon::clock::millis(options.tombstones);
    // Read `busy` before and after: an operation that begins or ends in between waits for the next
    // pass.
    let mut intended = Intended {
        busy: sandboxes.busy(),
        dead_clones: templates.filter(|vmid| sandboxes.has_dead_clone(*vmid)).collect(),
        live: sandboxes.live(),
        ended: sandboxes.ended(),
        forget_before_ms: sandboxes.now_ms().saturating_sub(kept),
        vmids: Some(sandboxes.journal().vmids()),
        life: sandboxes.life(),
    };
    intended.busy.extend(sandboxes.busy());
    intended
}
