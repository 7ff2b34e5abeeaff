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
