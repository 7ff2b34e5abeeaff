//! Learns from the reports which share of their size sandboxes use in the long run.
//!
//! A new sandbox counts with this share until the measured load shows it. Learnt, because it
//! differs by an order of magnitude between workloads; and rather too low than too high: taking
//! sandboxes for twice as heavy makes half-full nodes full and costs more than the reverse.

use super::{NodeView, STALE_MS};

/// Time constant of the learning, seconds: the values move by 1 - 1/e in this time.
const MEMORY_OF_IT_S: f64 = 300.0;
/// Fewest cores handed out in all; with fewer, a few sandboxes would dominate.
const CORES_MIN: f64 = 16.0;
const CPU: (f64, f64) = (0.05, 0.5);
const MEMORY: (f64, f64) = (0.2, 1.0);

/// Learnt usage of the cluster's sandboxes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UsageModel {
    /// Cores used, as a share of those handed out.
    pub cpu: f64,
    /// Memory used, as a share of that handed out.
    pub memory: f64,
    /// Median duration of a start, milliseconds; 0 when unknown.
    pub start_ms: f64,
    learnt_ms: Option<u64>,
}

impl UsageModel {
    /// Creates initial estimates.
    pub const fn new(cpu: f64, memory: f64) -> Self {
        Self { cpu, memory, start_ms: 0.0, learnt_ms: None }
    }

    /// Learns from the current reports, at most once a second.
    pub fn learn(&mut self, nodes: &[NodeView], now_ms: u64) {
        let passed_ms = match self.learnt_ms {
            Some(before) if now_ms < before.saturating_add(1000) => return,
            Some(before) => now_ms - before,
            None => 0,
        };
        self.learnt_ms = Some(now_ms);
        let reported = nodes
            .iter()
            .filter(|node| node.age_ms(now_ms).is_some_and(|age_ms| age_ms <= STALE_MS));
        let (mut cores_used, mut cores, mut memory_used, mut memory) = (0.0, 0.0, 0.0, 0.0);
        for node in reported {
            let load = &node.load;
            // Without the usage of other processes, that of the sandboxes is unknown.
            let (Some(foreign_cores), Some(foreign_memory)) =
                (load.foreign_cores, load.foreign_memory)
            else {
                continue;
            };
            // Booting usage is not long-run usage.
            let used = load.cpu_busy * load.cores - foreign_cores - load.booting_cores;
            cores_used += used.max(0.0);
            cores += load.cores_allocated;
            memory_used += (load.memory_used - foreign_memory).max(0.0);
            memory += load.memory_allocated;
        }
        let seconds = super::view::as_f64(passed_ms) / 1000.0;
        let weight = 1.0 - (-seconds / MEMORY_OF_IT_S).exp();
        if cores >= CORES_MIN && memory > 0.0 {
            let learn = |estimate: &mut f64, share: f64, (min, max): (f64, f64)| {
                *estimate = (*estimate + (share - *estimate) * weight).clamp(min, max);
            };
            learn(&mut self.cpu, cores_used / cores, CPU);
            learn(&mut self.memory, memory_used / memory, MEMORY);
        }
        self.start_ms = median_start_ms(nodes);
    }
}

fn median_start_ms(nodes: &[NodeView]) -> f64 {
    let mut known: Vec<f64> =
        nodes.iter().map(|node| node.load.start_ms).filter(|&ms| ms > 0.0).collect();
    let middle = known.len() / 2;
    if known.is_empty() {
        return 0.0;
    }
    *known.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Load;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 0.02, "{a} is not {b}");
    }

    #[test]
    fn usage_model_learns_from_sandboxes_only() {
        let node = |foreign| NodeView {
            reported_ms: Some(3_600_000),
            load: Load {
                cores: 16.0,
                cpu_busy: 0.75,
                foreign_cores: foreign,
                foreign_memory: Some(10.0),
                cores_allocated: 40.0,
                memory_used: 60.0,
                memory_allocated: 100.0,
                start_ms: 1500.0,
                ..Load::default()
            },
            ..NodeView::default()
        };
        let learnt = |nodes: [NodeView; 2]| {
            let mut usage_model = UsageModel::new(0.14, 0.4);
            for second in 0..2400 {
                let now_ms = second * 1000;
                let nodes = nodes.map(|node| NodeView { reported_ms: Some(now_ms), ..node });
                usage_model.learn(&nodes, now_ms);
            }
            usage_model
        };
        let usage_model = learnt([node(Some(4.0)), node(Some(4.0))]);
        near(usage_model.cpu, 8.0 / 40.0);
        near(usage_model.memory, 0.5);
        near(usage_model.start_ms, 1500.0);
        let unreported = learnt([node(None), node(None)]);
        near(unreported.cpu, 0.14);
        near(unreported.memory, 0.4);
    }
}
