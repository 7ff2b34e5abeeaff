//! Reservations for creations that may come: a controller probes a few nodes and uses one.

use proto::{
    id::{SandboxId, SandboxRef},
    name::SnapshotId,
    spec::Size,
};

use super::{Error, Sandboxes, admission};

impl Sandboxes {
    /// Reserves room for this creation, and for no other, for 2 s. The reservation counts as the
    /// creation itself would. Repeating the call renews it; a known creation needs none.
    ///
    /// # Errors
    /// When a creation of this size would be refused.
    pub async fn reserve(
        &self,
        id: &SandboxId,
        snapshot: &SnapshotId,
        size: Size,
    ) -> Result<(), Error> {
        let template = self.template(snapshot).await?;
        let (cluster, room) =
            tokio::join!(self.pve.cluster(), self.pve.storage_room(template.vmid));
        let gate = self.gate.hold(id);
        if gate.by_id(id).is_some() || self.known(&SandboxRef::Id(*id)).is_some() {
            return Ok(());
        }
        let size = size.or(template.size);
        let facts = self.facts(&gate, &template, size, (&cluster, room?));
        admission::decide(&facts, &self.options.limits)?;
        gate.keep(*id, size, template.vmid);
        Ok(())
    }

    /// Cancels a reservation before it expires.
    pub fn give_back(&self, id: &SandboxId) {
        self.gate.give_back(id);
    }
}
