//! `adopt`: makes a sandbox of a container that was made without us.

use clap::Args;
use proto::sandbox::v1::AdoptSandboxRequest;
use serde_json::json;

use crate::{
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

/// Arguments of `adopt`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl admin adopt 207 --team acme        what it would become; nothing is
                                                done
  sandboxctl admin adopt 207 --team acme --yes  it is a sandbox of the team
  sandboxctl admin release 207                  and somebody's container again

The container runs on as it is. A line is added to its description, its ports
are closed to the web until they are opened with `expose`, and `rm` deletes it,
volumes and all.")]
pub(crate) struct Adopt {
    /// Number of the container
    vmid: u32,
    /// Team that it will belong to
    #[arg(long, value_name = "TEAM")]
    team: String,
    /// Node that it is on [default: the one that has it]
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Adopt it; without this flag only show what it would become
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(
    controller: Controller,
    args: Adopt,
    output: Output,
) -> Result<u8, Failure> {
    let Adopt { vmid, team, node, yes } = args;
    let request = AdoptSandboxRequest {
        node: node.unwrap_or_default(),
        vmid,
        team: team.clone(),
        dry_run: !yes,
    };
    let told = answer(controller.operator.clone().adopt_sandbox(request)).await?;
    let sandbox = promised(told.sandbox)?;
    if output.json {
        output.value(&json!({
            "sandbox": json::sandbox(&sandbox), "volumes": told.volumes, "adopted": yes,
        }))?;
        return Ok(0);
    }
    let size = sandbox.size.unwrap_or_default();
    let phase = json::phase(sandbox.phase());
    let as_it_is = format!("{phase}, {} cores, {} MiB", size.cpu_cores, size.memory_mib);
    if yes {
        let id = &sandbox.id;
        output.line(format!("container {vmid} is {id} of team {team}: {as_it_is}"))?;
        output.note(format!("open its ports with `sandboxctl expose {id} PORT --name NAME`"));
    } else {
        let on = &sandbox.node;
        output.line(format!(
            "container {vmid} on {on} would be a sandbox of team {team}: {as_it_is}"
        ))?;
        for volume in &told.volumes {
            output.line(format!("  {volume} goes when the sandbox is deleted"))?;
        }
        output.line("nothing was done; say --yes to do it")?;
    }
    Ok(0)
}
