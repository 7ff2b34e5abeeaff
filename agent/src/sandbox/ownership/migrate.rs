//! Moves a stopped sandbox to another node that sees its volumes, to empty this one.
//!
//! | step | undo |
//! |---|---|
//! | here, `export`: the container's config goes to the other node | none: `drain` repeats |
//! | here, `export`: the record is frozen and returned to the caller | none |
//! | there, `import`: the record in that journal, with an address of that node | none |
//! | here, `forget_moved`: the record ends as moved | none |
//!
//! Cut off in between, a controller that hears both nodes continues.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    name::NodeName,
    spec::Network,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    clock::Moment,
    journal::{self, Lifetime, Phase, Record},
    pve::ErrorKind,
    sandbox::{
        Dhcp, Error, Event, Known, Result, Sandboxes,
        core::operations::{OperationKind, lost},
        drift::detect::ContainerLocation,
    },
};

/// Sandbox in transit to another node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exported {
    /// Complete record from its node.
    pub record: Record,
    /// Clocks of its node at that time: no two nodes have the same.
    pub now: Moment,
}

impl Sandboxes {
    /// Gives the container to the node. Returns the sandbox and the node that has the container:
    /// the earlier target, if it was given away before.
    ///
    /// # Errors
    /// NOT_MOVABLE when it is not stopped, was adopted, or the other node is not online or does not
    /// see its volumes; NOT_OURS when its container is no longer its own.
    pub async fn export(
        self: &Arc<Self>,
        id: &SandboxId,
        target: &NodeName,
        wait: Duration,
    ) -> Result<(Exported, NodeName)> {
        let to = target.clone();
        self.living_or_going(id)?;
        let export = self.operate(id, OperationKind::ExportSandbox, wait, |sandboxes, id| {
            sandboxes.export_now(id, to).boxed()
        });
        let record = export.await?;
        match self.place(&record).await? {
            Some(ContainerLocation::Elsewhere(node)) => {
                let (record, now) = (Record::clone(&record), self.clock.moment());
                Ok((Exported { record, now }, node))
            }
            Some(
                ContainerLocation::Here { .. } | ContainerLocation::Taken | ContainerLocation::Gone,
            )
            | None => {
                let why = format!("{id} is not on another node: ask again");
                Err(Error::new(Reason::NotMovable, why))
            }
        }
    }

