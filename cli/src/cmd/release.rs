//! `release`: ends a sandbox and leaves its container.

use clap::Args;
use proto::sandbox::v1::ReleaseSandboxRequest;

use crate::{
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `release`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin release ID  the sandbox ends, the container is left as it is

For a sandbox that was adopted; and for one that cannot be deleted, because its
container lost its mark, became a template, or is on another node. This cannot
be undone: the sandbox is DELETED.")]
pub(crate) struct Release {
    /// Sandbox: its id or a part of it from either end, a vmid, @current or @last
    pub(super) id: String,
}

pub(super) async fn run(
    controller: Controller,
    args: Release,
    output: Output,
) -> Result<u8, Failure> {
    let request = ReleaseSandboxRequest { id: args.id };
    let released = answer(controller.operator.clone().release_sandbox(request)).await?.sandbox;
    let sandbox = promised(released)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} has ended; container {} is left", sandbox.id, sandbox.vmid))?;
    }
    Ok(0)
}
