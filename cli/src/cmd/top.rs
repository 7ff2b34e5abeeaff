//! `top`: resource usage of sandboxes. CPU is the difference of two readings, by the node's clock.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, stdout},
    time::Duration,
};

use clap::Args;
use proto::sandbox::v1::{GetUsageRequest, Usage};
use serde::Serialize;

use crate::{
    client::{Controller, read},
    failure::Failure,
    listing::Listing,
    output::{
        Output, json,
        layout::{Column, Fit},
        short::Part,
        table::{self, Table},
    },
};

/// Arguments of `top`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl top              all that run or are paused, until Ctrl-C
  sandboxctl top --once ID    one reading, taken over one second
  sandboxctl top --sort -cpu  the busiest first
  sandboxctl top --json       the same as one list

CPU % is of one core. PSI is the share of time in which processes waited for
CPU, memory and disk.")]
pub(crate) struct Top {
    /// Sandboxes: each a name, an id or a part of it from either end, a vmid, @current or @last [default: all
    /// of the team that run or are paused]
    #[arg(value_name = "ID")]
    pub(super) ids: Vec<String>,
    /// Print one reading and end
    #[arg(long)]
    once: bool,
    /// Flags of the list.
    #[command(flatten)]
    listing: Listing,
}

const COLUMNS: &[Column] = &[
    Column::new("ID").ids(Part::End),
    Column::new("PHASE").rank(2),
    Column::new("CPU %").right(),
    Column::new("MEMORY").right(),
    Column::new("LIMIT").rank(1).right(),
    Column::new("SWAP").rank(5).right(),
    Column::new("PIDS").rank(4).right(),
    Column::new("PSI CPU/MEM/IO").named("psi").rank(3).fit(Fit::Cut(14)).right(),
];

/// Time between two readings.
const PERIOD: Duration = Duration::from_secs(1);

/// One sandbox in `--json`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    id: &'a str,
    phase: &'static str,
    cpu_percent: f64,
    memory_bytes: u64,
    memory_max_bytes: u64,
    swap_bytes: u64,
    pids: u32,
    psi_cpu: f64,
    psi_memory: f64,
    psi_io: f64,
}

pub(super) async fn run(controller: Controller, top: Top, output: Output) -> Result<u8, Failure> {
    let live = !top.once && !output.json && !output.names && stdout().is_terminal();
    let mut before = usages(&controller, &top.ids).await?;
    loop {
        tokio::time::sleep(PERIOD).await;
        let now = usages(&controller, &top.ids).await?;
        let rows: Vec<_> = now.values().map(|usage| row(before.get(&usage.id), usage)).collect();
        if !live {
            let empty = "nothing runs; `sandboxctl create` makes a sandbox";
            top.listing.print(output, table(&rows), &rows, empty)?;
            return Ok(0);
        }
        top.listing.draw(output, table(&rows))?;
        before = now;
    }
}

async fn usages(
    controller: &Controller,
    ids: &[String],
) -> Result<BTreeMap<String, Usage>, Failure> {
    let call = || {
        let (mut client, request) = (
            controller.sandboxes.clone(),
            GetUsageRequest { ids: ids.to_vec(), ..Default::default() },
        );
        async move { client.get_usage(request).await }
    };
    let told = read(call).await?;
    Ok(told.usages.into_iter().map(|usage| (usage.id.clone(), usage)).collect())
}

/// JSON of the use of a sandbox, with the sum of its CPU time.
pub(super) fn totals(usage: &Usage) -> serde_json::Value {
    serde_json::json!({
        "cpu_us": usage.cpu_us,
        "memory_bytes": usage.memory_bytes,
        "memory_max_bytes": usage.memory_max_bytes,
        "swap_bytes": usage.swap_bytes,
        "pids": usage.pids,
        "psi_cpu": usage.psi_cpu,
        "psi_memory": usage.psi_memory,
        "psi_io": usage.psi_io,
    })
}

fn row<'a>(before: Option<&Usage>, usage: &'a Usage) -> Row<'a> {
    Row {
        id: &usage.id,
        phase: json::phase(if usage.frozen {
            proto::sandbox::v1::Phase::Paused
        } else {
            proto::sandbox::v1::Phase::Running
        }),
        cpu_percent: before.map_or(0.0, |before| cpu_percent(before, usage)),
        memory_bytes: usage.memory_bytes,
        memory_max_bytes: usage.memory_max_bytes,
        swap_bytes: usage.swap_bytes,
        pids: usage.pids,
        psi_cpu: usage.psi_cpu,
        psi_memory: usage.psi_memory,
        psi_io: usage.psi_io,
    }
}

/// CPU usage in percent of one core; 0 when one of the readings is of an earlier boot.
fn cpu_percent(before: &Usage, now: &Usage) -> f64 {
    let passed_us = now.at_ns.saturating_sub(before.at_ns) as f64 / 1000.0;
    let used_us = now.cpu_us.saturating_sub(before.cpu_us) as f64;
    if passed_us > 0.0 { (used_us / passed_us * 1000.0).round() / 10.0 } else { 0.0 }
}

fn table(rows: &[Row<'_>]) -> Table {
    let mut table = Table::new(COLUMNS);
    for row in rows {
        let limit = match row.memory_max_bytes {
            0 => table::cell(""),
            bytes => table::size(bytes),
        };
        let psi = format!("{:.1}/{:.1}/{:.1}", row.psi_cpu, row.psi_memory, row.psi_io);
        table.row(vec![
            table::cell(row.id),
            table::cell(row.phase),
            table::cell(format!("{:.1}", row.cpu_percent)).number(row.cpu_percent),
            table::size(row.memory_bytes),
            limit,
            table::size(row.swap_bytes),
            table::number(row.pids.into()),
            table::cell(psi).number(row.psi_cpu.max(row.psi_memory).max(row.psi_io)),
        ]);
    }
    table
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Table of usage with long values, for the screens.
    pub(in crate::cmd) fn screen() -> Table {
        let row = |id| Row {
            id,
            phase: "running",
            cpu_percent: 1599.9,
            memory_bytes: 6043 << 20,
            memory_max_bytes: 6144 << 20,
            swap_bytes: 117 << 20,
            pids: 32_768,
            psi_cpu: 100.0,
            psi_memory: 100.0,
            psi_io: 100.0,
        };
        table(&[
            row("pvelxc-06g1t7q8hk0fjf1k8m2v3n4p5q"),
            row("pvelxc-06g1t7q8hk0fjf1k8m2v3n4p6q"),
            row("pvelxc-06g1t7q8hk0fjf1k8m2w3n4p5q"),
        ])
    }

    #[test]
    fn cpu_percent_is_computed_from_two_readings() {
        let at = |cpu_us, at_ns| Usage { cpu_us, at_ns, ..Usage::default() };
        assert_eq!(cpu_percent(&at(0, 0), &at(500_000, 1_000_000_000)), 50.0);
        assert_eq!(cpu_percent(&at(0, 0), &at(2_000_000, 1_000_000_000)), 200.0);
        assert_eq!(cpu_percent(&at(9, 9), &at(0, 0)), 0.0, "another boot");
        assert_eq!(cpu_percent(&at(0, 5), &at(7, 5)), 0.0, "no time has passed");
    }
}
