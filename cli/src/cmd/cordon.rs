//! `cordon`: gives a node no new sandboxes.

use clap::Args;
use proto::sandbox::v1::CordonNodeRequest;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

/// Arguments of `cordon`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node cordon pve2 --why 'new disks'  no new sandboxes there; those
                                                 that are there live on
  sandboxctl node uncordon pve2                  new ones again

The node itself keeps it, over restarts of everything.")]
pub(crate) struct Cordon {
    /// PVE's name of the node
    node: String,
    /// Reason, kept in the event log
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    why: String,
}

pub(super) async fn run(
    controller: Controller,
    args: Cordon,
    output: Output,
) -> Result<u8, Failure> {
    let Cordon { node, why } = args;
    let request = CordonNodeRequest { node: node.clone(), why };
    answer(controller.operator.clone().cordon_node(request)).await?;
    done(output, &node, "gets no new sandboxes")
}

/// Prints that the node has changed.
pub(super) fn done(output: Output, node: &str, what: &str) -> Result<u8, Failure> {
    if !output.json {
        output.line(format!("{node} {what}"))?;
    }
    Ok(0)
}
