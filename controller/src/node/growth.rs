//! Reservations for sandboxes that grow or start on the node that they are on.

use std::sync::Arc;

use super::{Node, Nodes};
use crate::placement::{Growth, NoRoom};

/// Reports of a node after the end of a change of which the first may have been made before that end.
const REPORTS_IN_FLIGHT: u64 = 2;

/// Growth that is reserved on a node. It counts until it is dropped, and from then on until the node's
/// reports include what has become of it. Starts of one sandbox share what they reserve.
#[derive(Debug)]
pub struct GrowthGuard {
    nodes: Arc<Nodes>,
    node: Arc<Node>,
    number: u64,
}

impl Nodes {
    /// Reserves what a sandbox of a node takes more, in one step with the decision.
    ///
    /// # Errors
    /// When the node has no room for it.
    pub fn grow(
        self: &Arc<Self>,
        node: &Arc<Node>,
        growth: &Growth,
    ) -> Result<GrowthGuard, NoRoom> {
        let number = self.fleet.lock().grow(node.slot, growth)?;
        Ok(GrowthGuard { nodes: self.clone(), node: node.clone(), number })
    }

    /// Returns the cores that a node reports of its sandboxes, and those that are reserved on it.
    #[cfg(test)]
    pub(crate) fn cores_given(&self, node: &Node) -> (f64, u32) {
        let fleet = self.fleet.lock();
        let view = fleet.view(node.slot);
        (view.load.cores_allocated, view.reserved.cores)
    }
}

impl Drop for GrowthGuard {
    fn drop(&mut self) {
        let mut fleet = self.nodes.fleet.lock();
        let last = self.node.state.lock().report.as_ref().map_or(0, |(load, _)| load.seq);
        fleet.grown(self.number, last + REPORTS_IN_FLIGHT);
    }
}
