//! `nodes`: lists the nodes and their load.

use comfy_table::{Cell, Color};
use proto::sandbox::v1::{ListNodesRequest, Node};

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, table, time},
    printable::one_line,
};

pub(super) async fn run(controller: Controller, output: Output) -> Result<u8, Failure> {
    let known = answer(controller.operator.clone().list_nodes(ListNodesRequest {})).await?;
    if output.json {
        output.value(&known.nodes.iter().map(json::node).collect::<Vec<_>>())?;
    } else if known.nodes.is_empty() {
        output.note("no nodes; name an agent in the controller's configuration");
    } else {
        let headings = [
            "NODE",
            "STATE",
            "CPU",
            "MEMORY",
            "STORAGE",
            "PRESSURE",
            "SANDBOXES",
            "STARTING",
            "QUEUED",
            "SNAPSHOTS",
            "AGENT",
            "REPORT",
        ];
        let mut rows = table::new(output, &headings);
        for node in &known.nodes {
            rows.add_row(row(node, output));
        }
        output.styled(table::text(&rows))?;
    }
    Ok(0)
}

fn row(node: &Node, output: Output) -> Vec<Cell> {
    let load = node.load.clone().unwrap_or_default();
    let used = |free: u64, total: u64| match total {
        0 => Cell::new("-"),
        total => table::bar(output, 1.0 - free.min(total) as f64 / total as f64),
    };
    let quorum = node.load.is_none() || load.quorate;
    let (state, colour) = match (node.ready, quorum) {
        (false, _) => ("not ready", Color::Red),
        (true, false) => ("no quorum", Color::Red),
        (true, true) if load.draining => ("draining", Color::Yellow),
        (true, true) if load.cordoned => ("cordoned", Color::Yellow),
        (true, true) if load.renumbered_to > 0 => ("renumbered", Color::Red),
        (true, true) if load.maintenance => ("maintenance", Color::Yellow),
        (true, true) if load.snapshots.is_empty() => ("no snapshots", Color::Yellow),
        (true, true) => ("ready", Color::Green),
    };
    // Maximum of CPU, memory and disk: the resource that processes wait for most.
    let pressure = load.psi_cpu.max(load.psi_memory).max(load.psi_io);
    let report = match json::millis(node.report_age) {
        Some(age) => format!("{} ago", time::seconds(age / 1000)),
        None => "never".into(),
    };
    vec![
        table::cell(&node.name),
        table::coloured(output, state, colour),
        if node.load.is_some() { table::bar(output, load.cpu_busy) } else { Cell::new("-") },
        used(load.memory_available, load.memory_total),
        used(load.storage_free, load.storage_total),
        if node.load.is_some() { Cell::new(format!("{pressure:.0} %")) } else { Cell::new("-") },
        table::number(node.sandboxes),
        table::number(load.starting),
        table::number(load.queued),
        table::cell(load.snapshots.join(" ")),
        table::cell(&node.version),
        table::cell(report),
        Cell::new(one_line(&node.reason)),
    ]
}
