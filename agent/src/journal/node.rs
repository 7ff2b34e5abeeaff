//! The node of the cluster that a journal belongs to.

use proto::name::NodeName;
use serde::{Deserialize, Serialize};

/// The node's identity when it was first quorate, or alone without a cluster, or as an operator has
/// confirmed since. Its ranges of vmids and addresses follow from the number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// PVE's name of the node.
    pub name: NodeName,
    /// Number in the cluster, from 1.
    pub number: u32,
}
