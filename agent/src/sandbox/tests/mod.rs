//! Sandboxes over the fake PVE and the journal in memory, in paused time.

mod address;
mod adopt;
mod boots;
mod cgroup_limits;
mod crash;
mod create;
mod cuts;
mod default_ports;
mod faults;
mod isolation;
mod life;
mod lifetime;
mod link;
pub(crate) mod log_lines;
mod migrate;
mod operator;
mod pause;
mod port_changes;
mod ports;
mod quorum;
mod reboot;
mod recover;
mod resize;
mod stop;
mod syncs;
mod update;
mod volumes;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use daemon::disk::{Disk, SoundDisk};
use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    lifetime::LifetimePatch,
    name::NodeName,
    spec::{Egress, Network, Size, Spec},
};

use super::*;
use crate::{
    clock::{Clock, Moment},
    journal::{Journal, MemoryJournal, Phase, Pools, Record},
    pve::fake::{FakeCluster, Fault, Op, Pace, Trouble},
    reconcile::{Action, Options as ReconcileOptions, Reconciler},
    saga::Faults,
    tasks::Tasks,
};

/// Wait that is longer than any operation.
pub(crate) const LONG: Duration = Duration::from_secs(3600);
pub(crate) const TEMPLATE: u32 = 9000;
const FOREIGN: u32 = 100_003;
/// Node of the cluster that has no agent.
const OTHER: &str = "node2";

pub(crate) fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

pub(crate) fn id(number: u8) -> SandboxId {
    SandboxId::new(1_700_000_000_000 + u64::from(number), &[number; 10])
}

pub(crate) fn order(number: u8) -> Order {
    Order {
        id: id(number),
        team: "acme".parse().expect("valid"),
        attempt: 1,
        body_digest: "0".repeat(64),
        spec: Spec {
            name: None,
            request_id: format!("r-{number}").parse().expect("valid"),
            snapshot: "base".parse().expect("valid"),
            // The disk size makes the creation run every step that one can have.
            size: Size { disk_gib: 8, ..Size::default() },
            metadata: BTreeMap::new(),
            env: Default::default(),
            network: Network::Static,
            egress: None,
            services: BTreeMap::new(),
            no_default_services: false,
            expose_on_listen: None,
            visibility: BTreeMap::new(),
            node: None,
            labels: Default::default(),
            lifetime: LifetimePatch::default(),
        },
        port_rules: None,
    }
}

/// Clock that moves only when a test moves it.
#[derive(Debug, Default)]
pub(crate) struct HandClock {
    passed_ms: AtomicU64,
    /// Offset of the wall clock, milliseconds.
    off_ms: std::sync::atomic::AtomicI64,
    /// Number of reboots of the host, and the time of the last.
    boots: AtomicU64,
    booted_ms: AtomicU64,
}

