//! Admits memory for a sandbox that this node has: for one that grows, and for one that starts again.

use proto::id::SandboxId;

use super::{
    decide::{Memory, decide_growth},
    lock::GrowthGuard,
};
use crate::sandbox::{Result, Sandboxes};

impl Sandboxes {
    /// Admits `more` bytes for a sandbox whose limit is then `whole` bytes. They count until the guard is
    /// dropped; by then the record has them.
    ///
    /// # Errors
    /// MEMORY_FULL when that is more than the node has now; NEVER_FITS when it is more than it ever has.
    pub(in crate::sandbox) fn admit_memory(
        &self,
        id: &SandboxId,
        more: u64,
        whole: u64,
    ) -> Result<GrowthGuard> {
        let admission = self.admission.lock(id);
        if let Some(host) = self.host() {
            let memory = Memory {
                asked: more,
                given: self.memory_given() + admission.memory(),
                total: host.memory_total,
                available: host.memory_available,
            };
            decide_growth(memory, whole, &self.options.limits)?;
        }
        Ok(admission.grow(more))
    }
}
