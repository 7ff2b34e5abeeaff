//! Releases a sandbox: it ends, and its container stays.

use std::sync::Arc;

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
    pub async fn release(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Sandbox> {
        let name: SandboxRef = id.parse()?;
        let entry = self.nodes.cache.get(&name).ok_or_else(|| Error::not_found(&name))?;
        self.may_change()?;
        if entry.ended() {
            return Ok(self.nodes.cache.view(&entry));
        }
        let (this, caller) = (Arc::clone(self), caller.clone());
        let released = self.to_its_end(caller.permit.clone(), async move {
            let node = this.reachable(&entry)?;
            this.log_request(&caller, &entry, RELEASE);
            let answer = node.client.release(this.nodes.epoch.get(), &entry.id, None).await;
            let answer = answer.map(|sandbox| (sandbox, ()));
            this.finish_change(&entry, &node, RELEASE, answer).await
        });
        released.await.map(|(sandbox, ())| sandbox)
    }
}
