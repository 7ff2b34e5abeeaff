//! Forgets a node that will not come back.

use proto::{
    Reason,
    name::NodeName,
    sandbox::v1::{EventKind, Sandbox},
};

use super::each::{Each, Witness};
use crate::{
    inventory::Entry,
    sandbox::{Caller, Error, Result, Sandboxes},
    store::Event,
};

impl Sandboxes {
    /// Forgets a node and ends its sandboxes. Returns their last known state; `witness` hears of each. A creation that
    /// is under way on the node is not ended here: its task continues it on another node, or ends it.
    ///
    /// # Errors
    /// NODE_NOT_FOUND; NODE_IN_USE when the node answers, is in the configuration, or has sandboxes
    /// and `lost` is false.
    pub async fn forget_node(
        &self,
        caller: &Caller,
        node: &str,
        (lost, dry_run): (bool, bool),
        witness: Witness<'_>,
    ) -> Result<Vec<Sandbox>> {
        let name: NodeName = node.parse()?;
        let known = self.nodes.get(&name);
        let mut living = self.nodes.cache.living_on(&name);
        if known.is_none() && living.is_empty() {
            return Err(Error::new(Reason::NodeNotFound, format!("there is no node {name}")));
        }
        living.retain(|entry| !entry.creating);
        let in_use = |why: String| Err(Error::new(Reason::NodeInUse, why));
        if known.is_some_and(|node| node.down().is_none()) {
            return in_use(format!(
                "node {name} answers: its sandboxes are deleted, not forgotten"
            ));
        }
        if self.nodes.is_configured(&name) {
            return in_use(format!(
                "node {name} stands in the controller's configuration: take it out there, restart \
                 the controller, and forget it then"
            ));
        }
        let view = |entry| self.nodes.cache.view(entry);
        let sandboxes: Vec<Sandbox> = living.iter().map(view).collect();
        if dry_run {
            return Ok(sandboxes);
        }
        if !lost && !living.is_empty() {
            let count = living.len();
            return in_use(format!("node {name} has {count} sandboxes: say that they are lost"));
        }
        self.may_change()?;
        self.log().append(Event {
            node: Some(name.clone()),
            detail: format!("{} sandboxes were on it", living.len()),
            ..self.log().event(EventKind::NodeForgotten, &caller.token)
        });
        for entry in &living {
            self.log().ask(entry.id, &[EventKind::Deleted], &caller.token);
        }
        let each = |entry: &Entry| Each::new(witness, entry.id.to_string(), entry.team.clone());
        let each: Vec<_> = living.iter().map(each).collect();
        let done = self.nodes.forget(&name).await.map_err(Error::from);
        each.into_iter().for_each(|each| each.end(&done));
        done?;
        self.log_flushed().await;
        Ok(sandboxes)
    }
}