impl HandClock {
    pub(crate) fn forward(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).expect("fits");
        self.passed_ms.fetch_add(ms, Ordering::Relaxed);
    }

    pub(crate) fn reboot(&self) {
        self.boots.fetch_add(1, Ordering::Relaxed);
        let up_ms = 3_600_000 + self.passed_ms.load(Ordering::Relaxed);
        self.booted_ms.store(up_ms, Ordering::Relaxed);
    }

    /// Moves only the wall clock.
    pub(crate) fn jump(&self, seconds: i64) {
        self.off_ms.fetch_add(seconds * 1000, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn now_ms(&self) -> u64 {
        let true_ms = 1_700_000_000_000 + self.passed_ms.load(Ordering::Relaxed);
        true_ms.saturating_add_signed(self.off_ms.load(Ordering::Relaxed))
    }

    fn moment(&self) -> Moment {
        let up_ms = 3_600_000 + self.passed_ms.load(Ordering::Relaxed);
        let up_ms = up_ms - self.booted_ms.load(Ordering::Relaxed);
        let boot = format!("b{}", self.boots.load(Ordering::Relaxed));
        Moment { wall_ms: self.now_ms(), boot, up_ms }
    }
}

/// Node with the core of an agent on it.
pub(crate) struct Node {
    pub(crate) cluster: FakeCluster,
    pub(crate) name: NodeName,
    pub(crate) journal: Arc<MemoryJournal>,
    pub(crate) clock: Arc<HandClock>,
    pub(crate) options: Options,
    pub(crate) tasks: Tasks,
    pub(crate) sandboxes: Arc<Sandboxes>,
}

/// Change of the lifetime alone.
pub(crate) fn lives(lifetime: proto::lifetime::LifetimePatch) -> proto::update::Update {
    proto::update::Update { lifetime, ..Default::default() }
}

impl Node {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}, Faults::default()).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Options), faults: Faults) -> Self {
        Self::on(Arc::new(SoundDisk), change, faults).await
    }

    async fn on(disk: Arc<dyn Disk>, change: impl FnOnce(&mut Options), faults: Faults) -> Self {
        let addresses = (Ipv4Addr::new(10, 100, 1, 2), Ipv4Addr::new(10, 100, 1, 254));
        Self::with_addresses(addresses, disk, change, faults).await
    }

    async fn with_addresses(
        addresses: (Ipv4Addr, Ipv4Addr),
        disk: Arc<dyn Disk>,
        change: impl FnOnce(&mut Options),
        faults: Faults,
    ) -> Self {
        let name: NodeName = "node1".parse().expect("valid");
        let names = [name.clone(), OTHER.parse().expect("valid")];
        let cluster = FakeCluster::new(&names, Pace::RECORDED, 7);
        cluster.add_template(&name, vmid(TEMPLATE));
        let pools = Pools {
            vmids: (vmid(100_000), vmid(100_099)),
            addresses,
            address_quarantine_ms: 60_000,
        };
        let mut options = Options {
            templates: vec![Template {
                snapshot: "base".parse().expect("valid"),
                vmid: vmid(TEMPLATE),
                size: Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 },
                probe: Probe::None,
                bridge: None,
                allowed: Default::default(),
                link: Default::default(),
                ports: Default::default(),
            }],
            network: Bridge {
                name: "vmbr0".into(),
                prefix: 24,
                gateway: Ipv4Addr::new(10, 100, 1, 1),
                own: Vec::new(),
                dhcp: Dhcp::Refused,
            },
            limits: Limits::default(),
            lifetimes: Lifetimes::default(),
            on_reboot: Default::default(),
            labels: Vec::new(),
            number: None,
        };
        change(&mut options);
        let journal = Arc::new(MemoryJournal::new("journal", pools, disk));
        let clock = Arc::new(HandClock::default());
        let tasks = Tasks::default();
        let sandboxes = open(&cluster, &name, &journal, &clock, &options, &tasks, faults).await;
        Self { cluster, name, journal, clock, options, tasks, sandboxes }
    }

    /// Kills the agent like SIGKILL and starts another one on the same journal.
    pub(crate) async fn restart(&mut self) {
        self.tasks.kill().await;
        self.journal.crash();
        self.tasks = Tasks::default();
        let Self { cluster, name, journal, clock, options, tasks, .. } = self;
        self.sandboxes =
            open(cluster, name, journal, clock, options, tasks, Faults::default()).await;
    }

    /// Cuts the power of the node; it comes back, and its agent with it.
    pub(crate) async fn reboot(&mut self) {
        self.cluster.crash(&self.name);
        self.clock.reboot();
        self.restart().await;
    }

    pub(crate) fn other(&self) -> NodeName {
        OTHER.parse().expect("valid")
    }

    /// Adds a container of somebody else in our range, with a name like ours.
    pub(crate) fn add_foreign(&self) {
        let config = crate::pve::ContainerConfig::parse(
            b"hostname: pvelxc-lookalike\ntags: pve-sandbox\nrootfs: local-zfs:subvol-100003-disk-0\n",
        );
        self.cluster.add_guest(&self.name, vmid(FOREIGN), config, false);
    }

    pub(crate) async fn create(&self, number: u8) -> Arc<Record> {
        self.sandboxes.create(order(number), LONG).await.expect("admitted")
    }

    pub(crate) async fn running(&self, number: u8) -> Arc<Record> {
        let record = self.create(number).await;
        assert_eq!(record.phase, Phase::Running, "{record:?}");
        record
    }

    pub(crate) async fn record(&self, number: u8) -> Arc<Record> {
        self.sandboxes.get(&SandboxRef::Id(id(number))).await.expect("known")
    }

    pub(crate) fn fault(&self, op: Op, trouble: Trouble) {
        self.cluster.inject(Fault { op, node: None, vmid: None, trouble });
    }

    /// Waits until no operation is under way.
    pub(crate) async fn idle(&self) {
        while !self.sandboxes.busy().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn reconciler(&self) -> Reconciler {
        Reconciler::new(Arc::clone(&self.sandboxes), ReconcileOptions::default())
    }

    /// Runs passes until there is nothing to do; a few must be enough.
    pub(crate) async fn reconcile(&self) -> Vec<Action> {
        let mut reconciler = self.reconciler();
        let (mut done, mut quiet) = (Vec::new(), false);
        for _ in 0..6 {
            let actions = reconciler.pass().await;
            // Some actions are taken only when their reason is seen for the second time.
            if actions.is_empty() && quiet {
                return done;
            }
            quiet = actions.is_empty();
            done.extend(actions);
        }
        panic!("still not done: {done:?}");
    }

    /// Containers that exist, without templates and foreign ones.
    pub(crate) fn containers(&self) -> Vec<u32> {
        let guests = self.cluster.guests().into_iter();
        let ours = guests.filter(|(vmid, _)| ![TEMPLATE, FOREIGN].contains(&vmid.get()));
        ours.map(|(vmid, _)| vmid.get()).collect()
    }

    /// Asserts that there are no findings, and no lock on the template.
    pub(crate) async fn assert_sound(&self) {
        self.cluster.settle().await;
        let (findings, _) = self.sandboxes.check().await;
        assert_eq!(findings, []);
        let guests = self.cluster.guests();
        assert_eq!(guests[&vmid(TEMPLATE)].config.lock(), None);
    }

    /// Asserts that nothing exists: no container, volume, lease or reservation.
    pub(crate) async fn assert_clean(&self) {
        self.assert_sound().await;
        assert_eq!(self.containers(), [] as [u32; 0]);
        let tally = self.sandboxes.tally().await.expect("reads");
        assert_eq!((tally.starting, tally.queued, tally.memory_allocated), (0, 0, 0));
        assert_eq!(tally.vmids_free, 100);
        assert_eq!(self.sandboxes.live(), [] as [Arc<Record>; 0]);
        assert!(self.sandboxes.busy().is_empty());
    }
}

async fn open(
    cluster: &FakeCluster,
    name: &NodeName,
    journal: &Arc<MemoryJournal>,
    clock: &Arc<HandClock>,
    options: &Options,
    tasks: &Tasks,
    faults: Faults,
) -> Arc<Sandboxes> {
    Sandboxes::open(
        options.clone(),
        cluster.node(name),
        Arc::clone(journal) as Arc<dyn Journal>,
        Arc::clone(clock) as Arc<dyn Clock>,
        tasks.clone(),
        faults,
    )
    .await
    .expect("opens")
}
