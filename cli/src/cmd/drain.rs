//! `drain`: lets a node become empty, and shows what is still there.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{DrainNodeRequest, Sandbox};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    client::{Controller, answer},
    exit,
    failure::Failure,
    listing,
    output::{Output, json},
    printable::one_line,
    progress::Spinner,
    values::duration,
};

/// Arguments of `drain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node drain pve2                      no new ones, and what is there
                                                  still; exit 1 if any
  sandboxctl node drain pve2 --wait --timeout 8h  until nothing is there
  sandboxctl node uncordon pve2                   cancel it

Sandboxes end by their lifetimes, or are deleted by their owners. What is
stopped is moved to nodes that see its disk (shared storage); what runs or is
paused is not: containers cannot be moved alive.")]
pub(crate) struct Drain {
    /// PVE's name of the node
    node: String,
    /// Reason, kept in the event log
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    why: String,
    /// Wait until nothing is there
    #[arg(long)]
    wait: bool,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    timeout: Duration,
}

/// Interval of the checks of a node that is being drained.
const LOOK: Duration = Duration::from_secs(2);
/// Consecutive checks that must find nothing until the node counts as empty: creations that were in
/// transit appear meanwhile.
const EMPTY: u32 = 3;

pub(super) async fn run(
    controller: Controller,
    args: Drain,
    output: Output,
) -> Result<u8, Failure> {
    let Drain { node, why, wait, timeout } = args;
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
        listing::table(output, super::on_node::table(&remaining))?;
        for (id, why) in &stays {
            output.sentence(format!("{id} stays: {}", one_line(why)))?;
        }
        output.line(format!("{} left on {node}, which gets no new ones", remaining.len()))?;
    }
    Ok(if remaining.is_empty() { 0 } else { exit::REFUSED })
}
