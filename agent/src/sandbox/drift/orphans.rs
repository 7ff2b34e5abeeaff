//! Removes leftovers of ended sandboxes: containers that came back, and old tombstones.

use proto::{
    Reason,
    id::{SandboxId, SandboxRef, Vmid},
};

use crate::{
    pve::{OwnVolumes, ownership},
    sandbox::{Error, Known, Result, Sandboxes, core::queries},
};

impl Sandboxes {
    /// Destroys a container whose mark names an ended sandbox with this very vmid, or an attempt
    /// before the one in the journal: a power cut can bring back what pmxcfs had not synced.
    ///
    /// # Errors
    /// When the journal does not say that it has ended, or the container could not be destroyed.
    pub async fn destroy_orphan(&self, id: &SandboxId, vmid: Vmid) -> Result<()> {
        let name = SandboxRef::Id(*id);
        let marked = self.pve.config(vmid).await?.and_then(|config| config.mark());
        let before = |attempt| marked.is_some_and(|mark| mark.attempt < attempt);
        let over = match self.known(&name) {
            Some(Known::Ended(ended)) => {
                let its_own = ended.vmid == vmid && !ended.moved;
                !ended.released && (its_own || before(ended.attempt))
            }
            Some(Known::Live(record)) => record.vmid != vmid && before(record.attempt),
            None => false,
        };
        if !over {
            return Err(queries::not_found(&name));
        }
        tracing::warn!(sandbox_id = %id, %vmid, "container of an ended sandbox was found");
        // `destroy_owned` checks the mark once more: sandbox and vmid.
        let record = self.records.feed().get(id).await?.filter(|record| record.vmid == vmid);
        // Long after its clone, volumes that came to the storages since may be anybody's.
        let volumes = record.map(|record| record.volumes.named_alone()).unwrap_or_default();
        let removed = self.pve.destroy_owned(vmid, id, &volumes, self.options.limits.destroy).await;
        removed.map_err(Error::from)
    }

    /// Removes the remnant of a destruction that was cut off, under a vmid of this node: a config
    /// with its lock and nothing else, so that nobody can lose anything.
    ///
    /// # Errors
    /// When a record has the vmid, or the remnant could not be removed.
    pub async fn remove_remnant(&self, vmid: Vmid) -> Result<()> {
        let name = SandboxRef::Vmid(vmid);
        let config = self.pve.config(vmid).await?;
        let gutted = config.is_some_and(|config| ownership::is_gutted(&config));
        if !gutted || matches!(self.known(&name), Some(Known::Live(_))) {
            return Err(queries::not_found(&name));
        }
        // PVE writes such a config when the volumes are gone. With volumes it is something else.
        if !self.pve.volumes(vmid).await?.is_empty() {
            let why =
                format!("there are volumes of {vmid}, whose config says that it is destroyed");
            return Err(Error::new(Reason::NotOurs, why));
        }
        tracing::warn!(%vmid, "remnant of a destruction was found");
        // This id belongs to nobody: if the vmid gets an owner meanwhile, its mark does not match.
        let nobody = SandboxId::new(0, &[0; 10]);
        let (none, limit) = (OwnVolumes::default(), self.options.limits.destroy);
        let removed = self.pve.destroy_owned(vmid, &nobody, &none, limit).await;
        removed.map_err(Error::from)
    }

    /// Drops tombstones that ended before `before_ms`. Returns how many.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn forget(&self, before_ms: u64) -> Result<usize> {
        self.records.forget(before_ms).await
    }
}
