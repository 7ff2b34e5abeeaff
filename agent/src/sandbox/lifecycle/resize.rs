//! Changing the size of a sandbox that runs or is stopped.
//!
//! | step | undo |
//! |---|---|
//! | admit more memory | forget it |
//! | the larger disk as wanted in the journal | the record gets the disk that the config shows |
//! | grow the disk; the new size in the journal | none: PVE shrinks no disk |
//! | the limits as wanted in the journal | none: they are set again, as below |
//! | set cores and memory, at once where it runs; the new size in the journal | none |
//!
//! `settle_size` ends what a failure or a crash cut short. PVE changes the running container before
//! its config, and passes over what the config says already: so the wanted limits are set again.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Progress, Reason,
    id::{Invalid, SandboxId, SandboxRef},
    spec::Size,
};
use tokio::time::Instant;

use crate::{
    journal::{Phase, Record},
    pve::{ContainerConfig, ErrorKind},
    sandbox::{
        Error, Result, Sandboxes,
        admission::{decide::check_room, lock::GrowthGuard},
        core::{
            operations::{Entry, OperationContext, OperationKind, OperationState},
            queries,
            transitions::refuse_exported,
        },
    },
};

/// Change of a sandbox's size, as asked for.
#[derive(Debug, Clone, Copy)]
pub struct Resize {
    /// New size; a field that is 0 stays as it is.
    pub size: Size,
    /// Revision that the sandbox must have.
    pub revision: Option<u64>,
}

impl Sandboxes {
    /// Changes the size on a task of its own; returns when the container has it, or after `wait`
    /// with the record as it is then.
    ///
    /// # Errors
    /// FIELD_INVALID for a disk smaller than it is; MEMORY_IN_USE for less memory than is used;
    /// MEMORY_FULL or NEVER_FITS for more than the node has; when the sandbox is neither running
    /// nor stopped; REVISION_CONFLICT when it has another revision; when PVE does not do it.
    pub async fn resize(
        self: &Arc<Self>,
        id: &SandboxId,
        asked: Resize,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        let (id, until) = (*id, Instant::now() + wait);
        let left = || until.saturating_duration_since(Instant::now());
        loop {
            match self.operations.enter(id, OperationKind::Resize) {
                Entry::New(guard, operation) => {
                    self.run(guard, |sandboxes, context| async move {
                        sandboxes.resize_now(&id, asked, &context).await
                    });
                    let record = self.outcome(operation, left()).await?;
                    let waits =
                        asked.size.or(record.size) != record.size && record.resizing.is_none();
                    return if waits { Err(busy(&id)) } else { Ok(record) };
                }
                // Another size, most likely: that one comes first.
                Entry::Joined(operation) => {
                    if let OperationState::UnderWay = operation.ended(left()).await {
                        return Err(busy(&id));
                    }
                }
            }
        }
    }

    /// Ends a change of the size that a crash or an error cut short, as far as PVE does it.
    ///
    /// # Errors
    /// When the container's config cannot be read or changed; it can be tried again.
    pub async fn settle_size(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        self.operate(id, OperationKind::Resize, wait, |sandboxes, id| {
            sandboxes.settle_size_now(id).boxed()
        })
        .await
    }

