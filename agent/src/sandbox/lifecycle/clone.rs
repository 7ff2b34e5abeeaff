//! The clone of a creation: finds a vmid that nobody has, and waits for a template that is locked.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{Progress, Reason, id::SandboxId};
use tokio::time::{Instant, sleep};

use super::create::{Work, check_cancelled};
use crate::{
    journal::Record,
    pve::{CloneOrder, ErrorKind, OwnVolumes},
    saga::Saga,
    sandbox::{Error, Result, Sandboxes, core::deadline},
};

/// Most vmids tried when PVE says that one is taken.
const VMIDS_TRIED_MAX: u32 = 16;
/// Base delay between two tries at a template that somebody else has locked.
const LOCKED: Duration = Duration::from_millis(150);

impl Sandboxes {
    /// Clones the template; when PVE says that the vmid is taken, tries the next one.
    pub(super) async fn clone_under_a_free_vmid<'a>(
        &'a self,
        saga: &mut Saga<'a, Error>,
        work: &Work<'_>,
        mut record: Arc<Record>,
    ) -> Result<Arc<Record>> {
        for _ in 0..VMIDS_TRIED_MAX {
            let (id, vmid) = (record.id, record.vmid);
            let undo = move || self.destroy_clone(id, vmid).boxed();
            let free =
                saga.step(Progress::Clone.name(), undo, || self.clone_as(work, &record)).await?;
            if free {
                return Ok(record);
            }
            tracing::info!(sandbox_id = %id, %vmid, "vmid was taken, trying the next");
            let taken = self.pve.cluster().await.guests.into_keys().collect();
            record = self.records.renumber(&id, taken).await?;
        }
        Err(Error::new(
            Reason::VmidsExhausted,
            format!("{VMIDS_TRIED_MAX} vmids in a row were taken by others"),
        ))
    }

    /// Clones under one vmid. Returns false when the vmid belongs to somebody else.
    async fn clone_as(&self, work: &Work<'_>, record: &Record) -> Result<bool> {
        let order =
            CloneOrder { template: record.template, vmid: record.vmid, mark: record.mark() };
        for tries in 0u32.. {
            check_cancelled(work)?;
            let site = self.pve.clone_site(record.template, record.vmid).await?;
            if !site.volumes.is_empty() {
                let made = self.is_made(record).await?;
                if !made {
                    let (vmid, volumes) = (record.vmid, site.volumes);
                    tracing::warn!(%vmid, ?volumes, "vmid skipped: somebody else has volumes with it");
                }
                return Ok(made);
            }
            // Durable first: after a crash this shows that a lock on the template is ours, and so
            // is a volume that no config names.
            self.records
                .change(&record.id, |record| {
                    record.progress = Progress::Clone;
                    record.volumes = OwnVolumes::cloned_to(site.storages.clone());
                })
                .await?;
            let left = deadline::left(work.deadline, self.options.limits.clone)?;
            let cloned = self.pve.clone_template(&order, left).await;
            let Err(error) = cloned else { return Ok(true) };
            if matches!(error.kind, ErrorKind::VmidTaken(_) | ErrorKind::Locked(_)) {
                // The clone never began: a lock on the template is not ours, nor is a volume that
                // appears under the vmid before the next try.
                self.records
                    .change(&record.id, |record| {
                        record.progress = Progress::Queued;
                        record.volumes = OwnVolumes::default();
                    })
                    .await?;
            }
            match error.kind {
                ErrorKind::VmidTaken(_) => return self.is_made(record).await,
                ErrorKind::Locked(_) => {
                    self.unlock_after_dead_clone(record.template).await;
                    let pause = deadline::jitter(LOCKED, &record.id, tries);
                    if Instant::now() + pause >= work.deadline {
                        return Err(error.into());
                    }
                    self.unless_cancelled(work, async {
                        sleep(pause).await;
                        Ok(())
                    })
                    .await?;
                }
                ErrorKind::NotFound(_)
                | ErrorKind::WrongState(_)
                | ErrorKind::StorageFull(_)
                | ErrorKind::NoQuorum(_)
                | ErrorKind::NotOurs(_)
                | ErrorKind::Deadline(_)
                | ErrorKind::Failed(_) => return Err(error.into()),
            }
        }
        unreachable!("tries end with the deadline")
    }

    /// Reads which volumes the finished clone's config names.
    pub(super) async fn named_volumes(&self, record: &Record) -> Result<OwnVolumes> {
        let config = self.pve.config(record.vmid).await?.unwrap_or_default();
        let named = config.own_volumes(record.vmid);
        Ok(OwnVolumes { named, ..OwnVolumes::default() })
    }

    /// Records the volumes by name: one that appears under the vmid later is not the clone's. A
    /// lost write is repeated when the sandbox is up.
    pub(super) async fn note_cloned(&self, id: &SandboxId, volumes: &OwnVolumes) {
        let noted = self.records.change(id, |record| {
            record.progress = Progress::Configure;
            record.volumes.clone_from(volumes);
        });
        if let Err(error) = noted.await {
            tracing::warn!(sandbox_id = %id, %error, "step was not recorded");
        }
    }

    /// True when the vmid is taken by this very sandbox, complete and unlocked.
    async fn is_made(&self, record: &Record) -> Result<bool> {
        let config = self.pve.config(record.vmid).await?;
        Ok(config
            .is_some_and(|config| config.mark() == Some(record.mark()) && config.lock().is_none()))
    }
}
