//! Arguments that select a node by its labels.

use clap::Args as Group;
use proto::sandbox::v1::Placement;

/// Labels of nodes that a creation cares for.
#[derive(Debug, Default, PartialEq, Eq, Group)]
pub struct Labels {
    /// Only nodes with this label, such as gpu or zone=a; may be given often
    #[arg(long, value_name = "LABEL")]
    pub require: Vec<String>,
    /// No node with this label; may be given often
    #[arg(long, value_name = "LABEL")]
    pub forbid: Vec<String>,
    /// Rather a node with this label; may be given often
    #[arg(long, value_name = "LABEL")]
    pub prefer: Vec<String>,
    /// Rather a node without this label; may be given often
    #[arg(long, value_name = "LABEL")]
    pub avoid: Vec<String>,
}

impl Labels {
    /// As it goes to the controller; nothing where nothing was typed.
    pub fn wire(self) -> Option<Placement> {
        let Self { require, forbid, prefer, avoid } = self;
        let placement = Placement { require, forbid, prefer, avoid };
        (placement != Placement::default()).then_some(placement)
    }
}
