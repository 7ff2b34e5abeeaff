//! Operations of operators: on nodes, and on sandboxes of any team; and cleaning up.

mod adopt;
mod cordon;
mod drain;
mod each;
mod forget_node;
mod fsck;
mod garbage;
mod prune;
mod recover;
mod release;

pub use each::{Outcome, Witness};
pub use fsck::Report;

use proto::{Reason, sandbox::v1::Egress};

use crate::{
    node::Node,
    sandbox::{Error, Result},
};

/// Checks that a node can keep this from what it must not reach: an older agent would let it.
fn can_close(node: &Node, egress: Egress) -> Result<()> {
    if egress != Egress::None || node.closes_egress() {
        return Ok(());
    }
    let why = "cannot close a sandbox: it does not isolate, or its agent is too old";
    Err(Error::new(Reason::IsolationFailed, format!("{} {why}", node.name)))
}
