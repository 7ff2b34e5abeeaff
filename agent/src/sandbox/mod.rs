//! Sandboxes of this node: every operation on a sandbox begins here.
//!
//! One file per operation. All state goes through the journal first: the intent before the effect,
//! the record before the answer. Each operation runs on its own task, one at a time per sandbox;
//! every wait in it has a deadline. Knows `pve`, `journal` and `saga`; knows no wire protocol, and
//! no clock but the one that it is given.

mod activity;
pub mod address;
mod admission;
mod adopt;
mod boot;
mod cancel;
pub mod check;
mod core;
mod create;
mod deadline;
mod delete;
pub mod drift;
mod enforce_pause;
mod error;
pub mod exec;
mod expiry;
mod expose;
pub mod files;
pub mod garbage;
mod intake;
pub mod kill_connections;
mod lifetime;
mod migrate;
mod number;
pub mod observe;
mod operations;
mod options;
mod pause;
mod probe;
mod queue;
mod reads;
mod recover;
mod release;
mod reserve;
mod resume;
mod start;
mod state;
mod stop;
mod sweep;
mod templates;
mod undo;
mod unlock;
mod wake;
mod write;

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::{
        Arc, OnceLock, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use proto::{Reason, id::Vmid};
use tokio::sync::{Mutex, Semaphore, watch};

use self::core::Records;
use crate::{
    clock::{Clock, Moment},
    journal::{self, Feed, Journal},
    load::HostLoad,
    pve::Pve,
    saga::{Faults, Mutation},
    tasks::Tasks,
};
use activity::Activity;
use admission::Gate;
use operations::OperationTable;
use queue::Queues;

pub use self::core::{Known, Tombstone};
pub use adopt::Adoption;
pub use error::Error;
pub use expiry::Due;
pub use expose::Closed;
pub use number::Renumbered;
pub use options::{Bridge, Dhcp, Lifetimes, Limits, OnReboot, Options, Order, Probe, Template};
pub use reads::Tally;
pub use state::{Event, next};
pub use wake::Wake;

/// All sandboxes of this node, with the state that their operations share.
#[derive(Debug)]
pub struct Sandboxes {
    options: Options,
    pve: Arc<dyn Pve>,
    records: Records,
    clock: Arc<dyn Clock>,
    tasks: Tasks,
    faults: Faults,
    operations: OperationTable,
    gate: Gate,
    queues: Queues,
    starts: Semaphore,
    epoch: AtomicU64,
    activity: Activity,
    intake: RwLock<journal::intake::Order>,
    /// Name and number of this node, from the journal.
    node: RwLock<Option<journal::Node>>,
    /// Configured templates that are no templates on this node; `None` before the first check.
    unfit: RwLock<Option<BTreeSet<Vmid>>>,
    /// Changed node number that was logged last, so that each is logged once.
    warned: AtomicU32,
    /// Load of the host; empty until `watch_host` sets its source.
    host: OnceLock<watch::Receiver<HostLoad>>,
    /// Replies of the DHCP server; empty where they cannot be seen.
    dhcp: OnceLock<Arc<dyn address::DhcpReplies>>,
    /// Addresses of containers that are not in this journal; `None` before the first observation.
    strangers: Mutex<Option<BTreeSet<Ipv4Addr>>>,
}

impl Sandboxes {
    /// Loads the sandboxes from the journal. Changes nothing on the host: the reconciler does that.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn open(
        options: Options,
        pve: Arc<dyn Pve>,
        journal: Arc<dyn Journal>,
        clock: Arc<dyn Clock>,
        tasks: Tasks,
        faults: Faults,
    ) -> Result<Arc<Self>, Error> {
        let epoch = journal.epoch(0).await?;
        let intake = journal.intake().await?;
        let node = journal.node().await?;
        Ok(Arc::new(Self {
            starts: Semaphore::new(options.limits.starts_max.max(1)),
            options,
            pve,
            records: Records::open(journal).await?,
            clock,
            tasks,
            faults,
            operations: OperationTable::default(),
            gate: Gate::default(),
            queues: Queues::default(),
            epoch: AtomicU64::new(epoch),
            activity: Activity::new(),
            intake: RwLock::new(intake),
            node: RwLock::new(node),
            unfit: RwLock::default(),
            warned: AtomicU32::new(0),
            host: OnceLock::new(),
            dhcp: OnceLock::new(),
            strangers: Mutex::default(),
        }))
    }

    /// Accepts a controller of this epoch, and from then on none of a lower one, even after a
    /// restart.
    ///
    /// # Errors
    /// STALE_EPOCH when a controller with a higher epoch is in charge.
    pub async fn fence(&self, epoch: u64) -> Result<(), Error> {
        let mut highest = self.epoch.load(Ordering::Acquire);
        if epoch > highest {
            highest = self.records.epoch(epoch).await?;
            self.epoch.fetch_max(highest, Ordering::AcqRel);
        }
        if epoch < highest && !self.faults.has(Mutation::Fence) {
            return Err(Error::new(
                Reason::StaleEpoch,
                format!("a controller of epoch {highest} is in charge, this one has {epoch}"),
            ));
        }
        Ok(())
    }

    /// Gives admission the host's load. Only the first call has an effect.
    pub fn watch_host(&self, host: watch::Receiver<HostLoad>) {
        drop(self.host.set(host));
    }

    /// Highest controller epoch seen.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Interface to PVE on this host.
    pub fn pve(&self) -> &Arc<dyn Pve> {
        &self.pve
    }

    /// Journal of this node, to read.
    pub fn journal(&self) -> Feed {
        self.records.feed()
    }

    /// Options from the configuration.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Current time, milliseconds since 1970.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Current time by the wall clock and by the clock since boot.
    pub fn moment(&self) -> Moment {
        self.clock.moment()
    }

    /// Tasks of the agent.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }
}

#[cfg(test)]
pub(crate) mod tests;
