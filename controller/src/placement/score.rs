//! How good a node is for a creation: lower is better. The load that is measured, what boots but
//! does not show in it yet, and what sandboxes grow into in the long run.
//!
//! Departures from a textbook least-loaded choice, each measured on a simulated cluster: real load
//! and not allocation alone; reservations, without which a burst lands on one node; a term for work
//! that boots; the spread of a team is counted per 16 cores, but never less than one node's worth,
//! so that small nodes are not ruled by it.

use std::time::Duration;

use super::{
    Limits, NodeView, Part, Verdict,
    filter::{Fit, as_f64, ratio},
};

/// Cores that a booting sandbox keeps busy at most.
pub(super) const BOOT_CORES_MAX: u32 = 4;
/// What a booting sandbox is taken to use where its size is not known.
const BOOT_CORES: f64 = 2.0;
/// How often an agent reports.
const REPORT_PERIOD: Duration = Duration::from_secs(1);
const MIB: u64 = 1024 * 1024;

pub(super) fn median_start_ms(nodes: &[NodeView]) -> f64 {
    let mut known: Vec<u32> = nodes
        .iter()
        .filter_map(|node| node.report.as_ref())
        .map(|(load, _)| load.start_ms)
        .filter(|&ms| ms > 0)
        .collect();
    known.sort_unstable();
    known.get(known.len() / 2).copied().map_or(0.0, f64::from)
}

pub(super) fn verdict(fit: &Fit<'_>, limits: &Limits, median_start_ms: f64) -> Verdict {
    let Fit { node, load, age, size } = fit;
    let cores = load.cores.max(0.1);
    let reserved = &node.reserved;
    let vcpus = f64::from(size.cpu_cores.max(1));

    let stalled = (load.psi_cpu / 100.0).clamp(0.0, 0.8);
    let busy = load.cpu_busy / (1.0 - stalled);
    let expected = limits.cpu_habit * f64::from(load.cores_allocated) / cores;
    let booting = f64::from(load.starting + load.queued) * BOOT_CORES / cores;
    let coming = f64::from(reserved.boot_cores)
        + limits.cpu_habit * f64::from(reserved.cores)
        + vcpus.min(f64::from(BOOT_CORES_MAX))
        + limits.cpu_habit * vcpus;
    let cpu = 0.75 * (busy + 0.5 * booting) + 0.25 * (expected + booting) + coming / cores;

    let total = as_f64(load.memory_total.max(1));
    let used = as_f64(load.memory_total.saturating_sub(load.memory_available));
    let given = limits.memory_habit * as_f64(load.memory_allocated);
    let ask = as_f64(u64::from(size.memory_mib) * MIB) + as_f64(reserved.memory_bytes);
    let memory = (used.max(f64::midpoint(used, given)) + limits.memory_habit * ask) / total;

    let slots = (cores / 8.0).max(2.0);
    let starting = f64::from(load.starting + reserved.sandboxes + 1) / slots;
    let latency = if load.start_ms == 0 || median_start_ms == 0.0 {
        0.0
    } else {
        (f64::from(load.start_ms) / median_start_ms - 2.0).clamp(0.0, 4.0)
    };
    let late = age.saturating_sub(REPORT_PERIOD).as_secs_f64();
    let spread = f64::from(node.team_sandboxes) / (cores / 16.0).max(1.0);

    // The scarcer of the two counts; the other is shown in the sentence.
    let (cpu_part, memory_part) = if cpu >= memory { (cpu, 0.0) } else { (0.0, memory) };
    let parts = [
        ("cpu", cpu_part),
        ("memory", memory_part),
        ("starting", 0.15 * starting),
        ("latency", 0.1 * latency),
        ("age", 0.01 * late),
        ("pressure", 10.0 * (memory - 0.95).max(0.0)),
        ("spread", 0.1 * spread),
    ];
    let detail = format!(
        "cpu {:.2}: {:.0} % of {:.1} cores busy, pressure {:.0} %; memory {:.2}: {:.0} % used; \
         {} starting, {} reserved, {} of this team",
        cpu,
        load.cpu_busy * 100.0,
        load.cores,
        load.psi_cpu,
        memory,
        (1.0 - ratio(load.memory_available, load.memory_total)) * 100.0,
        load.starting,
        reserved.sandboxes,
        node.team_sandboxes,
    );
    Verdict {
        node: node.name.clone(),
        filtered: None,
        detail,
        score: parts.iter().map(|(_, value)| value).sum(),
        parts: parts.map(|(name, value)| Part { name: name.into(), value }).into(),
    }
}
