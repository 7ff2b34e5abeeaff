//! Tables of the nodes that joined, as the store in memory has them.

use std::collections::BTreeMap;

use proto::name::NodeName;

use super::enrolments::{Enrolment, Issued, NodeToken};

/// Tables in maps.
#[derive(Debug, Clone, Default)]
pub(super) struct Tables {
    pub(super) tokens: BTreeMap<String, NodeToken>,
    pub(super) nodes: BTreeMap<NodeName, Enrolment>,
    /// Certificates by their numbers.
    pub(super) certificates: BTreeMap<String, (NodeName, u64)>,
}

impl Tables {
    /// Drops the addresses of a node that is forgotten; a revocation stays.
    pub(super) fn forget(&mut self, node: &NodeName) {
        if let Some(known) = self.nodes.get_mut(node) {
            known.address.clear();
            known.pool.clear();
        }
    }

    /// Adds a certificate of a node, and drops those of it that have ended.
    pub(super) fn add(&mut self, node: &NodeName, issued: Issued, now_ms: u64) {
        self.certificates.retain(|serial, (of, not_after_ms)| {
            of != node || *not_after_ms > now_ms || Some(serial) == issued.in_use.as_ref()
        });
        self.certificates.insert(issued.serial, (node.clone(), issued.not_after_ms));
    }
}
