//! `ls`: lists the team's sandboxes.

use comfy_table::Cell;
use proto::sandbox::v1::{ListSandboxesRequest, Sandbox};

use crate::{
    args::Ls,
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, table, time},
};

pub(super) async fn run(controller: Controller, ls: Ls, output: Output) -> Result<u8, Failure> {
    let sandboxes = all(&controller, ls.all).await?;
    if output.json {
        output.value(&sandboxes.iter().map(json::sandbox).collect::<Vec<_>>())?;
    } else if ls.quiet {
        sandboxes.iter().try_for_each(|sandbox| output.line(&sandbox.id))?;
    } else if sandboxes.is_empty() {
        output.note("no sandboxes; `sandboxctl create` makes one");
    } else {
        let headings = ["ID", "VMID", "NODE", "PHASE", "IP", "SNAPSHOT", "SIZE", "PORTS", "AGE"];
        let mut rows = table::new(output, &headings);
        for sandbox in &sandboxes {
            rows.add_row(row(sandbox, output));
        }
        output.styled(table::text(&rows))?;
    }
    Ok(0)
}

async fn all(controller: &Controller, include_ended: bool) -> Result<Vec<Sandbox>, Failure> {
    let (mut sandboxes, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListSandboxesRequest { page_size: 0, page_token, include_ended };
        let page = answer(controller.sandboxes.clone().list_sandboxes(request)).await?;
        sandboxes.extend(page.sandboxes);
        if page.next_page_token.is_empty() {
            return Ok(sandboxes);
        }
        page_token = page.next_page_token;
    }
}

fn row(sandbox: &Sandbox, output: Output) -> Vec<Cell> {
    let ports: Vec<_> = sandbox.services.iter().map(|service| service.port.to_string()).collect();
    vec![
        table::cell(&sandbox.id),
        if sandbox.vmid == 0 { table::cell("") } else { table::number(sandbox.vmid) },
        table::cell(&sandbox.node),
        table::phase(output, sandbox.phase(), sandbox.progress().name()),
        table::cell(&sandbox.ip),
        table::cell(&sandbox.snapshot_id),
        table::cell(super::get::size(sandbox.size)),
        table::cell(ports.join(",")),
        table::number(time::age(sandbox.created_at)),
    ]
}
