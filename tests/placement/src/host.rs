//! A node of the workload and its agent: its sandboxes, its admission and its reports.

use std::collections::VecDeque;

use crate::{
    scenario::{Machine, Request},
    stream::Stream,
};

/// Time after its start during which a sandbox keeps its cores busy, seconds.
const YOUNG_S: f64 = 15.0;
/// Time over which the busy share and the stalls are smoothed, seconds.
const WINDOW_S: f64 = 10.0;

/// Report of a node.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) seq: u64,
    pub(crate) taken: f64,
    pub(crate) busy: f64,
    pub(crate) psi: f64,
    pub(crate) used_gib: f64,
    pub(crate) allocated_cores: f64,
    pub(crate) allocated_gib: f64,
    pub(crate) starting: f64,
    pub(crate) booting_cores: f64,
    pub(crate) start_ms: f64,
    pub(crate) sandboxes: f64,
}

#[derive(Debug)]
enum Stage {
    Queued,
    Starting,
    Running { since: f64, ends: f64 },
}

#[derive(Debug)]
struct Sandbox {
    id: usize,
    request: Request,
    stage: Stage,
    random: Stream,
    /// Whether the sandbox works now or waits.
    works: bool,
    /// Remaining growth of its memory, from 1 to 0.
    growing: f64,
    used_gib: f64,
}

impl Sandbox {
    /// Advances by a second and returns the cores in use.
    fn tick(&mut self, now: f64) -> f64 {
        match self.stage {
            Stage::Queued => 0.0,
            Stage::Starting => {
                self.used_gib = 0.2;
                1.0
            }
            Stage::Running { since, .. } => {
                let age = now - since;
                // e^(-1/60) per second.
                self.growing *= 0.983_471_453_821_617_4;
                let grown = self.request.appetite * f64::from(self.request.memory_gib);
                self.used_gib = grown * (1.0 - self.growing) + 0.25;
                if age < YOUNG_S {
                    return self.request.boot_cores();
                }
                if self.random.unit() < 1.0 / 20.0 {
                    self.works = !self.works;
                }
                let share = if self.works {
                    (self.request.zeal * self.random.uniform(0.5, 1.5)).min(1.0)
                } else {
                    0.02
                };
                share * f64::from(self.request.vcpus)
            }
        }
    }

    fn young(&self, now: f64) -> bool {
        match self.stage {
            Stage::Queued | Stage::Starting => true,
            Stage::Running { since, .. } => now - since < YOUNG_S,
        }
    }
}

/// State of a node during one second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Second {
    /// Cores in demand, as a share of the node's cores.
    pub(crate) cpu: f64,
    /// Memory in use, as a share of the node's memory.
    pub(crate) memory: f64,
    pub(crate) demand_cores: f64,
    pub(crate) starved_cores: f64,
}

/// A start in progress.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    pub(crate) id: usize,
    pub(crate) takes_s: f64,
}

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) machine: Machine,
    sandboxes: Vec<Sandbox>,
    queue: VecDeque<usize>,
    starting: usize,
    allocated_cores: f64,
    allocated_gib: f64,
    used_gib: f64,
    cpu: f64,
    busy: f64,
    psi: f64,
    start_s: f64,
    seq: u64,
    /// Reservations that were asked for before the choice, until the sandbox comes or the time ends.
    pub(crate) promised: Vec<(usize, f64, Request)>,
}

impl Host {
    pub(crate) fn new(machine: Machine) -> Self {
        let used_gib = machine.foreign_gib;
        Self {
            machine,
            sandboxes: Vec::new(),
            queue: VecDeque::new(),
            starting: 0,
            allocated_cores: 0.0,
            allocated_gib: 0.0,
            used_gib,
            cpu: 0.0,
            busy: 0.0,
            psi: 0.0,
            start_s: 0.0,
            seq: 0,
            promised: Vec::new(),
        }
    }

    fn slow(&self, now: f64) -> bool {
        self.machine.slow.holds(now)
    }

    /// Admits a creation, or refuses it.
    pub(crate) fn admit(&mut self, id: usize, request: &Request, seed: u64) -> bool {
        self.promised.retain(|(promised, ..)| *promised != id);
        let asked = f64::from(request.memory_gib);
        let memory = self.machine.memory_gib;
        if self.allocated_gib + asked > 2.0 * memory
            || self.used_gib + 0.5 * asked > 0.97 * memory
            || self.queue.len() >= 4 * self.machine.slots * self.queue_factor()
        {
            return false;
        }
        self.allocated_gib += asked;
        self.allocated_cores += f64::from(request.vcpus);
        let sandbox = Sandbox {
            id,
            request: *request,
            stage: Stage::Queued,
            random: Stream::of_sandbox(seed, id),
            works: false,
            growing: 1.0,
            used_gib: 0.0,
        };
        self.sandboxes.push(sandbox);
        self.queue.push_back(id);
        true
    }

