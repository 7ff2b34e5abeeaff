//! The algorithms with which placement is compared, each written from its published description.
//!
//! Every peer has the candidates that its original has: nodes with a report of the last 30 s that
//! were not tried for this request. Where an original has a notion of capacity, cores may be
//! allocated four times over and memory twice, because the nodes of the workload accept as much.

use crate::{scenario::Request, stream::Stream, topsis, view::Seen};

/// Largest ratio of allocated cores to the node's cores, for peers that count them.
const CPU_OVERCOMMIT: f64 = 4.0;
/// Largest ratio of allocated memory to the node's memory, for peers that count it.
const MEMORY_OVERCOMMIT: f64 = 2.0;

/// A published algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Any node.
    Random,
    /// The next node.
    RoundRobin,
    /// The least busy node by the last report.
    LeastCpu,
    /// The node with the least cores allocated by the last report.
    LeastAllocated,
    /// The less busy of two (Mitzenmacher 2000).
    TwoChoicesCpu,
    /// The one of two with less allocated, with the peer's own decisions counted.
    TwoChoicesAllocated,
    /// e2b: the best of three by cores allocated, in progress and half of those in use.
    E2b,
    /// Daytona: closeness to fixed ideals, one of the best ten.
    Daytona,
    /// Proxmox VE's cluster resource scheduler by allocated resources.
    CrsStatic,
    /// Proxmox VE's cluster resource scheduler by used resources.
    CrsDynamic,
    /// Nomad: the fullest of two that fit.
    NomadBinpack,
    /// Nomad: the emptiest of log2 n that fit.
    NomadSpread,
    /// Kubernetes: LeastAllocated and BalancedAllocation.
    Kubernetes,
    /// Trimaran's TargetLoadPacking at 60 %.
    Trimaran,
}

impl Peer {
    pub(crate) const ALL: [Self; 14] = [
        Self::Random,
        Self::RoundRobin,
        Self::LeastCpu,
        Self::LeastAllocated,
        Self::TwoChoicesCpu,
        Self::TwoChoicesAllocated,
        Self::E2b,
        Self::Daytona,
        Self::CrsStatic,
        Self::CrsDynamic,
        Self::NomadBinpack,
        Self::NomadSpread,
        Self::Kubernetes,
        Self::Trimaran,
    ];

    /// Returns the name in the table.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round robin",
            Self::LeastCpu => "least CPU, stale",
            Self::LeastAllocated => "least allocated, stale",
            Self::TwoChoicesCpu => "two choices, CPU, stale",
            Self::TwoChoicesAllocated => "two choices, allocated",
            Self::E2b => "e2b best of 3",
            Self::Daytona => "Daytona TOPSIS top 10",
            Self::CrsStatic => "PVE CRS static",
            Self::CrsDynamic => "PVE CRS dynamic",
            Self::NomadBinpack => "Nomad binpack",
            Self::NomadSpread => "Nomad spread",
            Self::Kubernetes => "Kubernetes",
            Self::Trimaran => "Trimaran TLP 60 %",
        }
    }

    /// Returns whether one scheduler decides for the whole cluster and knows all its decisions:
    /// Nomad's plans are applied one after another, Kubernetes and PVE's resource manager have one
    /// leader. PVE's measurements come from each node's own status and are as old as everybody's.
    pub(crate) const fn decides_alone(self) -> bool {
        matches!(self, Self::CrsStatic | Self::NomadBinpack | Self::NomadSpread | Self::Kubernetes)
    }

    /// Returns whether the peer counts its own decisions until a report shows them.
    pub(crate) const fn counts_its_own(self) -> bool {
        match self {
            Self::Random
            | Self::RoundRobin
            | Self::LeastCpu
            | Self::LeastAllocated
            | Self::TwoChoicesCpu
            | Self::Daytona => false,
            Self::TwoChoicesAllocated
            | Self::E2b
            | Self::CrsStatic
            | Self::CrsDynamic
            | Self::NomadBinpack
            | Self::NomadSpread
            | Self::Kubernetes
            | Self::Trimaran => true,
        }
    }
}

