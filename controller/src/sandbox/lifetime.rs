//! Lifetime of a sandbox. Its node stores and enforces the rules.

use proto::{
    id::Invalid,
    lifetime::LifetimePatch,
    sandbox::v1::{EventKind, Lifetime, Sandbox},
};

use super::{Caller, Error, Sandboxes};

/// Events that the log attributes to the caller.
const EFFECTS: &[EventKind] = &[EventKind::LifetimeSet];

impl Sandboxes {
    /// Changes the lifetime rules of a sandbox.
    ///
    /// # Errors
    /// When the lifetime is missing or out of bounds, there is no such sandbox, or its node does
    /// not do it.
    pub async fn set_lifetime(
        &self,
        caller: &Caller,
        id: &str,
        lifetime: Option<Lifetime>,
    ) -> Result<Sandbox, Error> {
        let lifetime = lifetime.ok_or_else(|| Invalid::new("lifetime", "must be given"))?;
        LifetimePatch::try_from(&lifetime)?;
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, None, EFFECTS);
        let epoch = self.nodes.epoch.get();
        match node.client.set_lifetime(epoch, &entry.id, lifetime).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, EFFECTS, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, EFFECTS, error).await),
        }
    }
}
