//! Releases a sandbox: it ends, and its container stays.

use proto::{
    id::SandboxRef,
    sandbox::v1::{EventKind, Sandbox},
};

use crate::sandbox::{Caller, Error, Result, Sandboxes, change::Change};

const RELEASE: Change = Change {
    asked: Some(EventKind::ReleaseAsked),
    effects: &[EventKind::Deleted],
    is_bounded: false,
};

impl Sandboxes {
    /// Ends a sandbox of any team and keeps its container.
    ///
    /// # Errors
    /// When there is none, its node does not answer, or its container was made for it.
    pub async fn release(&self, caller: &Caller, id: &str) -> Result<Sandbox> {
        let name: SandboxRef = id.parse()?;
        let entry = self.nodes.cache.get(&name).ok_or_else(|| Error::not_found(&name))?;
        self.may_change()?;
        if entry.ended() {
            return Ok(self.nodes.cache.view(&entry));
        }
        let node = self.reachable(&entry)?;
        self.log_request(caller, &entry, RELEASE);
        let answer = node.client.release(self.nodes.epoch.get(), &entry.id, None).await;
        self.finish_change(&entry, &node, RELEASE, answer).await
    }
}
