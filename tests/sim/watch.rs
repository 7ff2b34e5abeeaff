//! What must hold at every moment, not only at the end.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use agent::{
    clock::Clock,
    journal::{MemoryJournal, Phase, Record},
    pve::{CloneOrder, fake::FakeCluster},
    sandbox::{Cause, exec::shims::Shims},
};
use proto::name::NodeName;
use tokio::net::UnixStream;

use crate::{
    calls::{Memory, TTL},
    clock::SimClock,
};

/// What was seen to be wrong; each once.
#[derive(Debug, Default)]
pub(crate) struct Watch(Mutex<BTreeSet<String>>);

impl Watch {
    pub(crate) fn wrong(&self, what: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(what);
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// I2: nothing is ended by its time to live before that has passed since somebody first asked
    /// for it, whatever the wall clock says. Across a boot there is only the wall clock.
    pub(crate) fn ended(&self, record: &Record, memory: &Memory, clock: &SimClock) {
        let Some(known) = memory.get(record.request_id.as_str()) else { return };
        let boot = clock.moment().boot;
        let same_boot = record.lifetime.expires.as_ref().is_some_and(|at| at.boot == boot);
        let age = known.since.elapsed();
        if record.cause == Cause::Ttl.word() && same_boot && age < TTL {
            self.wrong(format!("I2: {} was ended after {age:?}, before its time", record.id));
        }
    }

    /// I11: a clone begins when its intent would survive a power cut, and not before.
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

/// Nothing is entered; whoever would be is looked at.
#[derive(Debug)]
pub(crate) struct Doors {
    pub(crate) pve: FakeCluster,
    pub(crate) watch: Arc<Watch>,
}

#[async_trait::async_trait]
impl Shims for Doors {
    async fn find(&self, _: &Record) -> Option<UnixStream> {
        None
    }

    /// I5: only the sandbox that was named, and only in its life.
    async fn start(&self, record: &Record) -> io::Result<UnixStream> {
        let guest = self.pve.guests().remove(&record.vmid);
        let mark = guest.as_ref().and_then(|guest| guest.config.mark());
        if mark != Some(record.mark()) {
            let (id, vmid) = (record.id, record.vmid);
            self.watch.wrong(format!("I5: {vmid} was entered for {id} and is {mark:?}"));
        }
        if !matches!(record.phase, Phase::Running | Phase::Paused) {
            self.watch.wrong(format!("I5: {} was entered and is {:?}", record.id, record.phase));
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "nobody is in there"))
    }
}