    async fn resize_now(
        self: &Arc<Self>,
        id: &SandboxId,
        asked: Resize,
        context: &OperationContext,
    ) -> Result<Arc<Record>> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        asked.check_revision(&record)?;
        refuse_exported(&record)?;
        check_phase(&record)?;
        let record = self.connected(record).await?;
        check_progress(&record)?;
        let config = self.config_of(&record).await?;
        if let Some(lock) = config.lock() {
            let message = format!("CT {} is locked ({lock}); {id} stays as it is", record.vmid);
            let error = Error::new(Reason::ContainerLocked, message);
            return Err(error.retry_after(Duration::from_secs(2)));
        }
        // What was not asked for stays as the container has it: an operator may have changed it.
        let has = limits_in(&config, record.size);
        let wanted = asked.size.or(has);
        check_disk(&record, &config, asked.size.disk_gib)?;
        if asked.size.disk_gib > config.rootfs_gib() {
            check_room(&self.pve.storage_room(record.vmid).await?, &self.options.limits)?;
        }
        if asked.size.memory_mib > 0 {
            self.check_memory(&record, wanted).await?;
        }
        let admitted = self.admit_growth(&record, asked.size)?;
        let record = self.change_disk(record, wanted.disk_gib).await?;
        let record = self.change_limits(record, has, wanted).await?;
        // The record counts from here on.
        drop(admitted);
        let Size { cpu_cores, memory_mib, disk_gib } = record.size;
        tracing::info!(sandbox_id = %id, cpu_cores, memory_mib, disk_gib, "size of the sandbox changed");
        Ok(record)
    }

    async fn change_disk(&self, record: Arc<Record>, disk_gib: u32) -> Result<Arc<Record>> {
        if record.size.disk_gib == disk_gib {
            return Ok(record);
        }
        let record = self.want_size(&record, Size { disk_gib, ..record.size }).await?;
        let deadline = self.options.limits.create;
        if let Err(error) = self.pve.resize(record.vmid, disk_gib, deadline).await {
            self.settle_size_now(&record.id).await?;
            return Err(error.into());
        }
        self.write_size(&record.id, move |record| {
            record.size.disk_gib = disk_gib;
            record.disk_unfinished = false;
        })
        .await
    }

    async fn change_limits(
        &self,
        record: Arc<Record>,
        has: Size,
        wanted: Size,
    ) -> Result<Arc<Record>> {
        let has_it = has == Size { disk_gib: has.disk_gib, ..wanted };
        if has_it && record.size == wanted && record.resizing.is_none() {
            return Ok(record);
        }
        let record = self.want_size(&record, wanted).await?;
        if let Err(error) = self.pve.set_limits(record.vmid, &record.id, wanted).await {
            let settled = self.settle_size_now(&record.id).await.map_err(|error| {
                let message = format!("{}; that is tried again until it is done", error.message);
                Error { message, ..error }
            })?;
            return if settled.size == wanted { Ok(settled) } else { Err(error.into()) };
        }
        self.write_size(&record.id, move |record| record.size = wanted).await
    }

    async fn want_size(&self, record: &Record, wanted: Size) -> Result<Arc<Record>> {
        self.records
            .change(&record.id, |record| {
                record.resizing = Some(wanted);
                record.progress = Progress::Resize;
            })
            .await
    }

    async fn write_size(
        &self,
        id: &SandboxId,
        write: impl Fn(&mut Record) + Send,
    ) -> Result<Arc<Record>> {
        self.records
            .change(id, |record| {
                write(record);
                record.resizing = None;
                if record.progress == Progress::Resize {
                    record.progress = Progress::Done;
                }
            })
            .await
    }

    async fn settle_size_now(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.living(&SandboxRef::Id(*id))?;
        let Some(wanted) = record.resizing else { return Ok(record) };
        let config = self.config_of(&record).await?;
        if wanted.disk_gib != record.size.disk_gib {
            let disk_gib = config.rootfs_gib();
            let grown = disk_gib >= wanted.disk_gib;
            return self
                .write_size(id, move |record| {
                    if grown {
                        record.size.disk_gib = disk_gib;
                        // Nobody knows whether `pct` came to the file system before it ended.
                        record.disk_unfinished = true;
                    }
                })
                .await;
        }
        let wanted = match self.check_memory(&record, wanted).await {
            Ok(()) => wanted,
            // It uses more than is wanted, so the kernel was not given that limit.
            Err(_) => Size { memory_mib: config.memory_mib(), ..wanted },
        };
        match self.pve.set_limits(record.vmid, id, wanted).await {
            Ok(()) => self.write_size(id, move |record| record.size = wanted).await,
            // A lock, or no quorum: that passes.
            Err(error) if !matches!(error.kind, ErrorKind::Failed(_)) => Err(error.into()),
            Err(error) => {
                tracing::warn!(sandbox_id = %id, %error, "limits of the sandbox could not be set");
                let has = limits_in(&self.config_of(&record).await?, record.size);
                self.write_size(id, move |record| record.size = has).await
            }
        }
    }

    async fn config_of(&self, record: &Record) -> Result<ContainerConfig> {
        self.pve.config(record.vmid).await?.ok_or_else(|| {
            let message = format!("the container of {} is not on this node", record.id);
            Error::new(Reason::ContainerGone, message)
        })
    }

    /// Refuses less memory than a running sandbox uses: the kernel would kill its processes.
    async fn check_memory(&self, record: &Record, wanted: Size) -> Result<()> {
        let Some(usage) = self.pve.usage(record.vmid).await else {
            if self.pve.running(record.vmid).await {
                let message = "the memory that it uses could not be read in time; try again";
                return Err(
                    Error::new(Reason::SandboxBusy, message).retry_after(Duration::from_secs(2))
                );
            }
            return Ok(());
        };
        let used = usage.memory_bytes.saturating_sub(usage.reclaimable_bytes);
        if used <= wanted.memory_bytes() {
            return Ok(());
        }
        let message = format!(
            "{} uses {} MiB: give it more than that, or end something in it first",
            record.id,
            used.div_ceil(1 << 20)
        );
        Err(Error::new(Reason::MemoryInUse, message))
    }

    /// Admits the memory that is asked for, as far as it is more than before.
    fn admit_growth(&self, record: &Record, wanted: Size) -> Result<Option<GrowthGuard>> {
        if wanted.memory_mib <= record.size.memory_mib {
            return Ok(None);
        }
        // A stopped sandbox counts for nothing yet.
        let counted = if record.phase.is_up() { record.memory_bytes() } else { 0 };
        let growth = wanted.memory_bytes().saturating_sub(counted);
        self.admit_memory(&record.id, growth, wanted.memory_bytes()).map(Some)
    }
}

