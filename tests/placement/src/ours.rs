//! The product's placement as a controller of the workload: calls the shipped code, copies none.

use std::{collections::HashMap, time::Duration};

use controller::placement::{
    Affinity, Ask, Fleet, Holder, Limits, Load, Look, PriorOutcome, SplitMix64, choose,
};
use proto::{
    id::SandboxId,
    name::SnapshotId,
    spec::{Network, Size},
};

use crate::{
    host::Report,
    scenario::{Machine, Request, Scenario},
};

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// The only snapshot; every node holds it.
pub const SNAPSHOT: &str = "base";

/// A controller with the product's placement.
#[derive(Debug)]
pub(crate) struct Ours {
    fleet: Fleet,
    snapshot: SnapshotId,
    machines: Vec<(f64, f64, f64, f64, f64)>,
    seqs: Vec<u64>,
    look: Look,
    /// Living sandboxes of a team on a node, as far as this controller knows.
    teams: HashMap<(u32, u32), u32>,
    spread: bool,
    random: SplitMix64,
}

/// Limits of the workload's nodes; their agents have no limit on cores.
const LIMITS: Limits = Limits {
    memory_overcommit: 2.0,
    cpu_overcommit: 0.0,
    memory_used_max: 0.97,
    storage_free_min: 0.0,
    assumed_cpu_use: 0.14,
    assumed_memory_use: 0.40,
};

fn ms(seconds: f64) -> u64 {
    u64::try_from(Duration::from_secs_f64(seconds).as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn id(number: usize) -> SandboxId {
    SandboxId::new(number as u64, &[0; 10])
}

fn size(request: &Request) -> Size {
    Size { cpu_cores: request.vcpus, memory_mib: request.memory_gib * 1024, disk_gib: 0 }
}

impl Ours {
    pub(crate) fn new(
        machines: &[Machine],
        scenario: &Scenario,
        look: Look,
        spread: bool,
        seed: u64,
    ) -> Self {
        let mut fleet = Fleet::new(LIMITS, seed);
        fleet.set_period(ms(scenario.period_s));
        for at in 0..machines.len() {
            let node = fleet.add(format!("n{at:05}").parse().expect("a name"));
            fleet.set_down(node, false);
            let size = Size { cpu_cores: 2, memory_mib: 4096, disk_gib: 0 };
            fleet.hold(SNAPSHOT, Holder { node, size, queued: 0, queue_max: 0, cached: false });
        }
        let of = |m: &Machine| {
            let slots = crate::host::count(m.slots);
            (m.cores, m.memory_gib, m.foreign_cores, m.foreign_gib, slots)
        };
        Self {
            fleet,
            snapshot: SNAPSHOT.parse().expect("a name"),
            machines: machines.iter().map(of).collect(),
            seqs: vec![0; machines.len()],
            look,
            teams: HashMap::new(),
            spread,
            random: SplitMix64::new(seed ^ 1),
        }
    }

    fn load(&self, at: usize, report: &Report) -> Load {
        let (cores, memory, foreign_cores, foreign_gib, slots) = self.machines[at];
        Load {
            cores,
            cpu_busy: report.busy,
            psi_cpu: report.psi,
            foreign_cores: Some(foreign_cores),
            foreign_memory: Some(foreign_gib * GIB),
            booting_cores: report.booting_cores,
            cores_allocated: report.allocated_cores,
            memory_total: memory * GIB,
            memory_used: report.used_gib * GIB,
            memory_allocated: report.allocated_gib * GIB,
            starting: report.starting,
            start_slots: slots,
            start_ms: report.start_ms,
            vmids_free: u32::MAX,
            ips_free: u32::MAX,
            quorate: true,
            ..Load::default()
        }
    }

    pub(crate) fn reported(&mut self, at: usize, report: &Report, now: f64) {
        if report.seq <= self.seqs[at] {
            return;
        }
        self.seqs[at] = report.seq;
        let load = self.load(at, report);
        self.fleet.load(node(at), load, (report.seq, false), ms(now));
    }

    fn ask<T>(
        &mut self,
        request: &Request,
        prior: &[(u32, PriorOutcome)],
        with: impl FnOnce(&mut Fleet, &Ask<'_>) -> T,
    ) -> T {
        let Self { fleet, teams, spread, .. } = self;
        let team = |node: u32| match request.burst {
            Some(team) if *spread => teams.get(&(team, node)).copied().unwrap_or_default(),
            Some(_) | None => 0,
        };
        let ask = Ask {
            size: size(request),
            network: Network::Dhcp,
            required: None,
            affinity: Affinity::default(),
            prior,
            team: &team,
            queued: &|_| 0,
        };
        with(fleet, &ask)
    }

    /// Returns the nodes to try, best first.
    pub(crate) fn best(&mut self, request: &Request, tried: &[usize], now: f64) -> Vec<usize> {
        let met: Vec<_> = tried.iter().map(|&at| (node(at), PriorOutcome::Refused)).collect();
        let (snapshot, look) = (self.snapshot.clone(), self.look);
        self.ask(request, &met, |fleet, ask| {
            let choice = fleet.choose(&snapshot, ask, look, ms(now));
            choice.best.iter().map(|pick| pick.node as usize).collect()
        })
    }

    /// Returns the best of the nodes that were just probed; their answers were recorded as reports.
    pub(crate) fn best_probed(
        &mut self,
        request: &Request,
        answered: &[usize],
        now: f64,
    ) -> Option<usize> {
        let mut answered: Vec<_> = answered.iter().map(|&at| node(at)).collect();
        answered.sort_unstable();
        let mut random = self.random.clone();
        self.ask(request, &[], |fleet, ask| {
            let size = Size::default();
            let holder = |&node| Holder { node, size, queued: 0, queue_max: 0, cached: false };
            let holders: Vec<_> = answered.iter().map(holder).collect();
            let now = fleet.now(ms(now));
            let choice =
                choose(fleet.views(), &holders, ask, &LIMITS, &now, Look::All, &mut random);
            choice.best.first().map(|pick| pick.node as usize)
        })
    }

    pub(crate) fn decided(&mut self, number: usize, request: &Request, at: usize, now: f64) {
        self.fleet.reserve(id(number), node(at), size(request), ms(now));
    }

    pub(crate) fn count_team(&mut self, team: u32, at: usize, more: bool) {
        let count = self.teams.entry((team, node(at))).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.teams.remove(&(team, node(at)));
        }
    }

    pub(crate) fn admitted(&mut self, number: usize, at: usize, seq: u64) {
        self.fleet.answered(node(at));
        self.fleet.admitted(&id(number), seq);
    }

    pub(crate) fn refused(&mut self, number: usize, at: usize) {
        self.fleet.answered(node(at));
        self.fleet.release(&id(number));
    }

    pub(crate) fn timed_out(&mut self, number: usize, at: usize, now: f64) {
        self.fleet.trip(node(at), ms(now));
        self.fleet.release(&id(number));
    }
}

fn node(at: usize) -> u32 {
    u32::try_from(at).expect("fewer nodes than 2^32")
}
