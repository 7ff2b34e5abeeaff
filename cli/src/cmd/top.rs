//! `top`: resource usage of sandboxes. CPU is the difference of two readings, by the node's clock.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, stdout},
    time::Duration,
};

use comfy_table::Cell;
use proto::sandbox::v1::{GetUsageRequest, Usage};
use serde::Serialize;

use crate::{
    args::Top,
    client::{Controller, answer},
    failure::Failure,
    output::{Output, json, table},
};

/// Time between two readings.
const PERIOD: Duration = Duration::from_secs(1);
/// Escape sequence that moves to the top left and clears the screen.
const HOME: &str = "\x1b[H\x1b[J";

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
    let live = !top.once && !output.json && stdout().is_terminal();
    let mut before = read(&controller, &top.ids).await?;
    loop {
        tokio::time::sleep(PERIOD).await;
        let now = read(&controller, &top.ids).await?;
        let rows: Vec<_> = now.values().map(|usage| row(before.get(&usage.id), usage)).collect();
        if output.json {
            output.value(&rows)?;
        } else if rows.is_empty() && !live {
            output.note("nothing runs; `sandboxctl create` makes a sandbox");
        } else {
            let home = if live { HOME } else { "" };
            output.styled(format!("{home}{}", text(&rows, output)))?;
        }
        if !live {
            return Ok(0);
        }
        before = now;
    }
}

async fn read(controller: &Controller, ids: &[String]) -> Result<BTreeMap<String, Usage>, Failure> {
    let request = GetUsageRequest { ids: ids.to_vec() };
    let told = answer(controller.sandboxes.clone().get_usage(request)).await?;
    Ok(told.usages.into_iter().map(|usage| (usage.id.clone(), usage)).collect())
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

fn text(rows: &[Row<'_>], output: Output) -> String {
    let headings = ["ID", "PHASE", "CPU %", "MEMORY", "LIMIT", "SWAP", "PIDS", "PSI CPU/MEM/IO"];
    let mut table = table::new(output, &headings);
    for row in rows {
        let limit = match row.memory_max_bytes {
            0 => "-".to_owned(),
            bytes => table::bytes(bytes),
        };
        let psi = format!("{:.1}/{:.1}/{:.1}", row.psi_cpu, row.psi_memory, row.psi_io);
        let cells: Vec<Cell> = vec![
            table::cell(row.id),
            table::cell(row.phase),
            table::number(format!("{:.1}", row.cpu_percent)),
            table::number(table::bytes(row.memory_bytes)),
            table::number(limit),
            table::number(table::bytes(row.swap_bytes)),
            table::number(row.pids),
            table::number(psi),
        ];
        table.add_row(cells);
    }
    table::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_the_difference_of_two_readings() {
        let at = |cpu_us, at_ns| Usage { cpu_us, at_ns, ..Usage::default() };
        assert_eq!(cpu_percent(&at(0, 0), &at(500_000, 1_000_000_000)), 50.0);
        assert_eq!(cpu_percent(&at(0, 0), &at(2_000_000, 1_000_000_000)), 200.0);
        assert_eq!(cpu_percent(&at(9, 9), &at(0, 0)), 0.0, "another boot");
        assert_eq!(cpu_percent(&at(0, 5), &at(7, 5)), 0.0, "no time has passed");
    }
}
