//! `adopt` and `release`: make a container a sandbox, and the reverse.

use proto::sandbox::v1::{AdoptSandboxRequest, ReleaseSandboxRequest};
use serde_json::json;

use crate::{
    args::{Adopt, Release},
    client::{Controller, answer, promised},
    failure::Failure,
    output::{Output, json},
};

pub(super) async fn adopt(
    controller: Controller,
    wish: Adopt,
    output: Output,
) -> Result<u8, Failure> {
    let Adopt { vmid, team, node, yes } = wish;
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

pub(super) async fn release(
    controller: Controller,
    wish: Release,
    output: Output,
) -> Result<u8, Failure> {
    let request = ReleaseSandboxRequest { id: wish.id };
    let released = answer(controller.operator.clone().release_sandbox(request)).await?.sandbox;
    let sandbox = promised(released)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        output.line(format!("{} has ended; container {} is left", sandbox.id, sandbox.vmid))?;
    }
    Ok(0)
}
