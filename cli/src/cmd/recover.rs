//! `recover`: takes a container back that carries our mark and is in no journal.

use clap::Args;
use proto::sandbox::v1::RecoverSandboxRequest;

use crate::{
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `recover`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin gc --dry-run                shows them as `quarantined`
  sandboxctl admin recover --node pve2 100017 --dry-run
  sandboxctl admin recover --node pve2 100017  it is a sandbox again, its ports
                                               closed
  sandboxctl rm 100017                         or, after that, delete it")]
pub(crate) struct Recover {
    /// Number of the container
    vmid: u32,
    /// Node that it is on
    #[arg(long, value_name = "NODE")]
    node: String,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn run(
    controller: Controller,
    args: Recover,
    output: Output,
) -> Result<u8, Failure> {
    let request = RecoverSandboxRequest { node: args.node, vmid: args.vmid, dry_run: args.dry_run };
    let mut operator = controller.operator.clone();
    let sandbox = promised(answer(operator.recover_sandbox(request)).await?.sandbox)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        let verb = if args.dry_run { "would be" } else { "is" };
        let phase = json::phase(sandbox.phase());
        output.line(format!("{} {verb} {phase} again, of team {}", sandbox.id, sandbox.team))?;
    }
    Ok(0)
}
