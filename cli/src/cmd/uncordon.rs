//! `uncordon`: gives a node new sandboxes again.

use clap::Args;
use proto::sandbox::v1::UncordonNodeRequest;

use super::cordon::done;
use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

/// Arguments of `uncordon`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node uncordon pve2                 also ends a drain")]
pub(crate) struct Uncordon {
    /// PVE's name of the node
    node: String,
}

pub(super) async fn run(
    controller: Controller,
    args: Uncordon,
    output: Output,
) -> Result<u8, Failure> {
    let request = UncordonNodeRequest { node: args.node.clone() };
    answer(controller.operator.clone().uncordon_node(request)).await?;
    done(output, &args.node, "gets new sandboxes again")
}
