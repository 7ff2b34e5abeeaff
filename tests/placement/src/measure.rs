//! Measurements of a run.

use std::collections::BTreeMap;

use crate::host::{Second, count};

/// Steps of the histograms: 0.002 of a node each, the last one for all larger values.
const STEPS: usize = 2000;
const STEP: f64 = 0.002;

/// Measurements of a run in progress.
#[derive(Debug)]
pub(crate) struct Measures {
    cpu: Vec<u64>,
    memory: Vec<u64>,
    cpu_crowded: u64,
    memory_crowded: u64,
    seconds: u64,
    demand: f64,
    starved: f64,
    deviations: f64,
    ticks: f64,
    /// Number of nodes, sum and sum of squares of the present second.
    this: (f64, f64, f64),
    asked: u64,
    failed: u64,
    refused: u64,
    killed: usize,
    placed: u64,
    placed_slow: u64,
    waits: Vec<f64>,
    bursts: BTreeMap<u32, BTreeMap<usize, u32>>,
}

/// Results of a run. Shares are in percent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// 99th percentile over nodes and seconds of the cores in demand, as a share of the node's
    /// cores.
    pub p99_cpu: f64,
    /// Share of nodes and seconds with more than 90 % of the cores in demand.
    pub t90_cpu: f64,
    /// 99th percentile over nodes and seconds of the share of memory in use.
    pub p99_memory: f64,
    /// Share of nodes and seconds with more than 90 % of the memory in use.
    pub t90_memory: f64,
    /// Share of the work in demand that was not done for lack of cores.
    pub starved: f64,
    /// Share of requests that failed.
    pub failed: f64,
    /// Refusals by nodes, as a share of the requests.
    pub refused: f64,
    /// Median time from the request until the sandbox runs, seconds.
    pub start_p50: f64,
    /// 99th percentile of the time from the request until the sandbox runs, seconds.
    pub start_p99: f64,
    /// Standard deviation of the nodes' CPU demand, mean over time.
    pub deviation: f64,
    /// Largest share of a burst of ten or more on one node, mean.
    pub burst: f64,
    /// Share of placements on nodes that were slow.
    pub slow: f64,
    /// Sandboxes killed for lack of memory, per hour.
    pub killed: f64,
}

impl Measures {
    pub(crate) fn new() -> Self {
        Self {
            cpu: vec![0; STEPS],
            memory: vec![0; STEPS],
            cpu_crowded: 0,
            memory_crowded: 0,
            seconds: 0,
            demand: 0.0,
            starved: 0.0,
            deviations: 0.0,
            ticks: 0.0,
            this: (0.0, 0.0, 0.0),
            asked: 0,
            failed: 0,
            refused: 0,
            killed: 0,
            placed: 0,
            placed_slow: 0,
            waits: Vec::new(),
            bursts: BTreeMap::new(),
        }
    }

    pub(crate) fn second(&mut self, second: &Second) {
        self.cpu[step(second.cpu)] += 1;
        self.memory[step(second.memory)] += 1;
        self.cpu_crowded += u64::from(second.cpu > 0.9);
        self.memory_crowded += u64::from(second.memory > 0.9);
        self.seconds += 1;
        self.demand += second.demand_cores;
        self.starved += second.starved_cores;
        let (nodes, sum, squares) = self.this;
        self.this = (nodes + 1.0, sum + second.cpu, squares + second.cpu * second.cpu);
    }

    pub(crate) fn end_of_second(&mut self, killed: usize) {
        let (nodes, sum, squares) = std::mem::take(&mut self.this);
        let mean = sum / nodes;
        self.deviations += (squares / nodes - mean * mean).max(0.0).sqrt();
        self.ticks += 1.0;
        self.killed += killed;
    }

    pub(crate) fn asked(&mut self) {
        self.asked += 1;
    }

    pub(crate) fn failed(&mut self) {
        self.failed += 1;
    }

    pub(crate) fn refused(&mut self) {
        self.refused += 1;
    }

    pub(crate) fn placed(&mut self, burst: Option<u32>, node: usize, slow: bool) {
        self.placed += 1;
        self.placed_slow += u64::from(slow);
        if let Some(burst) = burst {
            *self.bursts.entry(burst).or_default().entry(node).or_default() += 1;
        }
    }

    pub(crate) fn started(&mut self, waited: f64) {
        self.waits.push(waited);
    }

    pub(crate) fn sum_up(mut self) -> Measured {
        self.waits.sort_by(f64::total_cmp);
        let wait = |share: f64| {
            let at = rank(self.waits.len(), share);
            self.waits.get(at).copied().unwrap_or_default()
        };
        let shares: Vec<f64> = self
            .bursts
            .values()
            .filter_map(|nodes| {
                let all: u32 = nodes.values().sum();
                let most = nodes.values().max().copied().unwrap_or_default();
                (all >= 10).then(|| f64::from(most) / f64::from(all))
            })
            .collect();
        Measured {
            p99_cpu: quantile(&self.cpu, 0.99),
            t90_cpu: percent(self.cpu_crowded, self.seconds),
            p99_memory: quantile(&self.memory, 0.99),
            t90_memory: percent(self.memory_crowded, self.seconds),
            starved: 100.0 * self.starved / self.demand,
            failed: percent(self.failed, self.asked),
            refused: percent(self.refused, self.asked),
            start_p50: wait(0.5),
            start_p99: wait(0.99),
            deviation: self.deviations / self.ticks,
            burst: 100.0 * shares.iter().sum::<f64>() / count(shares.len().max(1)),
            slow: percent(self.placed_slow, self.placed),
            killed: count(self.killed) * 3600.0 / self.ticks,
        }
    }
}

impl Measured {
    /// Returns the mean of several runs.
    pub fn mean(all: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / count(all.len().max(1));
        Self {
            p99_cpu: mean(|m| m.p99_cpu),
            t90_cpu: mean(|m| m.t90_cpu),
            p99_memory: mean(|m| m.p99_memory),
            t90_memory: mean(|m| m.t90_memory),
            starved: mean(|m| m.starved),
            failed: mean(|m| m.failed),
            refused: mean(|m| m.refused),
            start_p50: mean(|m| m.start_p50),
            start_p99: mean(|m| m.start_p99),
            deviation: mean(|m| m.deviation),
            burst: mean(|m| m.burst),
            slow: mean(|m| m.slow),
            killed: mean(|m| m.killed),
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
fn step(share: f64) -> usize {
    ((share / STEP) as usize).min(STEPS - 1)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
fn rank(len: usize, share: f64) -> usize {
    ((count(len) * share) as usize).min(len.saturating_sub(1))
}

#[expect(clippy::cast_precision_loss, reason = "counts")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn quantile(histogram: &[u64], share: f64) -> f64 {
    let all: u64 = histogram.iter().sum();
    #[expect(clippy::cast_precision_loss, reason = "counts")]
    let wanted = share * all as f64;
    let mut below = 0.0;
    for (at, &number) in histogram.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "counts")]
        let more = number as f64;
        below += more;
        if below >= wanted {
            return (count(at) + 0.5) * STEP;
        }
    }
    0.0
}
