//! `node revoke`: turns a node away at once.

use clap::Args;
use proto::sandbox::v1::RevokeNodeRequest;
use serde_json::json;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

/// Arguments of `node revoke`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node revoke pve3  its connections are closed, its certificates
                               refused
  sandboxctl node token pve3   lets it join again, with new certificates

Its sandboxes run on there, and are UNREACHABLE: `node forget --lost` gives them
up. The other nodes refuse the web requests that it passes on.")]
pub(crate) struct NodeRevoke {
    /// PVE's name of the node
    node: String,
}

pub(super) async fn run(
    controller: Controller,
    NodeRevoke { node }: NodeRevoke,
    output: Output,
) -> Result<u8, Failure> {
    let request = RevokeNodeRequest { node: node.clone() };
    let left = answer(controller.enrolment.clone().revoke_node(request)).await?.sandboxes;
    if output.json {
        output.value(&json!({ "node": node, "revoked": true, "sandboxes": left }))?;
        return Ok(0);
    }
    output.line(format!("{node} is revoked; {left} sandboxes are on it and cannot be reached"))?;
    Ok(0)
}
