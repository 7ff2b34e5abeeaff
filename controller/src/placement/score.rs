//! Scores a node for a creation; lower is better. From the measured load, from booting work that it
//! does not show yet, and from what sandboxes grow into in the long run.
//!
//! Departures from a textbook least-loaded choice, each measured on the workload of
//! `docs/placement.md`: real load and not allocation alone; reservations, without which a burst
//! lands on one node; a term for work that boots; a team is spread per 16 cores, but never less
//! than one node's worth, so that it does not dominate small nodes.
//!
//! The score is the sum of its parts, here and in the explanation: there is one function.

use super::{
    Ask, NodeView, Now,
    view::{BOOT_CORES_MAX, Holder, as_f64},
};

/// Weight of the measured load; the rest is the weight of the load expected in the long run.
const MEASURED: f64 = 0.9;
/// Weight of work about to boot: above 1, because bursts add up.
const BOOT: f64 = 1.5;
/// Share of memory above which it is short.
const MEMORY_SHORT: f64 = 0.9;

/// Names of the parts of a score, in their order.
pub const PARTS: [&str; 9] =
    ["cpu", "memory", "starting", "latency", "age", "pressure", "spread", "labels", "cached"];

/// Expected load of processor and memory, each as a share of the capacity.
pub(super) struct Needs {
    pub(super) cpu: f64,
    pub(super) memory: f64,
}

/// Returns the load with the new sandbox.
pub(super) fn needs(node: &NodeView, holder: &Holder, ask: &Ask<'_>, now: &Now) -> Needs {
    let (load, reserved, usage_model) = (&node.load, &node.reserved, &now.usage_model);
    let size = ask.size.or(holder.size);
    let vcpus = f64::from(size.cpu_cores.max(1));

    // A division costs as much as everything else here: each is done once.
    let per_core = 1.0 / load.cores;
    let busy = load.cpu_busy / (1.0 - load.psi_cpu.min(0.8));
    let foreign = load.foreign_cores.unwrap_or(0.0);
    let expected = (foreign + usage_model.cpu * load.cores_allocated) * per_core;
    let boots = load.booting_cores * per_core;
    let boot = f64::from(reserved.boot_cores) + vcpus.min(f64::from(BOOT_CORES_MAX));
    let coming = BOOT * boot + usage_model.cpu * (f64::from(reserved.cores) + vcpus);
    let cpu =
        MEASURED * (busy + 0.5 * boots) + (1.0 - MEASURED) * (expected + boots) + coming * per_core;

    let used = load.memory_used;
    let foreign = load.foreign_memory.unwrap_or(0.0);
    let given = (used + foreign + usage_model.memory * load.memory_allocated) * 0.5;
    let asked = as_f64(u64::from(size.memory_mib) << 20) + as_f64(reserved.memory_bytes);
    let memory = (used.max(given) + usage_model.memory * asked) / load.memory_total.max(1.0);
    Needs { cpu, memory }
}

/// Returns the parts of a candidate's score, weighted, with their names. Their sum is the score.
pub(super) fn parts(
    node: &NodeView,
    holder: &Holder,
    ask: &Ask<'_>,
    now: &Now,
) -> [(&'static str, f64); PARTS.len()] {
    let (load, reserved) = (&node.load, &node.reserved);
    let Needs { cpu, memory } = needs(node, holder, ask, now);
    // The scarcer of the two counts.
    let (cpu_part, memory_part) = if cpu >= memory { (cpu, 0.0) } else { (0.0, memory) };
    let starting =
        (load.starting + f64::from(reserved.sandboxes) + 1.0) / load.start_slots.max(1.0);
    let latency = if load.start_ms > 0.0 && now.usage_model.start_ms > 0.0 {
        (load.start_ms / now.usage_model.start_ms - 2.0).clamp(0.0, 4.0)
    } else {
        0.0
    };
    let late =
        as_f64(node.age_ms(now.ms).unwrap_or_default().saturating_sub(now.period_ms)) / 1000.0;
    let spread = f64::from((ask.team)(holder.node)) / (load.cores / 16.0).max(1.0);
    let labels = f64::from((load.labels & ask.affinity.avoided).count_ones())
        - f64::from((load.labels & ask.affinity.preferred).count_ones());
    [
        // Only where it is the scarcer of the two, like the memory.
        ("cpu", cpu_part),
        ("memory", memory_part),
        // Sandboxes that start, against the node's slots for starts.
        ("starting", 0.15 * starting),
        // Time that starts take, against the usual.
        ("latency", 0.1 * latency),
        // Age of the report beyond the usual.
        ("age", 0.01 * late),
        // Memory beyond what is short.
        ("pressure", 10.0 * (memory - MEMORY_SHORT).max(0.0)),
        // Sandboxes of the same team.
        ("spread", 0.1 * spread),
        // Labels that the creation avoids, minus those that it prefers. One label weighs as much as
        // a third of a node: a preference, not a rule.
        ("labels", 0.3 * labels),
        // A warm copy of the snapshot.
        ("cached", if holder.cached { -0.05 } else { 0.0 }),
    ]
}

/// Returns the score of a candidate.
pub(super) fn score(node: &NodeView, holder: &Holder, ask: &Ask<'_>, now: &Now) -> f64 {
    sum(&parts(node, holder, ask, now))
}

/// Returns the score that has these parts.
pub(super) fn sum(parts: &[(&str, f64)]) -> f64 {
    parts.iter().map(|(_, value)| value).sum()
}
