//! Knowledge of a peer's controller: the last report of each node, and its own decisions that no
//! report has shown yet.

use crate::{host::Report, scenario::Machine, scenario::Request};

/// Age of a report after which every peer ignores it, seconds.
const OLD_S: f64 = 30.0;

#[derive(Debug, Clone, Copy)]
struct Reserved {
    id: usize,
    vcpus: f64,
    memory_gib: f64,
    /// Time when the node admitted it; a later report includes it.
    admitted: Option<f64>,
}

/// One node as a controller sees it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) cores: f64,
    pub(crate) memory_gib: f64,
    pub(crate) report: Report,
    arrived: Option<f64>,
    reserved: Vec<Reserved>,
}

impl Seen {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self {
            cores: machine.cores,
            memory_gib: machine.memory_gib,
            report: Report::default(),
            arrived: None,
            reserved: Vec::new(),
        }
    }

    pub(crate) fn usable(&self, now: f64) -> bool {
        self.arrived.is_some_and(|at| now - at <= OLD_S)
    }

    pub(crate) fn reported(&mut self, report: Report, now: f64) {
        if self.arrived.is_some() && report.seq <= self.report.seq {
            return;
        }
        (self.report, self.arrived) = (report, Some(now));
        self.reserved.retain(|held| held.admitted.is_none_or(|at| report.taken < at));
    }

    pub(crate) fn reserve(&mut self, id: usize, request: &Request) {
        self.reserved.push(Reserved {
            id,
            vcpus: f64::from(request.vcpus),
            memory_gib: f64::from(request.memory_gib),
            admitted: None,
        });
    }

    pub(crate) fn admitted(&mut self, id: usize, at: f64) {
        for held in self.reserved.iter_mut().filter(|held| held.id == id) {
            held.admitted = Some(at);
        }
    }

    pub(crate) fn release(&mut self, id: usize) {
        self.reserved.retain(|held| held.id != id);
    }

    pub(crate) fn reserved_cores(&self) -> f64 {
        self.reserved.iter().map(|held| held.vcpus).sum()
    }

    pub(crate) fn reserved_gib(&self) -> f64 {
        self.reserved.iter().map(|held| held.memory_gib).sum()
    }

    pub(crate) fn reserved_sandboxes(&self) -> f64 {
        crate::host::count(self.reserved.len())
    }
}