/// Inputs of one decision of a peer.
pub(crate) struct Question<'a> {
    pub(crate) seen: &'a [Seen],
    pub(crate) request: &'a Request,
    pub(crate) tried: &'a [usize],
    pub(crate) now: f64,
    pub(crate) random: &'a mut Stream,
    /// Position of a round robin.
    pub(crate) cursor: &'a mut usize,
    /// Reused buffer, so that a decision allocates nothing.
    pub(crate) usable: &'a mut Vec<usize>,
}

impl Question<'_> {
    fn vcpus(&self) -> f64 {
        f64::from(self.request.vcpus)
    }

    fn usable(&self, at: usize) -> bool {
        self.seen[at].usable(self.now) && !self.tried.contains(&at)
    }

    /// Lists the usable nodes.
    fn list(&mut self) {
        self.usable.clear();
        for at in 0..self.seen.len() {
            if self.usable(at) {
                self.usable.push(at);
            }
        }
    }

    fn fits(&self, at: usize) -> bool {
        let node = &self.seen[at];
        let (cores, gib) = (cores_with(node), gib_with(node));
        cores + self.vcpus() <= CPU_OVERCOMMIT * node.cores
            && gib + f64::from(self.request.memory_gib) <= MEMORY_OVERCOMMIT * node.memory_gib
    }

    /// Returns the node with the least `cost`, a random one among equals.
    fn least(&mut self, cost: impl Fn(&Self, usize) -> f64) -> Option<usize> {
        let mut best: Option<(usize, f64, u32)> = None;
        for i in 0..self.usable.len() {
            let at = self.usable[i];
            let cost = cost(self, at);
            match &mut best {
                Some((_, before, _)) if cost > *before => {}
                Some((chosen, before, equals)) if cost.total_cmp(before).is_eq() => {
                    *equals += 1;
                    if self.random.0.below(*equals) == 0 {
                        *chosen = at;
                    }
                }
                Some(_) | None => best = Some((at, cost, 1)),
            }
        }
        best.map(|(at, ..)| at)
    }

    /// Reduces the list to `k` different random nodes, or keeps all if there are fewer.
    fn some(&mut self, k: usize) {
        let n = self.usable.len();
        for at in 0..k.min(n) {
            let other = at + self.random.below(n - at);
            self.usable.swap(at, other);
        }
        self.usable.truncate(k);
    }
}

fn cores_with(node: &Seen) -> f64 {
    node.report.allocated_cores + node.reserved_cores()
}

fn gib_with(node: &Seen) -> f64 {
    node.report.allocated_gib + node.reserved_gib()
}

pub(crate) fn choose(peer: Peer, q: &mut Question<'_>) -> Option<usize> {
    match peer {
        Peer::Random => {
            q.list();
            q.some(1);
            q.usable.first().copied()
        }
        Peer::RoundRobin => {
            let n = q.seen.len();
            let at = (0..n).map(|step| (*q.cursor + step) % n).find(|&at| q.usable(at))?;
            *q.cursor = (at + 1) % n;
            Some(at)
        }
        Peer::LeastCpu => {
            q.list();
            q.least(|q, at| q.seen[at].report.busy)
        }
        Peer::LeastAllocated => {
            q.list();
            q.least(|q, at| q.seen[at].report.allocated_cores / q.seen[at].cores)
        }
        Peer::TwoChoicesCpu => {
            q.list();
            q.some(2);
            q.least(|q, at| q.seen[at].report.busy)
        }
        Peer::TwoChoicesAllocated => {
            q.list();
            q.some(2);
            q.least(|q, at| cores_with(&q.seen[at]) / q.seen[at].cores)
        }
        Peer::E2b => {
            q.list();
            q.some(3);
            q.least(|q, at| {
                let node = &q.seen[at];
                let used = node.report.busy * node.cores;
                (q.vcpus() + cores_with(node) + 0.5 * used) / (4.0 * node.cores)
            })
        }
        Peer::Daytona => daytona(q),
        Peer::CrsStatic => crs(q, Basis::Given),
        Peer::CrsDynamic => crs(q, Basis::Used),
        Peer::NomadBinpack => nomad(q, 2, true),
        Peer::NomadSpread => {
            let log2 = q.seen.len().next_power_of_two().trailing_zeros();
            nomad(q, usize::try_from(log2).unwrap_or(usize::MAX).max(2), false)
        }
        Peer::Kubernetes => kubernetes(q),
        Peer::Trimaran => trimaran(q),
    }
}

