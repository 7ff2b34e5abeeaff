//! Queries about sandboxes, answered from memory.

use std::{collections::BTreeSet, sync::Arc};

use proto::{
    Reason,
    host::FullName,
    id::{SandboxId, SandboxRef, Vmid},
};

use crate::{
    journal::{Phase, Record},
    load::HostLoad,
    sandbox::{Error, Known, Result, Sandboxes, Tombstone},
};

/// Resources that sandboxes use on the node, for the load report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Creations and starts under way.
    pub starting: u32,
    /// Creations that wait for their turn.
    pub queued: u32,
    /// Running sandboxes.
    pub running: u32,
    /// Memory limits of sandboxes that run, boot or are paused, bytes.
    pub memory_allocated: u64,
    /// Cores of sandboxes that run, boot or are paused.
    pub cores_allocated: u32,
    /// Vmids that can be leased.
    pub vmids_free: u32,
    /// Addresses that can be leased.
    pub ips_free: u32,
    /// Cores, at most 4 per sandbox, of sandboxes that boot or came up less than 15 s ago.
    pub booting_cores: u32,
    /// Median duration of recent starts, milliseconds; 0 when unknown.
    pub start_ms: u32,
}

/// Time after boot in which a sandbox is busiest, milliseconds.
const YOUNG_MS: u64 = 15_000;
/// Most cores that a sandbox keeps busy in that time.
const YOUNG_CORES_MAX: u32 = 4;

impl Sandboxes {
    /// Creations that wait for a turn at this template.
    pub fn queued(&self, template: Vmid) -> usize {
        self.admission.queued(template)
    }

    /// Finds the sandbox with this name: the live one, else the last that ended. Never waits.
    pub fn known(&self, name: &SandboxRef) -> Option<Known> {
        self.records.index.known(name)
    }

    /// Finds the sandbox of this node that has a name; `None` when several have it. Never waits.
    pub fn named(&self, name: &FullName) -> Option<SandboxId> {
        self.records.index.named(name)
    }

    /// Finds a sandbox that is booted, frozen or not.
    pub(in crate::sandbox) fn up(&self, name: &SandboxRef) -> Result<Arc<Record>> {
        let record = self.living(name)?;
        if record.phase.is_up() {
            return Ok(record);
        }
        Err(not_running(&record))
    }

    /// Finds a sandbox that has not ended and is not being deleted.
    pub(in crate::sandbox) fn living(&self, name: &SandboxRef) -> Result<Arc<Record>> {
        match self.known(name) {
            Some(Known::Live(record)) if record.phase == Phase::Deleting => Err(deleted(name)),
            Some(Known::Live(record)) => Ok(record),
            Some(Known::Ended(_)) => Err(deleted(name)),
            None => Err(not_found(name)),
        }
    }

    /// Returns the record of a sandbox, live or ended.
    ///
    /// # Errors
    /// SANDBOX_NOT_FOUND; STORE_FAILED when a tombstone cannot be read.
    pub async fn get(&self, name: &SandboxRef) -> Result<Arc<Record>> {
        match self.known(name) {
            Some(Known::Live(record)) => Ok(record),
            Some(Known::Ended(Tombstone { id, .. })) => {
                let record = self.records.feed().get(&id).await?;
                record.map(Arc::new).ok_or_else(|| not_found(name))
            }
            None => Err(not_found(name)),
        }
    }

