//! Reservations for creations that may come: a controller probes a few nodes and uses one.

use proto::{
    id::{SandboxId, SandboxRef},
    name::SnapshotId,
    spec::Size,
};

use super::decide::decide;
use crate::sandbox::{Result, Sandboxes};

impl Sandboxes {
    /// Reserves room for this creation, and for no other, for 2 s. The reservation counts as the
    /// creation itself would. Repeating the call renews it; a known creation needs none.
    ///
    /// # Errors
    /// When a creation of this size would be refused.
    pub async fn reserve(&self, id: &SandboxId, snapshot: &SnapshotId, size: Size) -> Result<()> {
        let template = self.template(snapshot).await?;
        let (cluster, room) =
            tokio::join!(self.pve.cluster(), self.pve.storage_room(template.vmid));
        let guard = self.admission.lock(id);
        if guard.by_id(id).is_some() || self.known(&SandboxRef::Id(*id)).is_some() {
            return Ok(());
        }
        let size = size.or(template.size);
        let facts = self.facts(&guard, &template, size, None, (&cluster, room?));
        decide(&facts, &self.options.limits)?;
        guard.reserve(*id, size, template.vmid);
        Ok(())
    }

    /// Cancels a reservation before it expires.
    pub fn cancel_reservation(&self, id: &SandboxId) {
        self.admission.cancel_reservation(id);
    }
}