    async fn export_now(&self, id: &SandboxId, target: NodeName) -> Result<Arc<Record>> {
        let record = self.living_or_going(id)?;
        let going = record.phase == Phase::Deleting;
        if !(record.phase == Phase::Stopped || going) || record.adopted {
            let why = format!("{id} is not stopped, or was adopted: it stays where it is");
            return Err(Error::new(Reason::NotMovable, why));
        }
        match self.place(&record).await? {
            Some(ContainerLocation::Here { running: false, .. }) if !going => {}
            // Also for one that was deleted after it was given away: the other node deletes it.
            Some(ContainerLocation::Elsewhere(_)) => return self.mark_exported(record).await,
            Some(
                ContainerLocation::Here { .. } | ContainerLocation::Taken | ContainerLocation::Gone,
            )
            | None => {
                let why = format!(
                    "the container of {id} runs, is being deleted, or does not carry its mark"
                );
                return Err(Error::new(Reason::NotMovable, why));
            }
        }
        let exported = self.pve.move_config_to(record.vmid, id, &target).await;
        exported.map_err(|error| {
            if matches!(error.kind, ErrorKind::WrongState(_)) {
                return Error::new(Reason::NotMovable, format!("{id}: {error}"));
            }
            Error::from(error)
        })?;
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, %target, "container given to another node");
        self.mark_exported(record).await
    }

    /// Marks the record as exported: from now on requests for the sandbox go to the other node.
    async fn mark_exported(&self, record: Arc<Record>) -> Result<Arc<Record>> {
        if record.phase == Phase::Deleting || record.progress == Progress::Export {
            return Ok(record);
        }
        self.records.change(&record.id, |record| record.progress = Progress::Export).await
    }

    /// Takes over a sandbox whose container another node gave to this one: stopped, with its whole
    /// record, and with an address of this node. One that was being deleted is deleted here.
    ///
    /// # Errors
    /// NOT_OURS when its container is not here; SANDBOX_KNOWN when a sandbox with its vmid or
    /// request is here; ADDRESSES_EXHAUSTED; NODE_NUMBER_CHANGED.
    pub async fn import(
        self: &Arc<Self>,
        exported: Exported,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        let Exported { record, now } = exported;
        let (id, vmid) = (record.id, record.vmid);
        let (phase, progress) = if record.phase == Phase::Deleting {
            (Phase::Deleting, Progress::Done)
        } else {
            (Phase::Stopped, Progress::Import)
        };
        match self.known(&SandboxRef::Id(id)) {
            Some(Known::Live(known)) if known.vmid == vmid && phase == Phase::Deleting => {
                return self.delete(&id, wait).await;
            }
            Some(Known::Live(known)) if known.vmid == vmid => {}
            Some(Known::Live(_)) => {
                return Err(Error::new(Reason::SandboxKnown, format!("{id} is here already")));
            }
            Some(Known::Ended(_)) | None => {
                let config = self.container(vmid).await?;
                if config.mark() != Some(record.mark()) || config.is_template() {
                    let why = format!("container {vmid} does not carry the mark of {id}");
                    return Err(Error::new(Reason::NotOurs, why));
                }
                self.check_number().await?;
                self.unlock_before(&id, Instant::now() + self.options.limits.turn).await?;
                let network = match self.options.network.dhcp {
                    Dhcp::Refused => Network::Static,
                    Dhcp::OnRequest => record.network,
                    Dhcp::All => Network::Dhcp,
                };
                let here = self.clock.moment();
                let moment = |moment: &Moment| moment.elsewhere(&now, &here);
                let expires = record.lifetime.expires.as_ref().map(moment);
                self.write_taken(Record {
                    phase,
                    progress,
                    failure: None,
                    moved_to: None,
                    ip: None,
                    ip_granted: false,
                    network,
                    since: moment(&record.since),
                    lifetime: Lifetime { expires, ..record.lifetime.clone() },
                    revision: 0,
                    ..record
                })
                .await?;
            }
        }
        let taken = self.living_or_going(&id)?;
        if taken.phase == Phase::Deleting {
            return Ok(taken);
        }
        self.finish_adoption(&id, wait).await
    }

    /// Writes the record on its own task, as `amend_living` does.
    async fn write_taken(self: &Arc<Self>, record: Record) -> Result<()> {
        let (sandboxes, vmid) = (Arc::clone(self), record.vmid);
        let written = self.tasks.run(async move {
            let (taken, now_ms) = (sandboxes.taken_addresses().await, sandboxes.now_ms());
            sandboxes.records.import(&record, taken, now_ms).await
        });
        written.await.ok_or_else(lost)?.map(drop).map_err(|error| {
            if matches!(error, journal::Error::Conflict { .. }) {
                let why = "another sandbox has its number or its request";
                return Error::new(Reason::SandboxKnown, format!("container {vmid}: {why}"));
            }
            error.into()
        })
    }

    /// Ends the record of a sandbox that `to` has taken over with its container. A sandbox that has
    /// ended already stays as it is.
    ///
    /// # Errors
    /// NOT_MOVABLE when its container is not there.
    pub async fn forget_moved(
        self: &Arc<Self>,
        id: &SandboxId,
        to: &NodeName,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        let to = to.clone();
        if self.records.index.live(id).is_none() {
            return self.get(&SandboxRef::Id(*id)).await;
        }
        self.operate(id, OperationKind::ForgetMoved, wait, |sandboxes, id| {
            sandboxes.forget_moved_now(id, to).boxed()
        })
        .await
    }

    async fn forget_moved_now(&self, id: &SandboxId, to: NodeName) -> Result<Arc<Record>> {
        let record = self.living_or_going(id)?;
        let place = self.place(&record).await?;
        if !matches!(&place, Some(ContainerLocation::Elsewhere(there)) if *there == to) {
            let why = format!("container {} of {id} is not on {to}", record.vmid);
            return Err(Error::new(Reason::NotMovable, why));
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, node = %to, "sandbox moved to another node");
        self.end_as_moved(id, to).await
    }

    async fn end_as_moved(&self, id: &SandboxId, there: NodeName) -> Result<Arc<Record>> {
        self.advance_because(id, Event::Released, Cause::Moved, |record| {
            (record.failure, record.moved_to) = (None, Some(there.clone()));
        })
        .await
    }

    /// Connects a container that came from another node to this one. It must have its address
    /// before it boots: a crash may have come in between.
    pub(in crate::sandbox) async fn connected(&self, record: Arc<Record>) -> Result<Arc<Record>> {
        if record.progress != Progress::Import {
            return Ok(record);
        }
        self.pve.configure(record.vmid, &self.settings(&record)).await.map_err(Error::from)?;
        self.records.change(&record.id, |record| record.progress = Progress::Done).await
    }
}
