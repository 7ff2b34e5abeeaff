//! Clearing away what ended sandboxes have left: containers that came back, and old tombstones.

use proto::id::{SandboxId, SandboxRef, Vmid};

use super::{Error, Known, Sandboxes, reads};

impl Sandboxes {
    /// Destroys a container that carries the mark of a sandbox whose tombstone stands in the
    /// journal with this very vmid: a power cut can bring back what pmxcfs had not synced, and
    /// deleted is deleted.
    ///
    /// # Errors
    /// When there is no such tombstone, or the container could not be destroyed.
    pub async fn sweep(&self, id: &SandboxId, vmid: Vmid) -> Result<(), Error> {
        let name = SandboxRef::Id(*id);
        match self.known(&name) {
            Some(Known::Ended(tombstone)) if tombstone.vmid == vmid => {
                tracing::warn!(sandbox_id = %id, %vmid, "container of an ended sandbox was found");
                let removed = self.pve.destroy_owned(vmid, id, self.options.limits.destroy).await;
                removed.map_err(Error::from)
            }
            Some(Known::Ended(_) | Known::Live(_)) | None => Err(reads::not_found(&name)),
        }
    }

    /// Drops tombstones that ended before `before_ms`. Returns how many.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn forget(&self, before_ms: u64) -> Result<usize, Error> {
        let forgotten = self.journal.forget(before_ms).await?;
        self.index.forget(before_ms);
        Ok(forgotten)
    }
}
