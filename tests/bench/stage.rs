//! An agent in this process over the fake PVE.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use agent::{
    Agent, Parts,
    journal::{Journal, Phase, Pools, SqliteJournal, memory::MemoryJournal},
    load::HostLoad,
    pve::fake::{FakeCluster, Pace},
    saga::Faults,
    sandbox::{Bridge, Lifetimes, Limits, Options, Order, Probe, Template, exec::shims::NoShims},
};
use anyhow::{Result, ensure};
use daemon::disk::SoundDisk;
use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::{Network, Size, Spec},
};
use tokio::time::{Instant, sleep};

/// Number of concurrent creations.
const AT_ONCE: u32 = 32;
/// Longest creation.
const CREATION: Duration = Duration::from_secs(120);

/// Free space of its storage, bytes: enough for all that a bench creates.
const ROOM: u64 = 1 << 50;
const TEMPLATE: u32 = 9000;

/// A node and its disk, which outlive agents.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) name: NodeName,
    pub(crate) pve: FakeCluster,
    /// Directory of its files.
    pub(crate) state: tempfile::TempDir,
    /// Pool of its sandboxes' addresses.
    addresses: (Ipv4Addr, Ipv4Addr),
}

impl Stage {
    /// Makes a node whose sandboxes have addresses that lead nowhere.
    pub(crate) fn new() -> Result<Self> {
        Self::with_addresses(([10, 100, 0, 2].into(), [10, 100, 7, 254].into()))
    }

    /// Makes a node whose sandboxes have these addresses.
    pub(crate) fn with_addresses(addresses: (Ipv4Addr, Ipv4Addr)) -> Result<Self> {
        let name: NodeName = "n1".parse()?;
        let pve = FakeCluster::new(std::slice::from_ref(&name), Pace::default(), 1);
        pve.add_template(&name, Vmid::try_from(TEMPLATE)?);
        pve.set_room(&name, ROOM);
        // Beside the program, which is on a disk: /tmp may be in memory.
        let here = std::env::current_exe()?;
        let here = here.parent().unwrap_or(Path::new("."));
        Ok(Self { name, pve, state: tempfile::tempdir_in(here)?, addresses })
    }

    /// Starts an agent on it.
    pub(crate) async fn start(&self, faults: Faults) -> Result<Arc<Agent>> {
        self.start_on(Arc::new(self.journal().await?), faults).await
    }

    /// Starts an agent whose journal is in memory, for measurements of what needs no disk.
    pub(crate) async fn start_in_memory(&self) -> Result<Arc<Agent>> {
        let journal = MemoryJournal::new("bench", self.pools()?, Arc::new(SoundDisk));
        self.start_on(Arc::new(journal), Faults::default()).await
    }

    async fn start_on(&self, journal: Arc<dyn Journal>, faults: Faults) -> Result<Arc<Agent>> {
        let load = HostLoad {
            cores: 64.0,
            memory_total: 1 << 44,
            memory_available: 1 << 44,
            ..HostLoad::default()
        };
        let parts = Parts {
            // The address before the pool.
            sandboxes: options(Ipv4Addr::from_bits(self.addresses.0.to_bits() - 1))?,
            reconcile: agent::reconcile::Options::default(),
            pve: self.pve.node(&self.name),
            journal,
            clock: Arc::new(agent::clock::SystemClock::default()),
            host_load: Box::new(move |_, _| load),
            shims: Arc::new(NoShims),
            dhcp: None,
            isolation: None,
            resolver: None,
            faults,
        };
        Ok(Arc::new(Agent::start(parts).await?))
    }

    fn pools(&self) -> Result<Pools> {
        Ok(Pools {
            vmids: (Vmid::try_from(100_000)?, Vmid::try_from(119_999)?),
            addresses: self.addresses,
            address_quarantine_ms: 60_000,
        })
    }

    /// Opens the journal, which the agent before holds until its last thread has ended.
    async fn journal(&self) -> Result<SqliteJournal> {
        let pools = self.pools()?;
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            match SqliteJournal::open(&self.state.path().join("journal.db"), pools.clone()) {
                Ok(journal) => return Ok(journal),
                Err(error) if Instant::now() >= until => return Err(error.into()),
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        }
    }
}

fn options(gateway: Ipv4Addr) -> Result<Options> {
    Ok(Options {
        templates: vec![Template {
            snapshot: "base_v1".parse()?,
            vmid: Vmid::try_from(TEMPLATE)?,
            size: Size { cpu_cores: 1, memory_mib: 128, disk_gib: 0 },
            probe: Probe::None,
            bridge: None,
            allowed: Default::default(),
            link: Default::default(),
            ports: Default::default(),
        }],
        network: Bridge {
            name: "vmbr0".into(),
            prefix: 16,
            gateway,
            own: Vec::new(),
            dhcp: Default::default(),
        },
        limits: Limits::default(),
        lifetimes: Lifetimes::default(),
        on_reboot: Default::default(),
        labels: Vec::new(),
        number: None,
    })
}

/// Returns the id of the sandbox with this number.
pub(crate) fn id(number: u32) -> SandboxId {
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    SandboxId::new(1_700_000_000_000, &random)
}

/// Returns the order of the sandbox with this number.
pub(crate) fn order(number: u32) -> Result<Order> {
    Ok(Order {
        id: id(number),
        team: "bench".parse()?,
        attempt: 1,
        body_digest: "0".repeat(64),
        port_rules: None,
        spec: Spec {
            name: None,
            request_id: format!("r{number}").parse()?,
            snapshot: "base_v1".parse()?,
            size: Size::default(),
            metadata: BTreeMap::new(),
            env: Default::default(),
            network: Network::Static,
            egress: None,
            services: BTreeMap::new(),
            visibility: Default::default(),
            no_default_services: false,
            expose_on_listen: None,
            node: None,
            labels: Default::default(),
            lifetime: proto::lifetime::LifetimePatch::default(),
        },
    })
}

/// Creates the sandboxes, many at a time.
pub(crate) async fn create(agent: &Arc<Agent>, numbers: std::ops::Range<u32>) -> Result<()> {
    let mut left = numbers;
    while !left.is_empty() {
        let mut calls = tokio::task::JoinSet::new();
        for number in left.by_ref().take(AT_ONCE as usize) {
            let (agent, order) = (Arc::clone(agent), order(number)?);
            calls.spawn(async move { agent.sandboxes().create(order, CREATION).await });
        }
        while let Some(made) = calls.join_next().await {
            let record = made??;
            ensure!(record.phase == Phase::Running, "{record:?}");
        }
    }
    Ok(())
}

/// Ends the agent as SIGKILL does.
pub(crate) async fn end(agent: Arc<Agent>) {
    agent.kill().await;
}
