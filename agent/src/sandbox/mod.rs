//! Sandboxes of this node: every operation on a sandbox begins here.
//!
//! - `core`: records and their only writer, phases, operations, options
//! - `lifecycle`: create, start, stop, pause, resume, delete
//! - `drift`: how a container differs from its record; orphans, `fsck`, garbage
//! - `ownership`: adopt, release, recover, move to another node
//! - `access`: ports, files, wake-ups, what a sandbox reaches
//! - `admission`: whether the node takes another sandbox, and the queues
//! - `lifetime`: expiry and idleness
//! - `exec`: commands
//!
//! One file per operation; its header shows its steps and what undoes them. All state goes through
//! the journal first: the intent before the effect, the record before the answer. Each operation
//! runs on its own task, one at a time per sandbox; every wait in it has a deadline. Knows `pve`,
//! `journal` and `saga`; knows no wire protocol, and no clock but the one that it is given.

pub mod access;
mod admission;
mod core;
pub mod drift;
pub mod exec;
pub mod lifecycle;
pub mod lifetime;
mod ownership;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use daemon::sync::RwLock;
use proto::{Reason, id::Vmid};
use tokio::sync::{Mutex, watch};

use self::{
    admission::{clone_queue::Queues, fair_slots::FairSlots, lock::AdmissionLock},
    core::{Records, operations::OperationTable},
    lifetime::activity::Activity,
};
use crate::{
    clock::{Clock, Moment},
    journal::{self, Feed, Journal},
    load::HostLoad,
    pve::Pve,
    saga::Faults,
    tasks::Tasks,
};

pub use self::{
    access::{expose::Closed, wake::Wake},
    admission::number::Renumbered,
    core::{
        Known, Tombstone,
        error::{Error, Result},
        options::{
            Bridge, DefaultPorts, DefaultService, Dhcp, Lifetimes, Limits, OnReboot, Options,
            Order, Probe, Template,
        },
        phase::{Event, next},
        queries::Tally,
    },
    lifetime::expiry::Due,
    ownership::adopt::Adoption,
};

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
    admission: AdmissionLock,
    queues: Queues,
    starts: FairSlots,
    epoch: AtomicU64,
    activity: Activity,
    scheduling: RwLock<journal::scheduling::Scheduling>,
    /// Name and number of this node, from the journal.
    node: RwLock<Option<journal::Node>>,
    /// Configured templates that are not offered, with the reason; `None` before the first check.
    unfit_templates: RwLock<Option<BTreeMap<Vmid, String>>>,
    /// Changed node number that was logged last, so that each is logged once.
    logged_number: AtomicU32,
    /// Load of the host; empty until `watch_host` sets its source.
    host: OnceLock<watch::Receiver<HostLoad>>,
    /// Replies of the DHCP server; empty where they cannot be seen.
    dhcp: OnceLock<Arc<dyn lifecycle::address::DhcpReplies>>,
    /// Isolation from each other and the host; empty where it is switched off.
    isolation: OnceLock<access::isolation::Isolation>,
    /// Open forwards to ports.
    forwards: core::forwards::Forwards,
    /// Cuts of connections to ports that were closed.
    cuts: access::pending_cuts::CutsUnderWay,
    /// Limits that are in the cgroups of sandboxes.
    cgroup_limits: lifecycle::cgroup_limits::CgroupLimits,
    /// Addresses of containers that are not in this journal; `None` before the first observation.
    foreign_addresses: Mutex<Option<BTreeSet<Ipv4Addr>>>,
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
    ) -> Result<Arc<Self>> {
        let epoch = journal.epoch(0).await?;
        let scheduling = journal.scheduling().await?;
        let node = journal.node().await?;
        Ok(Arc::new(Self {
            starts: FairSlots::new(options.limits.starts_max.max(1)),
            options,
            pve,
            records: Records::open(journal).await?,
            clock,
            tasks,
            faults,
            operations: OperationTable::default(),
            admission: AdmissionLock::default(),
            queues: Queues::default(),
            epoch: AtomicU64::new(epoch),
            activity: Activity::new(),
            scheduling: RwLock::new(scheduling),
            node: RwLock::new(node),
            unfit_templates: RwLock::default(),
            logged_number: AtomicU32::new(0),
            host: OnceLock::new(),
            dhcp: OnceLock::new(),
            isolation: OnceLock::new(),
            forwards: Default::default(),
            cuts: Default::default(),
            cgroup_limits: Default::default(),
            foreign_addresses: Mutex::default(),
        }))
    }

    /// Accepts a controller of this epoch, and from then on none of a lower one, even after a
    /// restart.
    ///
    /// # Errors
    /// STALE_EPOCH when a controller with a higher epoch is in charge.
    pub async fn fence(&self, epoch: u64) -> Result<()> {
        let mut highest = self.epoch.load(Ordering::Acquire);
        if epoch > highest {
            highest = self.records.epoch(epoch).await?;
            self.epoch.fetch_max(highest, Ordering::AcqRel);
        }
        if epoch < highest {
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
    pub fn journal(&self) -> Arc<dyn Feed> {
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
