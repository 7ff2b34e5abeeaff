//! Invariants that must hold at every moment, not only at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use agent::{
    clock::Clock,
    journal::{MemoryJournal, Record},
    pve::{CloneOrder, fake::FakeCluster},
};
use proto::{Cause, Reason, name::NodeName};

use crate::{
    calls::{Memory, TTL},
    clock::SimClock,
};

/// Violations that were seen, each once.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    wrong: Mutex<BTreeSet<String>>,
    commands: Mutex<BTreeMap<u64, Command>>,
}

#[derive(Debug, Default)]
struct Command {
    ran: bool,
    /// Reason with which its caller was told that the command was not run.
    denied: Option<Reason>,
}

impl Watch {
    pub(crate) fn wrong(&self, what: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).insert(what);
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn commands(&self) -> MutexGuard<'_, BTreeMap<u64, Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a number for a new command.
    pub(crate) fn command(&self) -> u64 {
        let mut commands = self.commands();
        let number = u64::try_from(commands.len()).expect("a count");
        commands.insert(number, Command::default());
        number
    }

    /// Records that the command runs.
    pub(crate) fn ran(&self, number: u64) {
        let mut commands = self.commands();
        let command = commands.entry(number).or_default();
        if command.ran {
            self.wrong(format!("I14: command {number} ran twice"));
        }
        command.ran = true;
        self.not_both(number, command);
    }

    /// Records that the caller was told that the command was not run.
    pub(crate) fn denied(&self, number: u64, reason: Reason) {
        let mut commands = self.commands();
        let command = commands.entry(number).or_default();
        command.denied = Some(reason);
        self.not_both(number, command);
    }

    /// Checks I14: a command that was answered as not run never runs.
    fn not_both(&self, number: u64, command: &Command) {
        if let Some(reason) = command.denied.as_ref().filter(|_| command.ran) {
            self.wrong(format!(
                "I14: command {number} was answered as not run ({reason}), and ran"
            ));
        }
    }

    /// Checks I2: a time to live ends nothing before it has passed since the first request,
    /// whatever the wall clock says. Across a boot there is only the wall clock.
    pub(crate) fn ended(&self, record: &Record, memory: &Memory, clock: &SimClock) {
        let Some(known) = memory.get(record.request_id.as_str()) else { return };
        let boot = clock.moment().boot;
        let same_boot = record.lifetime.expires.as_ref().is_some_and(|at| at.boot == boot);
        let age = known.since.elapsed();
        if record.cause == Cause::Ttl && same_boot && age < TTL {
            self.wrong(format!("I2: {} was ended after {age:?}, before its time", record.id));
        }
    }

    /// Checks I11: a clone begins only when its intent would survive a power cut.
    pub(crate) fn clones(self: &Arc<Self>, pve: &FakeCluster, journals: Vec<Journals>) {
        let watch = Arc::clone(self);
        pve.on_clone(move |node, order: &CloneOrder| {
            let journal = journals.iter().find(|(name, _)| name == node).map(|(_, j)| j);
            let intent = journal.and_then(|journal| journal.durable(&order.mark.sandbox_id));
            let meant = |record: &Record| record.vmid == order.vmid && !record.phase.ended();
            if !intent.as_ref().is_some_and(meant) {
                let (id, vmid) = (order.mark.sandbox_id, order.vmid);
                watch.wrong(format!("I11: {id} is cloned as {vmid}, durable is {intent:?}"));
            }
        });
    }
}

pub(crate) type Journals = (NodeName, Arc<MemoryJournal>);