/// Resources by which PVE's scheduler measures a node's load.
#[derive(Clone, Copy)]
enum Basis {
    Given,
    Used,
}

/// Scores each node as if the guest were there: root mean square and maximum over the cluster of
/// CPU and of memory, weighted 1, 2, 5 and 10.
fn crs(q: &mut Question<'_>, basis: Basis) -> Option<usize> {
    q.list();
    let (vcpus, gib) = (q.vcpus(), f64::from(q.request.memory_gib));
    let load = |at: usize| {
        let node = &q.seen[at];
        let (cores, memory) = match basis {
            Basis::Given => (cores_with(node), gib_with(node)),
            Basis::Used => (
                node.report.busy * node.cores + node.reserved_cores(),
                node.report.used_gib + node.reserved_gib(),
            ),
        };
        let share = |cores: f64, memory: f64| [cores / node.cores, memory / node.memory_gib];
        (share(cores, memory), share(cores + vcpus, memory + gib))
    };
    let loads: Vec<_> = q.usable.iter().map(|&at| load(at)).collect();
    // Only one node changes at a time, so sums and the two largest suffice: n steps, not n^2.
    let (mut squares, mut top) = ([0.0; 2], [[f64::NEG_INFINITY; 2]; 2]);
    for (before, _) in &loads {
        for c in 0..2 {
            squares[c] += before[c] * before[c];
            if before[c] > top[c][0] {
                top[c] = [before[c], top[c][0]];
            } else if before[c] > top[c][1] {
                top[c][1] = before[c];
            }
        }
    }
    let n = crate::host::count(loads.len());
    let alternative = |(before, after): &([f64; 2], [f64; 2])| {
        let of = |c: usize| {
            let square = squares[c] - before[c] * before[c] + after[c] * after[c];
            let others = if before[c] >= top[c][0] { top[c][1] } else { top[c][0] };
            (1.0 + (square.max(0.0) / n).sqrt(), 1.0 + others.max(after[c]))
        };
        let ((cpu, cpu_max), (memory, memory_max)) = (of(0), of(1));
        [cpu, cpu_max, memory, memory_max]
    };
    let alternatives: Vec<_> = loads.iter().map(alternative).collect();
    topsis::best(&alternatives, &[1.0, 2.0, 5.0, 10.0]).map(|at| q.usable[at])
}

fn nomad(q: &mut Question<'_>, limit: usize, binpack: bool) -> Option<usize> {
    q.list();
    let n = q.usable.len();
    let fit = |q: &Question<'_>, at: usize| {
        let node = &q.seen[at];
        let cpu = (cores_with(node) + q.vcpus()) / (CPU_OVERCOMMIT * node.cores);
        let asked = gib_with(node) + f64::from(q.request.memory_gib);
        let memory = asked / (MEMORY_OVERCOMMIT * node.memory_gib);
        let free = 10_f64.powf(1.0 - cpu) + 10_f64.powf(1.0 - memory);
        if binpack { 20.0 - free } else { free - 2.0 }
    };
    let (mut found, mut skipped) = (0, Vec::new());
    let mut best: Option<(usize, f64)> = None;
    let mut offer = |at: usize, score: f64| {
        if best.is_none_or(|(_, before)| score > before) {
            best = Some((at, score));
        }
    };
    for step in 0..n {
        let other = step + q.random.below(n - step);
        q.usable.swap(step, other);
        let at = q.usable[step];
        if !q.fits(at) {
            continue;
        }
        let score = fit(q, at);
        if score <= 0.0 && skipped.len() < 3 {
            skipped.push((at, score));
            continue;
        }
        offer(at, score);
        found += 1;
        if found == limit {
            break;
        }
    }
    for (at, score) in skipped {
        if found < limit {
            offer(at, score);
            found += 1;
        }
    }
    best.map(|(at, _)| at)
}