    /// Returns a page of all records, ordered by id, tombstones too, and the id to continue after.
    ///
    /// # Errors
    /// STORE_FAILED when a tombstone cannot be read.
    pub async fn page(
        &self,
        after: Option<SandboxId>,
        limit: usize,
    ) -> Result<(Vec<Arc<Record>>, Option<SandboxId>)> {
        let mut ids = self.records.index.ids_after(after, limit.saturating_add(1));
        let more = ids.len() > limit;
        ids.truncate(limit);
        let next = ids.last().copied().filter(|_| more);
        let mut page = Vec::with_capacity(ids.len());
        for id in ids {
            match self.get(&SandboxRef::Id(id)).await {
                Ok(record) => page.push(record),
                // Forgotten since the ids were listed.
                Err(error) if error.reason == Reason::SandboxNotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok((page, next))
    }

    /// All live sandboxes, ordered by id.
    pub fn live(&self) -> Vec<Arc<Record>> {
        self.records.index.all_live()
    }

    /// All tombstones.
    pub fn ended(&self) -> Vec<Tombstone> {
        self.records.index.ended()
    }

    /// Sandboxes that an operation works on.
    pub fn busy(&self) -> BTreeSet<SandboxId> {
        self.operations.busy().into_iter().collect()
    }

    /// Load of the host when it was last sampled.
    pub(in crate::sandbox) fn host(&self) -> Option<HostLoad> {
        self.host.get().map(|host| *host.borrow()).filter(|host| host.memory_total > 0)
    }

    /// Sum of the memory limits of sandboxes that hold memory, bytes; those being created excluded.
    pub(in crate::sandbox) fn memory_given(&self) -> u64 {
        let holds = |record: &&Arc<Record>| match record.phase {
            Phase::Running | Phase::Starting | Phase::Stopping | Phase::Paused => true,
            Phase::Creating
            | Phase::Undoing
            | Phase::Stopped
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => false,
        };
        let live = self.live();
        live.iter().filter(holds).map(|record| record.memory_bytes()).sum()
    }

    /// Adds up what the sandboxes use.
    ///
    /// # Errors
    /// STORE_FAILED when the journal cannot be read.
    pub async fn tally(&self) -> Result<Tally> {
        let (vmids_free, ips_free) = self.records.feed().room(self.now_ms()).await?;
        let (queued, starting) = self.admission.counts();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let mut tally = Tally {
            starting: count(starting),
            queued: count(queued),
            vmids_free,
            ips_free,
            start_ms: self.admission.start_ms(),
            ..Tally::default()
        };
        for size in self.admission.reserved() {
            tally.booting_cores += size.cpu_cores.min(YOUNG_CORES_MAX);
            tally.memory_allocated += size.memory_bytes();
            tally.cores_allocated += size.cpu_cores;
        }
        for record in self.live() {
            let boots = match record.phase {
                Phase::Creating | Phase::Starting => true,
                Phase::Running => {
                    tally.running += 1;
                    self.now_ms().saturating_sub(record.started_ms) < YOUNG_MS
                }
                // A paused sandbox keeps its memory.
                Phase::Stopping | Phase::Paused => false,
                Phase::Undoing
                | Phase::Stopped
                | Phase::Deleting
                | Phase::Deleted
                | Phase::Failed => continue,
            };
            if boots {
                tally.booting_cores += record.size.cpu_cores.min(YOUNG_CORES_MAX);
            }
            tally.memory_allocated += record.memory_bytes();
            tally.cores_allocated += record.size.cpu_cores;
        }
        Ok(tally)
    }
}

/// Error of a change that is based on another revision of the record.
pub(crate) fn changed_since(record: &Record, wanted: u64) -> Error {
    let message = format!(
        "{} has revision {}, not {wanted}: read it, and change it again",
        record.id, record.revision
    );
    Error::new(Reason::RevisionConflict, message)
}

pub(crate) fn not_found(name: &SandboxRef) -> Error {
    Error::new(Reason::SandboxNotFound, format!("there is no sandbox {name} on this node"))
}

/// Says why a sandbox that must run cannot be used.
pub(crate) fn not_running(record: &Record) -> Error {
    let phase = record.phase;
    match phase {
        Phase::Deleting | Phase::Deleted => deleted(&SandboxRef::Id(record.id)),
        Phase::Paused => {
            let message = format!("{} is paused: resume it first", record.id);
            Error::new(Reason::SandboxPaused, message)
        }
        Phase::Creating
        | Phase::Undoing
        | Phase::Running
        | Phase::Starting
        | Phase::Stopping
        | Phase::Stopped
        | Phase::Failed => {
            let message = format!("{} is {phase}, not running", record.id);
            Error::new(Reason::SandboxNotRunning, message)
        }
    }
}

pub(crate) fn deleted(name: &SandboxRef) -> Error {
    Error::new(Reason::SandboxDeleted, format!("{name} is deleted or being deleted"))
}
