//! Cordon and drain: which nodes get new work. The agents store this and have the final say.

use std::sync::Arc;

use proto::{
    agent::v1::SchedulingState,
    sandbox::v1::{DrainNodeResponse, EventKind},
};

use super::each::Witness;
use crate::{
    node::Node,
    sandbox::{Caller, Result, Sandboxes},
    store::Event,
};

impl Sandboxes {
    /// Stops new work for a node.
    ///
    /// # Errors
    /// When there is no such node, or it does not answer.
    pub async fn cordon(self: &Arc<Self>, caller: &Caller, node: &str, why: String) -> Result<()> {
        let kind = EventKind::NodeCordoned;
        self.set_scheduling(caller, node, (SchedulingState::Cordoned, kind), why).await.map(drop)
    }

    /// Allows new work for a node again.
    ///
    /// # Errors
    /// When there is no such node, or it does not answer.
    pub async fn uncordon(self: &Arc<Self>, caller: &Caller, node: &str) -> Result<()> {
        let kind = EventKind::NodeUncordoned;
        self.set_scheduling(caller, node, (SchedulingState::Schedulable, kind), String::new())
            .await
            .map(drop)
    }

    /// Stops new work for a node and empties it: stopped sandboxes are moved where other nodes have
    /// access to their disk. Returns the sandboxes still on it, those moved, and why the others
    /// stay. `witness` hears of each that is tried.
    ///
    /// # Errors
    /// When there is no such node, or it does not answer.
    pub async fn drain(
        self: &Arc<Self>,
        caller: &Caller,
        node: &str,
        why: String,
        witness: Witness<'_>,
    ) -> Result<DrainNodeResponse> {
        let kind = EventKind::NodeDraining;
        let node =
            self.set_scheduling(caller, node, (SchedulingState::Draining, kind), why).await?;
        let (moved, stays) = self.move_stopped(caller, &node, witness).await;
        let mut remaining = self.nodes.cache.living_on(&node.name);
        remaining.sort_unstable_by_key(|entry| entry.id);
        let remaining = remaining.iter().map(|entry| self.nodes.cache.view(entry)).collect();
        Ok(DrainNodeResponse { remaining, moved, stays })
    }

    async fn set_scheduling(
        self: &Arc<Self>,
        caller: &Caller,
        node: &str,
        (state, kind): (SchedulingState, EventKind),
        why: String,
    ) -> Result<Arc<Node>> {
        self.may_change()?;
        let node = self.node(node)?;
        let (this, token) = (Arc::clone(self), caller.token.clone());
        let set = self.to_its_end(caller.permit.clone(), async move {
            let set = node.client.set_scheduling(this.nodes.epoch.get(), state, why.clone()).await;
            let load = set.map_err(|error| this.node_error(&node, error))?;
            this.nodes.load_answered(&node, load);
            this.log().append(Event {
                node: Some(node.name.clone()),
                detail: why,
                ..this.log().event(kind, &token)
            });
            this.log_flushed().await;
            Ok(node)
        });
        set.await
    }
}
