//! Forgets a node that will not come back.

use std::sync::Arc;

use proto::{
    Reason,
    name::NodeName,
    sandbox::v1::{EventKind, ForgetNodeRequest, Sandbox},
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
    /// that the request does not call lost.
    pub async fn forget_node(
        self: &Arc<Self>,
        caller: &Caller,
        request: &ForgetNodeRequest,
        witness: Witness<'_>,
    ) -> Result<Vec<Sandbox>> {
        let name: NodeName = request.node.parse()?;
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
                "node {name} is in controller.toml: remove its [[node]], restart the controller, then forget it"
            ));
        }
        let view = |entry| self.nodes.cache.view(entry);
        let sandboxes: Vec<Sandbox> = living.iter().map(view).collect();
        if request.dry_run {
            return Ok(sandboxes);
        }
        if !request.lost && !living.is_empty() {
            let count = living.len();
            return in_use(format!(
                "node {name} has {count} sandboxes: repeat with --lost (`lost`) to give them up"
            ));
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
        // A task of its own: the store must not be alone in having forgotten it.
        let nodes = Arc::clone(&self.nodes);
        let forget = async move { nodes.forget(&name).await.map_err(Error::from) };
        let done = self.to_its_end(caller.permit.clone(), forget).await;
        each.into_iter().for_each(|each| each.end(&done));
        done?;
        self.log_flushed().await;
        Ok(sandboxes)
    }
}
