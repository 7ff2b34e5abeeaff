//! Garbage that the nodes remove, and garbage that they leave to an operator.

use std::sync::Arc;

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use proto::{Reason, name::NodeName, sandbox::v1::GarbageItem};

use crate::{
    node::Node,
    sandbox::{Error, Result, Sandboxes, stopping},
};

impl Sandboxes {
    /// Lists what the nodes clean up next and, unless `dry_run`, cleans it up. Also returns the
    /// nodes that did not answer. `cleaned` hears what each node has done, also when the caller has gone:
    /// nodes finish what they were asked for.
    ///
    /// # Errors
    /// When there is no node of this name.
    pub async fn collect_garbage(
        &self,
        node: &str,
        dry_run: bool,
        cleaned: impl Fn(&[GarbageItem]) + Send + 'static,
    ) -> Result<(Vec<GarbageItem>, Vec<String>)> {
        if !dry_run {
            self.may_change()?;
        }
        let nodes = match node {
            "" => self.nodes.all(),
            name => vec![self.node(name)?],
        };
        let epoch = self.nodes.epoch.get();
        let work = async move {
            let mut calls: FuturesUnordered<_> = nodes
                .iter()
                .map(async |node| (node, node.client.collect_garbage(epoch, dry_run).await))
                .collect();
            let (mut items, mut unreachable) = (Vec::new(), Vec::new());
            while let Some((node, found)) = calls.next().await {
                match found {
                    Ok(found) => {
                        cleaned(&found);
                        items.extend(found);
                    }
                    Err(error) => {
                        tracing::warn!(node = %node.name, %error, "node did not report its garbage");
                        unreachable.push(node.name.to_string());
                    }
                }
            }
            // In the order of the nodes, whichever was first.
            items.sort_by(|one: &GarbageItem, other| one.node.cmp(&other.node));
            unreachable.sort();
            (items, unreachable)
        };
        self.tasks.spawn(work).await.map_err(|_| stopping())
    }

    /// Returns a node that answers, by its name.
    pub(super) fn node(&self, name: &str) -> Result<Arc<Node>> {
        let name: NodeName = name.parse()?;
        let unknown = || Error::new(Reason::NodeNotFound, format!("there is no node {name}"));
        self.if_reachable(self.nodes.get(&name).ok_or_else(unknown)?)
    }
}
