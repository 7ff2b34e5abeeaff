//! `nodes`: lists the nodes and their load.

use clap::Args;
use proto::sandbox::v1::{ListNodesRequest, Node};

use crate::{
    client::{Controller, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        table::{self, Cell, Colour, Table},
        time,
    },
};

/// Arguments of `nodes`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node ls              state and load; what waits for what
  sandboxctl node ls -o wide      with snapshots, versions and queues
  sandboxctl node ls --sort -cpu  the busiest first

STATE is `ready`, or says why a node gets no new sandboxes. PRESSURE is the
share of time in which processes wait for CPU, memory or disk, the worst of the
three. CERTIFICATE is the time until the one of the agent ends; it is renewed at
half of its life.")]
pub(crate) struct Nodes {
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("NODE").fit(Fit::Cut(12)),
    Column::new("STATE"),
    Column::new("CPU").rank(1).fit(Fit::Step(5)),
    Column::new("MEMORY").rank(1).fit(Fit::Step(6)),
    Column::new("STORAGE").rank(3).fit(Fit::Step(7)),
    Column::new("PRESSURE").rank(4).right(),
    Column::new("SANDBOXES").rank(2).right(),
    Column::new("STARTING").rank(7).right(),
    Column::new("QUEUED").rank(8).right(),
    Column::new("SNAPSHOTS").rank(9).fit(Fit::Cut(12)),
    Column::new("AGENT").rank(10).fit(Fit::Cut(6)),
    Column::new("REPORT").rank(6),
    Column::new("CERTIFICATE").rank(11),
    Column::new("REASON").rank(5).fit(Fit::Cut(11)),
];

pub(super) async fn run(
    controller: Controller,
    Nodes { listing }: Nodes,
    output: Output,
) -> Result<u8, Failure> {
    let call = || {
        let mut client = controller.operator.clone();
        async move { client.list_nodes(ListNodesRequest {}).await }
    };
    let nodes = read(call).await?.nodes;
    let values: Vec<_> = nodes.iter().map(json::node).collect();
    let empty = "no nodes; `sandboxctl node token NODE` prints the line that joins one";
    listing.print(output, table(&nodes), &values, empty)?;
    Ok(0)
}

fn table(nodes: &[Node]) -> Table {
    let mut table = Table::new(COLUMNS);
    nodes.iter().for_each(|node| table.row(row(node)));
    table
}

fn row(node: &Node) -> Vec<Cell> {
    let load = node.load.clone().unwrap_or_default();
    let used = |free: u64, total: u64| match total {
        0 => table::cell(""),
        total => table::bar(1.0 - free.min(total) as f64 / total as f64),
    };
    let quorum = node.load.is_none() || load.quorate;
    let (state, colour) = match (node.ready, quorum) {
        (false, _) => ("not ready", Colour::Red),
        (true, false) => ("no quorum", Colour::Red),
        (true, true) if load.draining => ("draining", Colour::Yellow),
        (true, true) if load.cordoned => ("cordoned", Colour::Yellow),
        (true, true) if load.renumbered_to > 0 => ("renumbered", Colour::Red),
        (true, true) if load.maintenance => ("maintenance", Colour::Yellow),
        (true, true) if load.snapshots.is_empty() => ("no snapshots", Colour::Yellow),
        (true, true) => ("ready", Colour::Green),
    };
    // Maximum of CPU, memory and disk: the resource that processes wait for most.
    let pressure = load.psi_cpu.max(load.psi_memory).max(load.psi_io);
    let report = match json::millis(node.report_age) {
        Some(age) => format!("{} ago", time::seconds(age / 1000)),
        None => "never".into(),
    };
    vec![
        table::cell(&node.name),
        table::cell(state).colour(colour),
        if node.load.is_some() { table::bar(load.cpu_busy) } else { table::cell("") },
        used(load.memory_available, load.memory_total),
        used(load.storage_free, load.storage_total),
        match node.load {
            Some(_) => table::cell(format!("{pressure:.0} %")).number(pressure),
            None => table::cell(""),
        },
        table::number(node.sandboxes.into()),
        table::number(load.starting.into()),
        table::number(load.queued.into()),
        table::cell(load.snapshots.join(" ")),
        table::cell(&node.version),
        table::cell(report),
        table::cell(time::left(node.certificate_expires_at)),
        table::cell(&node.reason),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use proto::sandbox::v1::NodeLoad;

    use super::*;

    /// Table of nodes with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let load = NodeLoad {
            cpu_busy: 0.42,
            memory_total: 64 << 30,
            memory_available: 6 << 30,
            storage_total: 1 << 40,
            storage_free: 1 << 39,
            psi_io: 12.3,
            starting: 3,
            queued: 12,
            quorate: true,
            snapshots: vec!["pvelxc_1vcpu_512mb_2gb_v1".into(), "pvelxc_4vcpu_6gb_32gb_v1".into()],
            ..NodeLoad::default()
        };
        let node = |name: &str, load: Option<NodeLoad>, reason: &str| Node {
            name: name.into(),
            ready: load.is_some(),
            reason: reason.into(),
            version: "0.1.0+1234567".into(),
            sandboxes: 117,
            report_age: load.is_some().then_some(prost_types::Duration { seconds: 1, nanos: 0 }),
            load,
            ..Node::default()
        };
        table(&[
            node("pve-frankfurt-rack-12", Some(load.clone()), ""),
            node("pve2", Some(NodeLoad { maintenance: true, ..load }), "MAINTENANCE"),
            node("pve3", None, "UNREACHABLE: the connection was refused"),
        ])
    }
}
