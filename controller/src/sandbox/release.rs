//! Releases a sandbox: it ends, and its container stays.

use proto::{
    id::SandboxRef,
    sandbox::v1::{EventKind, Sandbox},
};

use super::{Caller, Error, Sandboxes};

impl Sandboxes {
    /// Ends a sandbox of any team and keeps its container.
    ///
    /// # Errors
    /// When there is none, its node does not answer, or its container was made for it.
    pub async fn release(&self, caller: &Caller, id: &str) -> Result<Sandbox, Error> {
        let name: SandboxRef = id.parse()?;
        let entry = self.nodes.cache.get(&name).ok_or_else(|| Error::not_found(&name))?;
        self.may_change()?;
        if entry.ended() {
            return Ok(self.nodes.cache.view(&entry));
        }
        let node = self.reachable(&entry)?;
        let effects = &[EventKind::Deleted];
        self.wanted(caller, &entry, Some(EventKind::ReleaseAsked), effects);
        match node.client.release(self.nodes.epoch.get(), &entry.id, None).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, effects, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, effects, error).await),
        }
    }
}
