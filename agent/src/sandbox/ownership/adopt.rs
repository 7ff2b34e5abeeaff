//! Adopting a container that was made without the agent. The container keeps running; nothing of it
//! changes but one line of its description.
//!
//! | step | undo |
//! |---|---|
//! | check that it may become a sandbox | nothing was written |
//! | first record in the journal | the record ends as released |
//! | mark in the description | remove the mark |
//!
//! After a crash the reconciler finishes the adoption; `release` takes it back.

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef, Vmid},
    name::{RequestId, SnapshotId, Team},
    spec::Egress,
};
use tokio::time::Instant;

use crate::{
    journal::Record,
    pve::{ContainerConfig, ErrorKind, Mark, forbidden},
    sandbox::{
        Error, Event, Known, Result, Sandboxes,
        core::{
            operations::{OperationContext, OperationKind},
            queries,
        },
    },
};

/// Container to adopt, with its new identity.
#[derive(Debug, Clone)]
pub struct Adoption {
    /// Id of the new sandbox.
    pub id: SandboxId,
    /// Vmid of the container.
    pub vmid: Vmid,
    /// Team that will own the sandbox.
    pub team: Team,
    /// Reach of a sandbox outside of itself.
    pub egress: Egress,
}

impl Sandboxes {
    /// Adopts the container, running or stopped as it is, with its ports closed. With `dry_run`
    /// nothing changes. Also returns the volumes that a deletion of the sandbox will remove.
    ///
    /// # Errors
    /// SANDBOX_NOT_FOUND when this node has no container with this vmid; NOT_OURS when it carries a
    /// mark already; CONTAINER_UNFIT when it is a template, privileged or protected;
    /// CONTAINER_LOCKED; ISOLATION_FAILED when it shall be closed and nothing is isolated here; SANDBOX_KNOWN when a sandbox has its vmid or its address; DHCP_REFUSED and
    /// ADDRESS_CONFLICT as `address_of`.
    pub async fn adopt(
        self: &Arc<Self>,
        adoption: Adoption,
        dry_run: bool,
        wait: Duration,
    ) -> Result<(Arc<Record>, Vec<String>)> {
        let Adoption { id, vmid, team, egress } = adoption;
        if let Some(known) = self.known(&SandboxRef::Id(id)) {
            return match known {
                Known::Live(record) if record.vmid == vmid => Ok((record, Vec::new())),
                Known::Live(_) | Known::Ended(_) => {
                    Err(Error::new(Reason::SandboxKnown, format!("{id} is taken")))
                }
            };
        }
        let config = self.container(vmid).await?;
        self.check_resolver(&egress)?;
        if let Some(Known::Live(record)) = self.known(&SandboxRef::Vmid(vmid)) {
            let why = format!("container {vmid} is {} already", record.id);
            return Err(Error::new(Reason::SandboxKnown, why));
        }
        fit(vmid, &config)?;
        self.check_interfaces(vmid, &config)?;
        let request_id: RequestId = format!("adopt-{id}").parse()?;
        let mark = Mark { sandbox_id: id, vmid, attempt: 1, team, request_id };
        let record = Record {
            adopted: true,
            egress,
            progress: Progress::Adopt,
            ..self.record_of(&config, &mark, SnapshotId::ADOPTED).await?
        };
        let volumes = config.own_volumes(vmid);
        if dry_run {
            return Ok((Arc::new(record), volumes));
        }
        self.take_in(record).await?;
        let operation = self.launch(id, OperationKind::Adopt, |sandboxes, context| async move {
            sandboxes.adopt_or_undo(&id, &context).await
        });
        Ok((self.outcome(operation, wait).await?, volumes))
    }

    /// Finishes an adoption that a crash cut short.
    ///
    /// # Errors
    /// When it could not be finished yet; it is tried again.
    pub async fn finish_adoption(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        let id = *id;
        let operation = self.launch(id, OperationKind::Adopt, |sandboxes, context| async move {
            sandboxes.adopt_now(&id, &context).await
        });
        self.outcome(operation, wait).await
    }

    /// Adopts, or rolls back at once: the caller can ask again, so nothing is left half done.
    async fn adopt_or_undo(
        &self,
        id: &SandboxId,
        context: &OperationContext,
    ) -> Result<Arc<Record>> {
        let error = match self.adopt_now(id, context).await {
            Ok(record) => return Ok(record),
            Err(error) => error,
        };
        let Ok(record) = self.living(&SandboxRef::Id(*id)) else { return Err(error) };
        // While this fails, the reconciler continues the adoption.
        self.pve.unmark(record.vmid, id).await?;
        self.advance_because(id, Event::Released, Cause::Released, |_| {}).await?;
        Err(error)
    }

    async fn adopt_now(&self, id: &SandboxId, context: &OperationContext) -> Result<Arc<Record>> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.progress != Progress::Adopt {
            return self.connected(record).await;
        }
        match self.pve.mark(&record.mark()).await {
            Ok(()) => {}
            // The container was removed, or is somebody else's now: nothing is left to adopt.
            Err(error) if matches!(error.kind, ErrorKind::NotFound(_) | ErrorKind::NotOurs(_)) => {
                let released = |_: &mut Record| {};
                self.advance_because(id, Event::Released, Cause::Released, released).await?;
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, team = %record.team, "container adopted");
        self.records
            .amend(id, |record| {
                if record.phase.ended() {
                    return Err(queries::deleted(&SandboxRef::Id(record.id)));
                }
                record.progress = Progress::Done;
                Ok(())
            })
            .await
    }
}

/// Checks that a container may become a sandbox. Pure.
fn fit(vmid: Vmid, config: &ContainerConfig) -> Result<()> {
    let refused = |reason, why: &str| Err(Error::new(reason, format!("container {vmid} {why}")));
    if config.is_template() {
        return refused(Reason::ContainerUnfit, "is a template");
    }
    match config.mark() {
        Some(mark) if mark.vmid == vmid => {
            return refused(Reason::NotOurs, "carries our mark already: recover it");
        }
        Some(_) => {
            let why = "is a copy of a sandbox: take the line of its mark out of its description";
            return refused(Reason::NotOurs, why);
        }
        None => {}
    }
    if config.description().is_some_and(|text| text.lines().any(Mark::resembles)) {
        return refused(Reason::NotOurs, "has a line in its description that resembles our mark");
    }
    let found = forbidden::lines(config, &forbidden::Allowed::default());
    if !found.is_empty() {
        let why = format!("has forbidden lines: {}", forbidden::text(&found));
        return refused(Reason::ContainerUnfit, &why);
    }
    if config.is_protected() {
        let why = "is protected: take the protection off, if it may be deleted one day";
        return refused(Reason::ContainerUnfit, why);
    }
    match config.lock() {
        Some(lock) => {
            let why = format!("is locked ({lock}): somebody works on it");
            refused(Reason::ContainerLocked, &why)
        }
        None => Ok(()),
    }
}