    /// Returns the factor of the queue's length: with one start at a time, 16 may wait, not 4.
    fn queue_factor(&self) -> usize {
        if self.machine.slots == 1 { 4 } else { 1 }
    }

    /// Starts the next sandbox in the queue, if there is a slot.
    pub(crate) fn begin(&mut self, now: f64, random: &mut Stream) -> Option<Begun> {
        if self.starting == self.machine.slots {
            return None;
        }
        let id = self.queue.pop_front()?;
        let sandbox = self.sandboxes.iter_mut().find(|sandbox| sandbox.id == id)?;
        sandbox.stage = Stage::Starting;
        self.starting += 1;
        let crowded = 1.0 + 4.0 * ((self.cpu - 0.8) / 0.4).clamp(0.0, 1.0);
        let slow = if self.slow(now) { 5.0 } else { 1.0 };
        let takes_s = 1.2 * (0.3 * random.normal()).exp() * crowded * slow;
        let weight = if self.start_s > 0.0 { 0.2 } else { 1.0 };
        self.start_s += (takes_s - self.start_s) * weight;
        Some(Begun { id, takes_s })
    }

    /// Ends a start. The sandbox runs, unless `late`: then nobody waits for it any more and it is
    /// gone.
    pub(crate) fn started(&mut self, id: usize, now: f64, late: bool) {
        self.starting -= 1;
        let Some(at) = self.sandboxes.iter().position(|sandbox| sandbox.id == id) else { return };
        if late {
            self.remove(at);
            return;
        }
        let sandbox = &mut self.sandboxes[at];
        sandbox.stage = Stage::Running { since: now, ends: now + sandbox.request.life_s };
    }

    fn remove(&mut self, at: usize) -> usize {
        let gone = self.sandboxes.swap_remove(at);
        self.allocated_gib -= f64::from(gone.request.memory_gib);
        self.allocated_cores -= f64::from(gone.request.vcpus);
        gone.id
    }

    /// Advances by a second. `ended` gets the sandboxes whose lifetime is over, `killed` those that
    /// were killed for memory.
    pub(crate) fn tick(
        &mut self,
        now: f64,
        ended: &mut Vec<usize>,
        killed: &mut Vec<usize>,
    ) -> Second {
        let mut at = 0;
        let (mut demand, mut used) = (self.machine.foreign_cores, self.machine.foreign_gib);
        while at < self.sandboxes.len() {
            if matches!(self.sandboxes[at].stage, Stage::Running { ends, .. } if ends <= now) {
                ended.push(self.remove(at));
                continue;
            }
            let sandbox = &mut self.sandboxes[at];
            demand += sandbox.tick(now);
            used += sandbox.used_gib;
            at += 1;
        }
        while used > self.machine.memory_gib {
            let all = self.sandboxes.iter().enumerate();
            let running = all.filter(|(_, it)| matches!(it.stage, Stage::Running { .. }));
            let largest = running.max_by(|a, b| a.1.used_gib.total_cmp(&b.1.used_gib));
            let Some((at, largest)) = largest else { break };
            used -= largest.used_gib;
            killed.push(self.remove(at));
        }
        self.used_gib = used;
        let cores = self.machine.cores * if self.slow(now) { 0.4 } else { 1.0 };
        self.cpu = demand / cores;
        let weight = 1.0 - (-1.0 / WINDOW_S).exp();
        self.busy += (self.cpu.min(1.0) - self.busy) * weight;
        self.psi += ((1.0 - 1.0 / self.cpu.max(1.0)) - self.psi) * weight;
        Second {
            cpu: self.cpu,
            memory: used / self.machine.memory_gib,
            demand_cores: demand,
            starved_cores: (demand - cores).max(0.0),
        }
    }

    /// Creates a report of the present state, with the next number.
    pub(crate) fn report(&mut self, now: f64) -> Report {
        self.seq += 1;
        let young = self.sandboxes.iter().filter(|sandbox| sandbox.young(now));
        let mut report = Report {
            seq: self.seq,
            taken: now,
            busy: self.busy,
            psi: self.psi,
            used_gib: self.used_gib,
            allocated_cores: self.allocated_cores,
            allocated_gib: self.allocated_gib,
            starting: count(self.queue.len() + self.starting),
            booting_cores: young.map(|sandbox| sandbox.request.boot_cores()).sum(),
            start_ms: self.start_s * 1000.0,
            sandboxes: count(self.sandboxes.len()),
        };
        self.promised.retain(|(_, until, _)| now < *until);
        for (_, _, request) in &self.promised {
            report.allocated_cores += f64::from(request.vcpus);
            report.allocated_gib += f64::from(request.memory_gib);
            report.starting += 1.0;
            report.booting_cores += request.boot_cores();
        }
        report
    }

    pub(crate) fn is_slow(&self, now: f64) -> bool {
        self.slow(now)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of sandboxes")]
pub(crate) const fn count(number: usize) -> f64 {
    number as f64
}
