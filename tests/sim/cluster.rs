//! Three nodes with agents, and a controller: started, killed and started again over the same
//! journals and the same store.

use std::{sync::Arc, time::Duration};

use agent::{
    Agent, Parts,
    journal::{
        Pools,
        memory::{MemoryJournal, SoundDisk},
    },
    load::HostLoad,
    pve::{
        ContainerConfig, Pve,
        fake::{FakeCluster, Pace},
    },
    sandbox::{Bridge, Lifetimes, Limits, Options, Probe, Template},
};
use controller::{
    Controller,
    store::{Store, memory::Memory},
};
use proto::{id::Vmid, name::NodeName, spec::Size};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    chance::{Chance, SimClock},
    net::{Dialler, Net},
};

/// What sandboxes are created from.
pub(crate) const SNAPSHOT: &str = "base_v1";
/// Somebody else's container, in our range of numbers, with our host name pattern.
pub(crate) const FOREIGN: u32 = 100_001;

/// One node's agent.
pub(crate) struct Host {
    pub(crate) name: NodeName,
    number: u8,
    pub(crate) journal: Arc<MemoryJournal>,
    agent: Option<(Arc<Agent>, JoinHandle<()>)>,
}

pub(crate) struct Cluster {
    pub(crate) pve: FakeCluster,
    pub(crate) net: Arc<Net>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) token: String,
    controller: Option<Controller>,
    dial: tokio::sync::mpsc::Sender<std::io::Result<tokio::io::DuplexStream>>,
    clock: SimClock,
    seed: u64,
    lives: u64,
}

impl Cluster {
    pub(crate) async fn new(seed: u64) -> Self {
        let names: Vec<NodeName> =
            (1..=3).map(|n| format!("n{n}").parse().expect("a node name")).collect();
        let pve = FakeCluster::new(&names, Pace::RECORDED, seed);
        let mut hosts = Vec::new();
        for (number, name) in (1u8..).zip(names) {
            pve.add_template(&name, vmid(9000 + u32::from(number)));
            let journal =
                MemoryJournal::new(format!("j{number}"), pools(number), Arc::new(SoundDisk));
            hosts.push(Host { name, number, journal: Arc::new(journal), agent: None });
        }
        let foreign = "hostname: pvelxc-00000000000000000000000000\ntags: pve-sandbox\n\
                       rootfs: local-zfs:subvol-100001-disk-0,size=2G\nunprivileged: 1\n";
        pve.add_guest(
            &hosts[0].name,
            vmid(FOREIGN),
            ContainerConfig::parse(foreign.as_bytes()),
            false,
        );
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let issued = controller::token::issue("red".parse().expect("team"), "sandbox operator", 1);
        store.add_token(issued.token).await.expect("stored");
        let mut cluster = Self {
            pve,
            net: Arc::default(),
            hosts,
            store,
            token: issued.text,
            controller: None,
            dial: tokio::sync::mpsc::channel(1).0,
            clock: SimClock(tokio::time::Instant::now()),
            seed,
            lives: 0,
        };
        for index in 0..cluster.hosts.len() {
            cluster.start_agent(index).await;
        }
        cluster.start_controller().await;
        cluster
    }

    /// Starts an agent over what its journal holds.
    pub(crate) async fn start_agent(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let load = HostLoad {
            cores: 8.0,
            memory_total: 64 << 30,
            memory_available: 48 << 30,
            ..HostLoad::default()
        };
        let pve: Arc<dyn Pve> = self.pve.node(&host.name);
        let parts = Parts {
            sandboxes: options(host.number),
            reconcile: agent::reconcile::Options::default(),
            pve,
            journal: host.journal.clone(),
            clock: Arc::new(self.clock),
            host_load: Box::new(move |_| load),
            shims: Arc::new(agent::sandbox::exec::shims::NoShims),
            faults: agent::saga::Faults::default(),
        };
        let agent = Arc::new(Agent::start(parts).await.expect("an agent"));
        let incoming = ReceiverStream::new(self.net.listen(&host.name));
        let served = agent.clone();
        let serving = tokio::spawn(async move {
            if let Err(error) = served.serve(incoming).await {
                panic!("an agent's server ended: {error}");
            }
        });
        host.agent = Some((agent, serving));
    }

    /// SIGKILL to an agent: what it had not synced is lost, `pct` goes on.
    pub(crate) async fn kill_agent(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if let Some((agent, serving)) = host.agent.take() {
            host.journal.crash();
            agent.kill().await;
            serving.abort();
        }
    }

    /// Power cut: the agent, `pct` and every container of the node.
    pub(crate) async fn power_cut(&mut self, index: usize) {
        self.kill_agent(index).await;
        self.pve.crash(&self.hosts[index].name);
    }

    /// Drops the controller in mid-air and starts another over the same store.
    pub(crate) async fn restart_controller(&mut self) {
        self.controller = None;
        self.start_controller().await;
    }

    async fn start_controller(&mut self) {
        self.lives += 1;
        let controller = Controller::start(controller::Parts {
            store: self.store.clone(),
            connector: Arc::new(Dialler(self.net.clone())),
            clock: Arc::new(self.clock),
            random: Arc::new(Chance::new(self.seed, 1000 + self.lives)),
            nodes: controller::node::Options {
                seeds: self.hosts.iter().map(|host| (host.name.clone(), String::new())).collect(),
                discover: false,
                agent_port: 7445,
                limits: controller::placement::Limits::default(),
            },
            creates: controller::sandbox::Options::default(),
            events: controller::events::Options::default(),
            limits: controller::config::ApiLimits::default(),
            urls: controller::url::UrlTemplate::new("http://port-{port}-vm-{vmid}.test")
                .expect("a template"),
        })
        .await
        .expect("a controller");
        let (dial, dialled) = tokio::sync::mpsc::channel(64);
        let stopped = controller.stopping().cancelled_owned();
        let api = controller.api();
        tokio::spawn(async move { api.serve(ReceiverStream::new(dialled), stopped).await });
        self.dial = dial;
        controller.settled(Duration::from_secs(8)).await;
        self.controller = Some(controller);
    }

    /// A connection to the controller's API as it is now.
    pub(crate) fn channel(&self) -> tonic::transport::Channel {
        let dial = self.dial.clone();
        daemon::channel::over(move || {
            let dial = dial.clone();
            async move {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let refused = |_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
                dial.send(Ok(far)).await.map_err(refused)?;
                Ok(near)
            }
        })
    }
}

pub(crate) fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

fn pools(number: u8) -> Pools {
    let first = 100_000 * u32::from(number);
    Pools {
        vmids: (vmid(first), vmid(first + 999)),
        addresses: ([10, 100, number, 2].into(), [10, 100, number, 200].into()),
        address_quarantine_ms: 60_000,
    }
}

fn options(number: u8) -> Options {
    Options {
        templates: vec![Template {
            snapshot: SNAPSHOT.parse().expect("snapshot"),
            vmid: vmid(9000 + u32::from(number)),
            size: Size { cpu_cores: 1, memory_mib: 512 },
            probe: Probe::None,
        }],
        network: Bridge {
            name: "vmbr0".into(),
            prefix: 24,
            gateway: [10, 100, number, 1].into(),
            dhcp: false,
        },
        limits: Limits::default(),
        lifetimes: Lifetimes::default(),
    }
}
