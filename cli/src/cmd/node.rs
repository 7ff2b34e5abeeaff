//! Operations on a whole node: `cordon`, `uncordon`, `drain`, `node forget`.

use std::time::Duration;

use proto::sandbox::v1::{
    CordonNodeRequest, DrainNodeRequest, ForgetNodeRequest, Sandbox, UncordonNodeRequest,
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    args::{Cordon, Drain, Node, Uncordon},
    client::{Controller, answer},
    exit,
    failure::Failure,
    output::{Output, json, table, time},
    printable::one_line,
    progress::Spinner,
};

/// Interval of the checks of a node that is being drained.
const LOOK: Duration = Duration::from_secs(2);
/// Consecutive checks that must find nothing until the node counts as empty: creations that were in
/// transit appear meanwhile.
const EMPTY: u32 = 3;

pub(super) async fn cordon(
    controller: Controller,
    wish: Cordon,
    output: Output,
) -> Result<u8, Failure> {
    let Cordon { node, why } = wish;
    let request = CordonNodeRequest { node: node.clone(), why };
    answer(controller.operator.clone().cordon_node(request)).await?;
    done(output, &node, "gets no new sandboxes")
}

pub(super) async fn uncordon(
    controller: Controller,
    wish: Uncordon,
    output: Output,
) -> Result<u8, Failure> {
    let request = UncordonNodeRequest { node: wish.node.clone() };
    answer(controller.operator.clone().uncordon_node(request)).await?;
    done(output, &wish.node, "gets new sandboxes again")
}

fn done(output: Output, node: &str, what: &str) -> Result<u8, Failure> {
    if !output.json {
        output.line(format!("{node} {what}"))?;
    }
    Ok(0)
}

pub(super) async fn drain(
    controller: Controller,
    wish: Drain,
    output: Output,
) -> Result<u8, Failure> {
    let Drain { node, why, wait, timeout } = wish;
    let deadline = Instant::now() + timeout;
    let doing = if wait { "waiting for the last to go" } else { "moving what is stopped" };
    let spinner = Spinner::new(output.json, doing);
    let (mut empty, mut moved) = (0, Vec::new());
    let (remaining, stays) = loop {
        let request = DrainNodeRequest { node: node.clone(), why: why.clone() };
        let drained = answer(controller.operator.clone().drain_node(request)).await?;
        moved.extend(drained.moved);
        empty = if drained.remaining.is_empty() { empty + 1 } else { 0 };
        if !wait || empty >= EMPTY || Instant::now() >= deadline {
            break (drained.remaining, drained.stays);
        }
        sleep(LOOK).await;
    };
    drop(spinner);
    if output.json {
        let all =
            |of: &[Sandbox]| of.iter().map(|one| json!(json::sandbox(one))).collect::<Vec<_>>();
        let (moved, remaining) = (all(&moved), all(&remaining));
        output.value(&json!({ "moved": moved, "remaining": remaining, "stays": stays }))?;
        return Ok(if remaining.is_empty() { 0 } else { exit::REFUSED });
    }
    for sandbox in &moved {
        output.line(format!("{} moved to {}", sandbox.id, sandbox.node))?;
    }
    if remaining.is_empty() {
        output.line(format!("{node} is empty, and gets no new sandboxes"))?;
    } else {
        output.styled(table::text(&list(output, &remaining)))?;
        for (id, why) in &stays {
            output.line(format!("{id} stays: {}", one_line(why)))?;
        }
        output.line(format!("{} left on {node}, which gets no new ones", remaining.len()))?;
    }
    Ok(if remaining.is_empty() { 0 } else { exit::REFUSED })
}

pub(super) async fn node(
    controller: Controller,
    wish: Node,
    output: Output,
) -> Result<u8, Failure> {
    let Node::Forget { node, lost, dry_run } = wish;
    let request = ForgetNodeRequest { node: node.clone(), lost, dry_run };
    let gone = answer(controller.operator.clone().forget_node(request)).await?.sandboxes;
    if output.json {
        let sandboxes: Vec<_> = gone.iter().map(json::sandbox).collect();
        output.value(&json!({ "sandboxes": sandboxes, "forgotten": !dry_run }))?;
        return Ok(0);
    }
    if !gone.is_empty() {
        output.styled(table::text(&list(output, &gone)))?;
    }
    let count = gone.len();
    output.line(if dry_run {
        format!("{node} would be forgotten, and {count} sandboxes with it; nothing was done")
    } else {
        format!("{node} is forgotten, and {count} sandboxes with it")
    })?;
    Ok(0)
}

fn list(output: Output, sandboxes: &[Sandbox]) -> comfy_table::Table {
    let mut rows = table::new(output, &["ID", "TEAM", "VMID", "PHASE", "EXPIRES"]);
    for sandbox in sandboxes {
        let (vmid, phase) = (sandbox.vmid.to_string(), json::phase(sandbox.phase()));
        let expires = time::rfc3339(sandbox.expires_at).unwrap_or_else(|| "-".into());
        rows.add_row([&sandbox.id, &sandbox.team, &vmid, phase, &expires].map(table::cell));
    }
    rows
}
