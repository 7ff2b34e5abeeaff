//! How long a sandbox lives. Its node keeps the rules, and keeps to them.

use proto::{
    id::Invalid,
    lifetime::Wish,
    name::Team,
    sandbox::v1::{Lifetime, Sandbox},
};

use super::{Error, Sandboxes};

impl Sandboxes {
    /// Changes the rules of its lifetime.
    ///
    /// # Errors
    /// When nothing is said, it is out of bounds, there is no such sandbox, or its node does not do
    /// it.
    pub async fn set_lifetime(
        &self,
        team: &Team,
        id: &str,
        lifetime: Option<Lifetime>,
    ) -> Result<Sandbox, Error> {
        let lifetime = lifetime.ok_or_else(|| Invalid::new("lifetime", "must be given"))?;
        Wish::try_from(&lifetime)?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.set_lifetime(epoch, &entry.id, lifetime).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }
}
