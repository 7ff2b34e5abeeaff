//! Garbage that the nodes remove, and garbage that they leave to an operator.

use std::sync::Arc;

use futures_util::future::join_all;
use proto::{Reason, name::NodeName, sandbox::v1::GarbageItem};

use crate::{
    node::Node,
    sandbox::{Error, Result, Sandboxes},
};

impl Sandboxes {
    /// Lists what the nodes clean up next and, unless `dry_run`, cleans it up. Also returns the
    /// nodes that did not answer.
    ///
    /// # Errors
    /// When there is no node of this name.
    pub async fn collect_garbage(
        &self,
        node: &str,
        dry_run: bool,
    ) -> Result<(Vec<GarbageItem>, Vec<String>)> {
        if !dry_run {
            self.may_change()?;
        }
        let nodes = match node {
            "" => self.nodes.all(),
            name => vec![self.node(name)?],
        };
        let epoch = self.nodes.epoch.get();
        let calls = nodes.iter().map(|node| node.client.collect_garbage(epoch, dry_run));
        let (mut items, mut unreachable) = (Vec::new(), Vec::new());
        for (node, found) in nodes.iter().zip(join_all(calls).await) {
            match found {
                Ok(found) => items.extend(found),
                Err(error) => {
                    tracing::warn!(node = %node.name, %error, "node did not report its garbage");
                    unreachable.push(node.name.to_string());
                }
            }
        }
        Ok((items, unreachable))
    }

    /// Returns a node that answers, by its name.
    pub(super) fn node(&self, name: &str) -> Result<Arc<Node>> {
        let name: NodeName = name.parse()?;
        let unknown = || Error::new(Reason::NodeNotFound, format!("there is no node {name}"));
        let node = self.nodes.get(&name).ok_or_else(unknown)?;
        match node.down() {
            Some(why) => Err(Error::unreachable(&name, &why)),
            None => Ok(node),
        }
    }
}