impl Resize {
    fn check_revision(self, record: &Record) -> Result<()> {
        let other = self.revision.filter(|wanted| *wanted != record.revision);
        other.map_or(Ok(()), |wanted| Err(queries::changed_since(record, wanted)))
    }
}

/// Error of a change that has not begun, because another operation goes on.
fn busy(id: &SandboxId) -> Error {
    let message = format!("{id} is being changed already: look at it, and ask again if need be");
    Error::new(Reason::SandboxBusy, message).retry_after(Duration::from_secs(2))
}

fn check_phase(record: &Record) -> Result<()> {
    match record.phase {
        Phase::Running | Phase::Stopped => Ok(()),
        // PVE's lock is on it.
        Phase::Paused => {
            let message = format!("{} is paused: resume it, then change its size", record.id);
            Err(Error::new(Reason::SandboxPaused, message))
        }
        Phase::Creating | Phase::Starting | Phase::Stopping => {
            let (id, phase) = (record.id, record.phase);
            let message = format!("{id} is {phase}: wait until it runs or is stopped");
            Err(Error::new(Reason::SandboxNotRunning, message))
        }
        Phase::Undoing | Phase::Deleting | Phase::Deleted | Phase::Failed => {
            Err(queries::deleted(&SandboxRef::Id(record.id)))
        }
    }
}

/// Refuses a change while another intent of the record is to be carried out.
fn check_progress(record: &Record) -> Result<()> {
    if matches!(record.progress, Progress::Done | Progress::Resize) {
        return Ok(());
    }
    let message = format!("{} is being handed over: ask again", record.id);
    Err(Error::new(Reason::SandboxBusy, message).retry_after(Duration::from_secs(1)))
}

fn check_disk(record: &Record, config: &ContainerConfig, asked_gib: u32) -> Result<()> {
    let has_gib = config.rootfs_gib();
    let invalid = |why| Err(Error::of_field(Invalid::new("sandbox.size.disk_gib", why)));
    if asked_gib == has_gib && record.disk_unfinished {
        return invalid(format!(
            "must be more than {has_gib}: growing to that was cut short, and growing the disk again \
             finishes it"
        ));
    }
    if asked_gib == 0 || asked_gib == has_gib {
        return Ok(());
    }
    if asked_gib < has_gib {
        return invalid(format!("must be at least {has_gib}: a disk only grows"));
    }
    if record.phase == Phase::Running && !config.grows_running() {
        let message = format!("the disk of {} grows only while it is stopped", record.id);
        return Err(Error::new(Reason::ContainerUnfit, message));
    }
    Ok(())
}

/// Cores and memory in the config; what it does not say, and the disk, are those of `known`.
fn limits_in(config: &ContainerConfig, known: Size) -> Size {
    let cpu_cores = config.cores().unwrap_or(known.cpu_cores);
    Size { cpu_cores, memory_mib: config.memory_mib(), disk_gib: known.disk_gib }
}
