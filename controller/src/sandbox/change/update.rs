//! Changes what a sandbox is called, what its caller notes about it, its rules and its size. Its node
//! stores and enforces all of that.

use std::{sync::Arc, time::Duration};

use proto::{
    Progress, Reason,
    id::{Invalid, SandboxId, SandboxRef},
    name::Team,
    sandbox::v1::{self as wire, EventKind, Phase, Sandbox, UpdateSandboxRequest},
    spec::Size,
    update::Update,
};

use tokio::time::{sleep, timeout};

use super::Change;
use crate::{
    inventory::Entry,
    node::{GrowthGuard, SandboxCalls},
    placement::Growth,
    sandbox::{
        Caller, Result, Sandboxes, WAIT,
        quota::{Admitted, can_keep_to},
    },
};

const UPDATE: Change = Change {
    asked: None,
    effects: &[EventKind::LifetimeSet, EventKind::WakeOnSet, EventKind::Resized],
    is_bounded: true,
};

/// Longest wait for a node that changes its record alone, which is quick; a new size has `WAIT`.
const RECORD_WAIT: Duration = Duration::from_secs(2);
/// Shortest and longest time for which a size counts whose change the node has not ended yet.
const HELD_MIN: Duration = Duration::from_secs(5);
const HELD_MAX: Duration = Duration::from_mins(5);

impl Sandboxes {
    /// Changes the fields of a sandbox that the request's mask names.
    ///
    /// # Errors
    /// When the request is wrong; NAME_TAKEN when another sandbox of the team has the name;
    /// REVISION_CONFLICT when the sandbox has another revision; QUOTA_EXCEEDED when it would be too large for
    /// its team; MEMORY_FULL, NO_CAPACITY, STORAGE_FULL or NEVER_FITS when it would be for its node;
    /// EGRESS_REFUSED when it would reach more than its team may; when there is no such sandbox, or its
    /// node does not do it.
    pub async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        mut request: UpdateSandboxRequest,
    ) -> Result<Sandbox> {
        let update = Update::try_from(&request)?;
        let named = request.sandbox.as_ref().map(|sandbox| sandbox.id.as_str());
        let named = named.filter(|id| !id.is_empty());
        let named = named.ok_or_else(|| Invalid::new("sandbox.id", "must be given"))?;
        let entry = self.find(&caller.team, named)?;
        let has = entry.sandbox.size.unwrap_or_default();
        if let Some(size) = update.size {
            check_disk(has, size)?;
        }
        if let (Some(asked), Some(sandbox)) = (&update.egress, &mut request.sandbox) {
            let egress = self.egress(&entry.team, asked.clone())?;
            let node = entry.node.as_ref().and_then(|node| self.nodes.get(node));
            if let Some(node) = node.filter(|node| node.down().is_none()) {
                can_keep_to(&node, (&egress).into())?;
            }
            sandbox.set_egress((&egress).into());
            sandbox.egress_names = egress.names();
        }
        // What it is called may change while this waits for a name. That wait is the caller's alone: whoever hangs up
        // gives up its turn.
        let id = entry.id;
        let name = match &update.name {
            Some(Some(name)) => Some(self.name_for(&caller.team, name, Some(id)).await?),
            Some(None) | None => None,
        };
        // A task of its own: when the caller hangs up, the node renames it all the same, and until the
        // answer is in the cache nobody else may take the name.
        let (this, caller) = (self.clone(), caller.clone());
        let changed = self.to_its_end(caller.permit.clone(), async move {
            let wait = update.size.map_or(RECORD_WAIT, |_| WAIT);
            // The size may have changed during that wait.
            let has = this.nodes.cache.counted_size(&id).unwrap_or(has.into());
            let grows = update.size.map(|size| (has, size.or(has)));
            let admit = |sizes| this.admit_size(&caller.team, id, sizes);
            let admitted = grows.map(admit).transpose()?;
            let change = move |calls: SandboxCalls, epoch, id| async move {
                calls.update(epoch, &id, request, wait).await
            };
            let changed = this.change(&caller, &id.to_string(), UPDATE, change).await;
            drop(name);
            // What the node still works on may end as asked for.
            let under_way = match &changed {
                Ok(sandbox) => sandbox.progress() == Progress::Resize,
                Err(error) => error.reason == Reason::OutcomeUnknown,
            };
            if let Some(admitted) = admitted.filter(|_| under_way) {
                this.count_until_resized(id, admitted);
            }
            changed
        });
        changed.await
    }

    /// Admits a new size of a sandbox: its team may have it, and its node has room for it.
    fn admit_size(
        &self,
        team: &Team,
        id: SandboxId,
        (from, to): (Size, Size),
    ) -> Result<(Admitted, GrowthGuard)> {
        let admitted = self.quotas.admit_size(&self.nodes.cache, team, id, (from, to))?;
        let (entry, node) = self.on_node(team, &id.to_string())?;
        let counts = entry.sandbox.phase() != Phase::Stopped;
        Ok((admitted, self.admit_growth(&node, &Growth::resize(from, to, counts))?))
    }

    /// Counts the size that a sandbox is to have until its node has ended the change.
    fn count_until_resized(self: &Arc<Self>, id: SandboxId, admitted: (Admitted, GrowthGuard)) {
        let this = self.clone();
        self.tasks.spawn(async move {
            let _counted = admitted;
            let mut changes = this.nodes.cache.watch(id);
            let ended = async {
                // An outcome that is not known shows in a later report.
                sleep(HELD_MIN).await;
                loop {
                    changes.mark_unchanged();
                    let entry = this.nodes.cache.get(&SandboxRef::Id(id));
                    let works = |entry: &Entry| entry.sandbox.progress() == Progress::Resize;
                    if !entry.as_ref().is_some_and(works) || changes.changed().await.is_err() {
                        return;
                    }
                }
            };
            // Whatever comes first: the end, the longest time, or the end of the controller.
            let ended = async { timeout(HELD_MAX, ended).await.ok() };
            this.stop.run_until_cancelled(ended).await;
        });
    }
}

/// Refuses a smaller disk early, with the field's name. The node, which knows the container, checks
/// again.
fn check_disk(has: wire::Size, asked: Size) -> Result<(), Invalid> {
    if asked.disk_gib == 0 || asked.disk_gib >= has.disk_gib {
        return Ok(());
    }
    let why = format!("must be at least {}: a disk only grows", has.disk_gib);
    Err(Invalid::new("sandbox.size.disk_gib", why))
}
