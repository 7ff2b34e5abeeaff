//! Events that do not depend on placement: nodes, their faults, and all requests of a run. They are
//! drawn before the run.

use crate::stream::{self, Stream};

/// A variant of the workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scenario {
    pub nodes: usize,
    /// Number of controllers, each with its own view.
    pub controllers: usize,
    /// Mean time between two reports of a node, seconds.
    pub period_s: f64,
    /// Mean of allocated cores, as a ratio to the cores of the nodes.
    pub load: f64,
    /// Share of the requests that come in bursts.
    pub bursts: f64,
    /// Whether nodes get slow, silent and unreachable, and foreign guests work on them.
    pub faults: bool,
    /// Whether a node starts one sandbox at a time.
    pub serial: bool,
    /// Measured time, seconds, after the warm-up.
    pub measured_s: u32,
}

/// Time before the measurement, in seconds.
pub(crate) const WARM_UP_S: u32 = 1800;

impl Scenario {
    /// Returns the standard workload on `nodes` nodes.
    pub const fn of(nodes: usize) -> Self {
        Self {
            nodes,
            controllers: 3,
            period_s: 3.0,
            load: 3.5,
            bursts: 0.4,
            faults: true,
            serial: false,
            measured_s: 3600,
        }
    }

    pub(crate) fn end_s(&self) -> f64 {
        f64::from(WARM_UP_S + self.measured_s)
    }
}

/// A node of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) cores: f64,
    pub(crate) memory_gib: f64,
    pub(crate) slots: usize,
    pub(crate) foreign_cores: f64,
    pub(crate) foreign_gib: f64,
    pub(crate) slow: Spells,
    pub(crate) silent: Spells,
    pub(crate) unreachable: Spells,
}

/// Time spans of a condition, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spells(Vec<(f64, f64)>);

impl Spells {
    fn draw(random: &mut Stream, gap_s: f64, (min_s, max_s): (f64, f64), end_s: f64) -> Self {
        let (mut spells, mut at) = (Vec::new(), 0.0);
        loop {
            let from = at + random.exponential(gap_s);
            if from > end_s {
                return Self(spells);
            }
            at = from + random.uniform(min_s, max_s);
            spells.push((from, at));
        }
    }

    pub(crate) fn holds(&self, now: f64) -> bool {
        self.0.iter().any(|(from, to)| (*from..*to).contains(&now))
    }
}

/// One request for a creation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) at: f64,
    pub(crate) controller: usize,
    /// Number of the burst. Each burst has its own team; single requests have no team that matters.
    pub(crate) burst: Option<u32>,
    pub(crate) vcpus: u32,
    pub(crate) memory_gib: u32,
    pub(crate) life_s: f64,
    /// Share of its cores that the sandbox uses when it works.
    pub(crate) zeal: f64,
    /// Share of its memory that the sandbox grows to.
    pub(crate) appetite: f64,
}

impl Request {
    /// Returns the cores that the sandbox keeps busy while it boots.
    pub(crate) fn boot_cores(&self) -> f64 {
        f64::from(self.vcpus.min(4))
    }
}

/// Everything that is drawn before a run.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) machines: Vec<Machine>,
    pub(crate) requests: Vec<Request>,
}

/// Returns the mean life of a sandbox, seconds: 0.6 * (20 + 100) + 0.3 * E max(20, Exp(900)) + 0.1
/// * E min(7200, Pareto(1800, 1.5)).
fn mean_life_s() -> f64 {
    0.6 * 120.0 + 0.3 * (20.0 + 900.0 * (-20.0_f64 / 900.0).exp()) + 0.1 * 3600.0
}

/// Mean cores of a sandbox.
const MEAN_VCPUS: f64 = 3.2;

pub(crate) fn draw(scenario: &Scenario, seed: u64) -> Drawn {
    let machines = machines(scenario, seed);
    let cores: f64 = machines.iter().map(|machine| machine.cores).sum();
    let rate = scenario.load * cores / MEAN_VCPUS / mean_life_s();
    let mut random = Stream::new(seed, stream::WORKLOAD);
    let end_s = scenario.end_s();
    let mut arrivals: Vec<(f64, Option<u32>)> = Vec::new();
    let mut at = 0.0;
    loop {
        at += random.exponential(1.0 / ((1.0 - scenario.bursts) * rate));
        if at > end_s {
            break;
        }
        arrivals.push((at, None));
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of nodes")]
    let (low, high) = (5.0, (2.0 * scenario.nodes as f64).max(10.0));
    // Mean of a bounded Pareto of shape 1; the rounding down of sizes is not corrected.
    let mean_size = low * (high / low).ln() / (1.0 - low / high);
    let (mut at, mut burst) = (0.0, 0);
    loop {
        at += random.exponential(mean_size / (scenario.bursts * rate));
        if at > end_s {
            break;
        }
        let size = random.pareto(low, high).floor();
        let mut left = size;
        while left >= 1.0 {
            arrivals.push((at + random.uniform(0.0, 0.5), Some(burst)));
            left -= 1.0;
        }
        burst += 1;
    }
    arrivals.sort_by(|a, b| a.0.total_cmp(&b.0));
    let requests =
        arrivals.into_iter().map(|(at, burst)| request(&mut random, scenario, at, burst)).collect();
    Drawn { machines, requests }
}

fn request(random: &mut Stream, scenario: &Scenario, at: f64, burst: Option<u32>) -> Request {
    let (vcpus, memory_gib) = match random.unit() {
        ..0.6 => (2, 4),
        ..0.9 => (4, 6),
        _ => (8, 16),
    };
    let life_s = match random.unit() {
        ..0.6 => 20.0 + random.exponential(100.0),
        ..0.9 => random.exponential(900.0).max(20.0),
        _ => (1800.0 / (1.0 - random.unit()).powf(1.0 / 1.5)).min(7200.0),
    };
    Request {
        at,
        controller: random.below(scenario.controllers),
        burst,
        vcpus,
        memory_gib,
        life_s,
        zeal: random.pareto(0.1, 1.0),
        appetite: random.uniform(0.15, 0.65),
    }
}

fn machines(scenario: &Scenario, seed: u64) -> Vec<Machine> {
    let mut random = Stream::new(seed, stream::NODES);
    let mut faults = Stream::new(seed, stream::FAULTS);
    let end_s = scenario.end_s();
    (0..scenario.nodes)
        .map(|number| {
            let (cores, slots): (f64, usize) = match number % 10 {
                0..=4 => (16.0, 2),
                5..=7 => (32.0, 4),
                _ => (64.0, 8),
            };
            let memory_gib = 4.0 * cores;
            let (cpu, memory) = match number % 10 {
                3 | 7 => (0.35, 0.30),
                _ => (random.uniform(0.02, 0.08), random.uniform(0.05, 0.12)),
            };
            let foreign = f64::from(u8::from(scenario.faults));
            let mut spells = |gap_s, length| {
                let drawn = Spells::draw(&mut faults, gap_s, length, end_s);
                if scenario.faults { drawn } else { Spells::default() }
            };
            Machine {
                cores,
                memory_gib,
                slots: if scenario.serial { 1 } else { slots },
                foreign_cores: cpu * cores * foreign,
                foreign_gib: memory * memory_gib * foreign,
                slow: spells(3600.0, (60.0, 300.0)),
                silent: spells(14_400.0, (30.0, 120.0)),
                unreachable: spells(14_400.0, (30.0, 120.0)),
            }
        })
        .collect()
}
