//! Booting a stopped sandbox again.
//!
//! | step | undo |
//! |---|---|
//! | admit its memory | forget it |
//! | STARTING in the journal, boot + 1 | STOPPED with the failure |
//! | start the container in a slot, wait for its probe | stop the container |
//! | RUNNING in the journal | none: from here on `stop` |
//!
//! After a crash the reconciler starts it again.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    spec::Network,
};
use tokio::time::Instant;

use super::{
    boot::{self, Boot},
    undo,
};
use crate::{
    journal::{Phase, Record},
    sandbox::{
        Event, Probe, Result, Sandboxes,
        admission::fair_slots::Slot,
        core::{
            operations::{OperationContext, OperationKind},
            queries,
            transitions::refuse_exported,
        },
    },
};

impl Sandboxes {
    /// Starts the sandbox on its own task; returns when it runs, or after `wait` with the record as
    /// it is then. A running sandbox stays as it is.
    ///
    /// # Errors
    /// When there is no such sandbox, or it did not come up: then it is stopped; MEMORY_FULL or NEVER_FITS when
    /// the node has no memory for it.
    pub async fn start(self: &Arc<Self>, id: &SandboxId, wait: Duration) -> Result<Arc<Record>> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running {
            return Ok(record);
        }
        let id = *id;
        let operation = self.launch(id, OperationKind::Start, |sandboxes, context| async move {
            sandboxes.start_now(&id, &context).await
        });
        self.outcome(operation, wait).await
    }

    async fn start_now(&self, id: &SandboxId, context: &OperationContext) -> Result<Arc<Record>> {
        let limits = &self.options.limits;
        let _turn = context.turn(Instant::now() + limits.turn).await?;
        let record = self.connected(self.living(&SandboxRef::Id(*id))?).await?;
        if record.phase == Phase::Running {
            return Ok(record);
        }
        refuse_exported(&record)?;
        // What was stopped has held no memory since, and others may have it now. A boot that is under way,
        // also one after a reboot of the node, counts already.
        let memory = record.memory_bytes();
        let admit = || self.admit_memory(id, memory, memory);
        let admitted = (record.phase == Phase::Stopped).then(admit).transpose()?;
        let _counted = self.admission.count_start();
        let slot = self.start_slot(&record.team, Instant::now() + limits.turn).await?;
        let now = self.clock.moment();
        // After a reboot of the node the boot is counted already, and the time to live continues.
        let again = record.phase == Phase::Starting && record.cause == Cause::NodeRebooted;
        let cause = if again { Cause::NodeRebooted } else { Cause::ASKED };
        // The boot counts from the intent on: facts about the last boot no longer hold.
        let record = self
            .advance(id, Event::StartAsked, |record| {
                if !again {
                    record.boot += 1;
                    record.lifetime.renew(&now);
                }
                record.failure = None;
                if record.network == Network::Dhcp {
                    (record.ip, record.ip_granted) = (None, false);
                }
                record.progress = Progress::Start;
            })
            .await?;
        // The record counts from here on.
        drop(admitted);
        let since = Instant::now();
        match self.boot_again(&record, slot, context).await {
            Ok(further_ips) => {
                self.admission.note_start(since.elapsed());
                let init = self.pve.init(record.vmid).await.map(|init| init.start);
                self.advance_because(id, Event::CameUp, cause, |record| {
                    record.init = init;
                    record.further_ips.clone_from(&further_ips);
                    record.started_ms = self.now_ms();
                    record.progress = Progress::Done;
                })
                .await
            }
            Err(error) => {
                tracing::warn!(sandbox_id = %id, reason = %error.reason, %error, "start failed");
                if again && error.reason == Reason::NoQuorum {
                    // Quorum comes and goes while a cluster comes up: a pass with quorum continues.
                    return Err(error);
                }
                // While this fails the record says STARTING, and the reconciler tries again.
                self.stop_container(&record).await?;
                self.advance_because(id, Event::StartFailed, cause, |record| {
                    record.failure = Some(undo::failure(&error));
                })
                .await?;
                Err(error)
            }
        }
    }

    /// Returns the static addresses of the container's interfaces beside `net0`.
    async fn boot_again(
        &self,
        record: &Record,
        slot: Slot,
        context: &OperationContext,
    ) -> Result<Vec<Ipv4Addr>> {
        let limits = &self.options.limits;
        let template = self.options.templates.iter().find(|t| t.vmid == record.template);
        let boot = Boot {
            record,
            begun: Instant::now(),
            // The probe of a template that the configuration no longer names is unknown.
            probe: template.map_or(&Probe::None, |template| &template.probe),
            deadline: Instant::now() + limits.start + limits.answer,
        };
        let further_ips = self.start_container(&boot).await?;
        let answers = boot::in_slot(slot, self.until_it_answers(&boot));
        tokio::select! {
            biased;
            () = context.cancelled().cancelled() => Err(queries::deleted(&SandboxRef::Id(record.id))),
            answer = answers => answer.map(|()| further_ips),
        }
    }
}
