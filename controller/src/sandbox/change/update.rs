//! Changes what a sandbox is called, what its caller notes about it, its rules and its size. Its node
//! stores and enforces all of that.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    id::Invalid,
    sandbox::v1::{self as wire, EventKind, Sandbox, UpdateSandboxRequest},
    spec::Size,
    update::Update,
};

use super::Change;
use crate::{
    node::Client,
    sandbox::{Caller, Error, Result, Sandboxes, WAIT},
};

const UPDATE: Change = Change {
    asked: None,
    effects: &[EventKind::LifetimeSet, EventKind::WakeOnSet, EventKind::Resized],
};

/// Longest wait for a node that changes its record alone, which is quick; a new size has `WAIT`.
const RECORD_WAIT: Duration = Duration::from_secs(2);

impl Sandboxes {
    /// Changes the fields of a sandbox that the request's mask names.
    ///
    /// # Errors
    /// When the request is wrong; NAME_TAKEN when another sandbox of the team has the name;
    /// REVISION_CONFLICT when the sandbox has another revision; when there is no such sandbox, or its
    /// node does not do it.
    pub async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        request: UpdateSandboxRequest,
    ) -> Result<Sandbox> {
        let update = Update::try_from(&request)?;
        let named = request.sandbox.as_ref().map(|sandbox| sandbox.id.as_str());
        let named = named.filter(|id| !id.is_empty());
        let named = named.ok_or_else(|| Invalid::new("sandbox.id", "must be given"))?;
        let entry = self.find(&caller.team, named)?;
        if let Some(size) = update.size {
            check_disk(entry.sandbox.size.unwrap_or_default(), size)?;
        }
        // What it is called may change while this waits for a name.
        let id = entry.id;
        // A task of its own: when the caller hangs up, the node renames it all the same, and until the
        // answer is in the cache nobody else may take the name.
        let (this, caller) = (self.clone(), caller.clone());
        let changed = self.tasks.spawn(async move {
            let name = match &update.name {
                Some(Some(name)) => Some(this.name_for(&caller.team, name, Some(id)).await?),
                Some(None) | None => None,
            };
            let wait = update.size.map_or(RECORD_WAIT, |_| WAIT);
            let change = |client: Client, epoch, id| async move {
                client.update(epoch, &id, request, wait).await
            };
            let changed = this.change(&caller, &id.to_string(), UPDATE, change).await;
            drop(name);
            changed
        });
        let gone = |_| Err(Error::new(Reason::ShuttingDown, "the controller is stopping"));
        changed.await.unwrap_or_else(gone)
    }
}

/// Refuses a smaller disk early, with the field's name. The node, which knows the container, checks
/// again.
fn check_disk(has: wire::Size, asked: Size) -> Result<(), Invalid> {
    if asked.disk_gib == 0 || asked.disk_gib >= has.disk_gib {
        return Ok(());
    }
    let why = format!("must be at least {}: a disk only grows", has.disk_gib);
    Err(Invalid::new("sandbox.size.disk_gib", why))
}
