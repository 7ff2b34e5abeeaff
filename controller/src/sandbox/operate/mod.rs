//! Operations of operators: on nodes, and on sandboxes of any team; and cleaning up.

mod adopt;
mod cordon;
mod drain;
mod forget_node;
mod fsck;
mod garbage;
mod prune;
mod recover;
mod release;

pub use fsck::Report;

use proto::{Reason, sandbox::v1::Egress};

use crate::{
    node::Node,
    sandbox::{Error, RETRY, Result},
};

/// Checks that a node can keep this from what it must not reach: an older agent would let it.
fn can_close(node: &Node, egress: Egress) -> Result<()> {
    let name = &node.name;
    match (egress, node.closes_egress()) {
        (Egress::Unspecified | Egress::Open, _) | (Egress::None, Some(true)) => Ok(()),
        (Egress::None, Some(false)) => {
            let why = "cannot close a sandbox: it does not isolate, or its agent is too old";
            Err(Error::new(Reason::IsolationFailed, format!("{name} {why}")))
        }
        (Egress::None, None) => {
            let why = "is not connected: whether it can close a sandbox is not known";
            Err(Error::new(Reason::NodeUnreachable, format!("{name} {why}")).retry(RETRY))
        }
    }
}
