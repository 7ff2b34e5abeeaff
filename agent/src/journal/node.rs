//! Which node of its cluster a journal belongs to.

use proto::name::NodeName;
use serde::{Deserialize, Serialize};

/// The node, as it was the first time that it was quorate, or alone without a cluster, or as an
/// operator has confirmed it since. Its ranges of vmids and addresses go by the number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// PVE's name of it.
    pub name: NodeName,
    /// Its number in the cluster, from 1.
    pub number: u32,
}
