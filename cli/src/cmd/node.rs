//! `node`: what is done to a node as a whole.

use proto::sandbox::v1::ForgetNodeRequest;

use crate::{
    args::Node,
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, table},
};

pub(super) async fn run(controller: Controller, wish: Node, output: Output) -> Result<u8, Failure> {
    let Node::Forget { node, lost, dry_run } = wish;
    let request = ForgetNodeRequest { node: node.clone(), lost, dry_run };
    let gone = answer(controller.operator.clone().forget_node(request)).await?.sandboxes;
    if output.json {
        output.value(&gone.iter().map(json::sandbox).collect::<Vec<_>>())?;
        return Ok(0);
    }
    if !gone.is_empty() {
        let mut rows = table::new(output, &["ID", "TEAM", "VMID", "PHASE"]);
        for sandbox in &gone {
            let vmid = sandbox.vmid.to_string();
            let phase = json::phase(sandbox.phase());
            rows.add_row([&sandbox.id, &sandbox.team, &vmid, phase].map(table::cell));
        }
        output.line(table::text(&rows))?;
    }
    let count = gone.len();
    output.line(if dry_run {
        format!("{node} would be forgotten, and {count} sandboxes with it; nothing was done")
    } else {
        format!("{node} is forgotten, and {count} sandboxes with it")
    })?;
    Ok(0)
}