fn kubernetes(q: &mut Question<'_>) -> Option<usize> {
    q.list();
    // Number of feasible nodes to find, going round; all nodes if there are up to a hundred.
    let n = q.seen.len();
    let share = 50_usize.saturating_sub(n / 125).max(5);
    let wanted = (n * share / 100).max(100);
    let mut fit = Vec::new();
    for step in 0..n {
        let at = (*q.cursor + step) % n;
        if q.usable(at) && q.fits(at) {
            fit.push(at);
        }
        if fit.len() == wanted || step + 1 == n {
            *q.cursor = (at + 1) % n;
            break;
        }
    }
    std::mem::swap(q.usable, &mut fit);
    q.least(|q, at| {
        let node = &q.seen[at];
        let cpu = (cores_with(node) + q.vcpus()) / (CPU_OVERCOMMIT * node.cores);
        let asked = gib_with(node) + f64::from(q.request.memory_gib);
        let memory = asked / (MEMORY_OVERCOMMIT * node.memory_gib);
        let least = f64::midpoint(1.0 - cpu, 1.0 - memory) * 100.0;
        let balanced = (1.0 - (cpu - memory).abs() / 2.0) * 100.0;
        // Scores are whole numbers.
        -(least.floor() + balanced.floor())
    })
}

/// Prefers nodes at 60 % in use, is worse on both sides, and worst above. The usage of sandboxes
/// that are younger than the metrics is predicted.
fn trimaran(q: &mut Question<'_>) -> Option<usize> {
    const TARGET: f64 = 60.0;
    q.list();
    q.least(|q, at| {
        let node = &q.seen[at];
        let missing = node.reserved_cores() + q.vcpus();
        let used = (node.report.busy * node.cores + missing) / node.cores * 100.0;
        let score = if used <= TARGET {
            (100.0 - TARGET) * used / TARGET + TARGET
        } else if used <= 100.0 {
            TARGET * (100.0 - used) / (100.0 - TARGET)
        } else {
            0.0
        };
        -score.round()
    })
}

/// Weighs the distance to a fixed best and a fixed worst node, exponentially less above thresholds,
/// and returns one of the ten best by chance.
fn daytona(q: &mut Question<'_>) -> Option<usize> {
    const THRESHOLD: f64 = 10.0;
    const BEST: usize = 10;
    q.list();
    let score = |at: usize| {
        let node = &q.seen[at];
        let cpu = node.report.busy * 100.0;
        let memory = node.report.used_gib / node.memory_gib * 100.0;
        let given_cpu = cores_with(node) / node.cores * 100.0;
        let given_memory = gib_with(node) / node.memory_gib * 100.0;
        // Value, best, worst, weight. The workload has no disks.
        let criteria = [
            (cpu, 0.0, 100.0, 0.25),
            (memory, 0.0, 100.0, 0.4),
            (given_cpu, 100.0, 500.0, 0.03),
            (given_memory, 100.0, 500.0, 0.03),
            (node.report.sandboxes + node.reserved_sandboxes(), 0.0, 100.0, 0.1),
        ];
        let (mut good, mut bad) = (0.0, 0.0);
        for (value, best, worst, weight) in criteria {
            good += weight * (value - best) * (value - best);
            bad += weight * (value - worst) * (value - worst);
        }
        let closeness = bad.sqrt() / (good.sqrt() + bad.sqrt());
        let above = |value: f64, threshold: f64| (-0.15 * (value - threshold).max(0.0)).exp();
        closeness * 100.0 * above(cpu, 90.0) * above(memory, 75.0)
    };
    let mut scored: Vec<_> = q.usable.iter().map(|&at| (at, score(at))).collect();
    scored.retain(|(_, score)| *score >= THRESHOLD);
    scored.sort_by(|a, b| b.1.total_cmp(&a.1));
    scored.truncate(BEST);
    if scored.is_empty() {
        return None;
    }
    Some(scored[q.random.below(scored.len())].0)
}
