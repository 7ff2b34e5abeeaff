//! Three nodes whose agents are started, killed and restarted over the same journals, with their
//! surroundings. The controllers are in `lives`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use agent::{
    Agent, Parts,
    firewall::{Grounds, Rules, memory::MemoryFirewall},
    journal::{Feed, Phase, Pools, Record, memory::MemoryJournal},
    load::HostLoad,
    pve::{
        Mark, Pve,
        fake::{FakeCluster, Guest, Pace},
    },
    saga::Faults,
    sandbox::{Bridge, Lifetimes, Limits, Options, Probe, Template},
};
use controller::store::{Token, memory::Memory as Store};
use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    scope::Scopes,
    spec::Size,
    token::Format,
};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    access,
    calls::Memory,
    chance::Chance,
    clock::SimClock,
    doors::Doors,
    lives::{Knows, Life},
    mutant::{Mutant, Mutation},
    net::Net,
    operator,
    watch::Watch,
    weather::{self, SlowDisk, StoreDisk},
};

/// Snapshot of all sandboxes.
pub(crate) const SNAPSHOT: &str = "base_v1";
/// A foreign container within our range of vmids, with our host name pattern.
const FOREIGN: u32 = 100_001;
/// An operator's clone of a sandbox, with its mark.
const COPY: u32 = 200_002;
/// A foreign container with a mark for its own vmid that no journal knows.
pub(crate) const STRANGER: u32 = 300_003;
/// Address of [`STRANGER`], from the pool of its node.
pub(crate) const STRANGER_IP: Ipv4Addr = Ipv4Addr::new(10, 100, 3, 3);
/// Disk number of an operator's volume, among those of its vmid.
const STRAY_DISK: u32 = 77;
/// Number of vmids of a node.
pub(crate) const VMIDS: u32 = 1000;

/// A node with its agent.
pub(crate) struct Host {
    pub(crate) name: NodeName,
    number: u8,
    pub(crate) journal: Arc<MemoryJournal>,
    pub(crate) clock: SimClock,
    /// Factor by which the disk is slower than usual.
    pub(crate) slow: Arc<AtomicU32>,
    /// Rules of the host; they outlive its agent, and end with its power.
    pub(crate) firewall: Arc<MemoryFirewall>,
    agent: Option<(Arc<Agent>, JoinHandle<()>)>,
}

impl Host {
    /// Returns the running agent.
    pub(crate) fn agent(&self) -> Option<&Arc<Agent>> {
        self.agent.as_ref().map(|(agent, _)| agent)
    }
}

pub(crate) struct Cluster {
    pub(crate) pve: FakeCluster,
    pub(crate) net: Arc<Net>,
    pub(crate) hosts: Vec<Host>,
    /// Handle on the store of the last controller.
    pub(crate) store: Store,
    pub(crate) backup: Option<Store>,
    pub(crate) token: String,
    /// Token of a team that has no sandbox.
    pub(crate) other_token: String,
    /// The same tokens in the form that a store keeps.
    pub(crate) tokens_kept: [Token; 2],
    pub(crate) watch: Arc<Watch>,
    /// Foreign containers, as they were created.
    pub(crate) foreign: BTreeMap<Vmid, Guest>,
    /// Foreign volumes that carry a vmid of ours.
    pub(crate) strays: BTreeMap<String, Vmid>,
    /// Sandboxes that ran when their node lost power, without a request since.
    pub(crate) rebooted: BTreeSet<String>,
    /// Living controllers, the newest last.
    pub(crate) lives: Vec<Life>,
    /// Whether a controller began with less knowledge than the one before.
    pub(crate) forgot: bool,
    /// Number of controllers ever started.
    pub(crate) begun: u64,
    /// Clock of the controllers.
    pub(crate) clock: SimClock,
    pub(crate) seed: u64,
    /// Random source for the helpers in sandboxes.
    doors: Arc<Chance>,
    mutation: Option<Mutation>,
}

impl Cluster {
    pub(crate) async fn new(seed: u64, mutant: Option<&Mutant>) -> Self {
        let mutation = mutant.map(|mutant| mutant.mutation);
        let names: Vec<NodeName> =
            (1..=3).map(|n| format!("n{n}").parse().expect("a node name")).collect();
        let pve = FakeCluster::new(&names, Pace::RECORDED, seed);
        pve.set_shared(true);
        if let Some(Mutation::Pve(mutation)) = mutation {
            pve.mutation(mutation);
        }
        let (clocks, wall_alone) = (Chance::new(seed, 99), mutation == Some(Mutation::WallAlone));
        let mut hosts = Vec::new();
        for (number, name) in (1u8..).zip(names) {
            pve.add_template(&name, vmid(9000 + u32::from(number)));
            let slow = Arc::new(AtomicU32::new(1));
            let chance = Chance::new(seed, 100 + u64::from(number));
            let disk = SlowDisk { chance, slow: slow.clone() };
            let clock = SimClock::new(weather::skew(&clocks), wall_alone);
            let journal = MemoryJournal::new(format!("j{number}"), pools(number), Arc::new(disk));
            let journal = match mutation {
                Some(Mutation::Journal(mutation)) => journal.lapsing(mutation),
                Some(_) | None => journal,
            };
            let journal = Arc::new(journal);
            let firewall = Arc::default();
            hosts.push(Host { name, number, journal, clock, slow, firewall, agent: None });
        }
        let watch = Arc::new(Watch::default());
        watch.clones(&pve, hosts.iter().map(|h| (h.name.clone(), h.journal.clone())).collect());
        let store = Store::on(Arc::new(StoreDisk(Chance::new(seed, 98))));
        let store = match mutation {
            Some(Mutation::Store(mutation)) => store.lapsing(mutation),
            Some(_) | None => store,
        };
        let issued = [("red", Scopes::ALL), ("blue", Scopes::SANDBOX)].map(|(team, scopes)| {
            let order = controller::token::Order::new(team.parse().expect("team"), scopes);
            controller::token::issue(order, 1)
        });
        let [token, other_token] = issued.each_ref().map(|issued| issued.text(Format::Plain));
        let mut cluster = Self {
            pve,
            net: Arc::new(Net::new(seed)),
            hosts,
            store,
            backup: None,
            token,
            other_token,
            tokens_kept: issued.map(|issued| issued.token),
            watch,
            foreign: BTreeMap::new(),
            strays: BTreeMap::new(),
            rebooted: BTreeSet::new(),
            lives: Vec::new(),
            forgot: false,
            begun: 0,
            clock: SimClock::new(weather::skew(&clocks), false),
            seed,
            doors: Arc::new(Chance::new(seed, 97)),
            mutation,
        };
        cluster.add_somebodys(0, vmid(FOREIGN), None);
        cluster.add_somebodys(1, vmid(COPY), Some(vmid(200_000)));
        cluster.add_somebodys(2, vmid(STRANGER), Some(vmid(STRANGER)));
        cluster.start_the_dead().await;
        cluster.start_controller(Knows::All).await;
        cluster
    }

    /// Adds a foreign container on a node, with a mark for the vmid `marked` if that is given.
    pub(crate) fn add_somebodys(&mut self, host: usize, number: Vmid, marked: Option<Vmid>) {
        let mut guest = operator::somebodys(&self.hosts[host].name, number);
        if let Some(marked) = marked {
            let mark = Mark {
                sandbox_id: SandboxId::new(1, &[7; 10]),
                vmid: marked,
                attempt: 1,
                team: "red".parse().expect("a team"),
                request_id: "somebodys".parse().expect("a request_id"),
            };
            guest.config.set_description(&mark.to_string()).expect("a mark is short");
            if number == vmid(STRANGER) {
                let net = format!("name=eth0,bridge=vmbr0,ip={STRANGER_IP}/24");
                guest.config.set("net0", &net).expect("a line");
            }
        }
        self.pve.add_guest(&guest.node, number, guest.config.clone(), false);
        self.foreign.insert(number, guest);
    }

    /// Adds an operator's volume under a vmid.
    pub(crate) fn allocate(&mut self, node: &NodeName, number: Vmid) {
        // A disk number that no clone uses: with equal names the owner could not be told.
        self.strays.insert(self.pve.alloc(node, number, STRAY_DISK), number);
    }

    /// Replaces one of our containers by a foreign one. Returns `None` while an operation works on
    /// the container.
    pub(crate) fn take_out(&mut self, number: Vmid) -> Option<Guest> {
        let node = self.pve.guests().remove(&number)?.node;
        let theirs = operator::somebodys(&node, number);
        let was = self.pve.replace(number, theirs.clone())?;
        self.foreign.insert(number, theirs);
        Some(was)
    }

    /// Puts our container back, stopped.
    pub(crate) async fn put_back(&mut self, number: Vmid, was: Guest) {
        self.foreign.remove(&number);
        let until = tokio::time::Instant::now() + Duration::from_secs(300);
        // Releases a hanging operation.
        while self.pve.replace(number, was.clone()).is_none() {
            assert!(tokio::time::Instant::now() < until, "{number} is busy for ever");
            self.pve.release();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Checks the invariants that must hold at every moment.
    pub(crate) async fn look(&self, memory: &Memory) {
        let (mut vmids, mut ips) = (BTreeMap::new(), BTreeMap::new());
        for host in &self.hosts {
            let records = host.journal.all().await.expect("a journal");
            for record in &records {
                self.watch.ended(record, memory, &host.clock);
                for wrong in access::too_open(record, memory) {
                    self.watch.wrong(wrong);
                }
            }
            for record in records.into_iter().filter(|record| !record.phase.ended()) {
                let other = vmids.insert(record.vmid, record.id);
                // A moving sandbox is in both journals until the first node has dropped it.
                if let Some(other) = other.filter(|other| *other != record.id) {
                    self.watch
                        .wrong(format!("I3: {} is {other}'s and {}'s", record.vmid, record.id));
                }
                let Some(ip) = record.ip else { continue };
                if ip == STRANGER_IP {
                    self.watch.wrong(format!("I3: {ip} is {STRANGER}'s and {}'s", record.id));
                }
                if let Some(other) = ips.insert(ip, record.id) {
                    self.watch.wrong(format!("I3: {ip} is {other}'s and {}'s", record.id));
                }
            }
        }
        let guests = self.pve.guests();
        let volumes = self.pve.volumes();
        for host in &self.hosts {
            let known = host.journal.node().await.expect("a journal");
            if known.is_some_and(|node| node.number != u32::from(host.number)) {
                self.watch.wrong(format!("I3: {} takes itself for another node", host.name));
            }
            let records = host.journal.all().await.expect("a journal");
            let rules = host.firewall.rules();
            for record in records.into_iter().filter(|record| !record.phase.ended()) {
                // PVE removes a container's volume before it checks whether it can remove the rest.
                let whole = |guest: &&Guest| {
                    guest.node == host.name
                        && guest.config.rootfs().is_some()
                        && guest.config.mark() == Some(record.mark())
                };
                let standing = guests.get(&record.vmid).filter(whole);
                let stands = standing.is_some();
                let place = (host.name.clone(), record.vmid);
                // Before that, the agent does not know whether the container is the sandbox's.
                let is_made = !record.phase.is_creation() || record.progress.is_past_clone();
                let runs = is_made && standing.is_some_and(|guest| guest.pid.is_some());
                let has_it = |rules: &Rules| rules.sandboxes.contains_key(&record.vmid);
                if runs && !rules.as_ref().is_some_and(has_it) {
                    let (id, phase) = (record.id, record.phase);
                    self.watch.wrong(format!("I5: {id} is {phase:?}, and runs without its rules"));
                }
                if stands && volumes.get(&place).is_none_or(BTreeSet::is_empty) {
                    self.watch.wrong(format!("I2: {} has lost its volume, and stands", record.id));
                }
            }
        }
        for (number, was) in &self.foreign {
            if guests.get(number) != Some(was) {
                self.watch.wrong(format!("I8: {number}, which is not ours, was touched"));
            }
        }
        let volumes: BTreeSet<String> = self.pve.volumes().into_values().flatten().collect();
        for gone in self.strays.keys().filter(|stray| !volumes.contains(*stray)) {
            self.watch.wrong(format!("I8: {gone}, which is not ours, was removed"));
        }
    }

    /// Starts the agents that do not run. An agent whose journal cannot be written fails to start
    /// and is started again later, as by systemd.
    pub(crate) async fn start_the_dead(&mut self) {
        for index in 0..self.hosts.len() {
            if self.hosts[index].agent.is_none() {
                self.start_agent(index).await;
            }
        }
        self.note_replaced();
    }

    async fn start_agent(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if self.mutation == Some(Mutation::Reopened) {
            access::reopen(&host.journal).await;
        }
        if self.mutation == Some(Mutation::LateRules) {
            host.firewall.set_late();
        }
        let load = HostLoad {
            cores: 8.0,
            memory_total: 64 << 30,
            memory_available: 48 << 30,
            ..HostLoad::default()
        };
        let pve: Arc<dyn Pve> = self.pve.node(&host.name);
        let parts = Parts {
            sandboxes: options(host.number),
            reconcile: agent::reconcile::Options {
                period: match self.mutation {
                    Some(Mutation::Asleep) => Duration::from_secs(24 * 3600),
                    Some(_) | None => agent::reconcile::Options::default().period,
                },
                ..agent::reconcile::Options::default()
            },
            pve,
            journal: host.journal.clone(),
            clock: Arc::new(host.clock.clone()),
            host_load: Box::new(move |_, _| load),
            shims: Arc::new(Doors {
                pve: self.pve.clone(),
                watch: self.watch.clone(),
                clock: host.clock.clone(),
                chance: Arc::clone(&self.doors),
                mutation: self.mutation,
            }),
            dhcp: None,
            isolation: Some((host.firewall.clone(), grounds(host.number))),
            resolver: None,
            faults: Faults {
                skip_undos: self.mutation == Some(Mutation::SkippedUndo),
                ignore_cancels: self.mutation == Some(Mutation::IgnoredCancel),
                ..Faults::default()
            },
        };
        let agent = match Agent::start(parts).await {
            Ok(agent) => Arc::new(agent),
            Err(error) => {
                assert!(host.journal.is_failing(), "an agent does not start: {error}");
                return;
            }
        };
        let incoming = ReceiverStream::new(self.net.listen(&host.name));
        let served = agent.clone();
        let serving = tokio::spawn(async move {
            if let Err(error) = served.serve(incoming).await {
                panic!("an agent's server ended: {error}");
            }
        });
        host.agent = Some((agent, serving));
    }

    /// Kills an agent with SIGKILL: its unsynced writes are lost, `pct` continues.
    pub(crate) async fn kill_agent(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if let Some((agent, serving)) = host.agent.take() {
            host.journal.crash();
            agent.kill().await;
            serving.abort();
        }
    }

    /// Cuts the power of a node: ends its agent, its `pct` processes and its containers.
    pub(crate) async fn power_cut(&mut self, index: usize) {
        self.kill_agent(index).await;
        let (guests, records) = (self.pve.guests(), self.hosts[index].journal.all().await);
        let runs = |record: &Record| {
            let of_it = |guest: &&Guest| guest.config.mark() == Some(record.mark());
            let guest = guests.get(&record.vmid).filter(of_it);
            record.phase == Phase::Running && guest.is_some_and(|guest| guest.pid.is_some())
        };
        let ran = records.expect("a journal").into_iter().filter(runs);
        self.rebooted.extend(ran.map(|record| record.id.to_string()));
        self.pve.crash(&self.hosts[index].name);
        self.hosts[index].firewall = Arc::default();
        self.hosts[index].clock.boot();
    }
}

pub(crate) fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

fn grounds(number: u8) -> Grounds {
    Grounds {
        gateway: [10, 100, number, 1].into(),
        name_servers: Default::default(),
        dhcp_server: None,
        closed: Default::default(),
        reach: Default::default(),
        connections: None,
        name_connections: None,
    }
}

fn pools(number: u8) -> Pools {
    let first = 100_000 * u32::from(number);
    Pools {
        vmids: (vmid(first), vmid(first + VMIDS - 1)),
        addresses: ([10, 100, number, 2].into(), [10, 100, number, 200].into()),
        address_quarantine_ms: 60_000,
    }
}

fn options(number: u8) -> Options {
    Options {
        templates: vec![Template {
            snapshot: SNAPSHOT.parse().expect("snapshot"),
            vmid: vmid(9000 + u32::from(number)),
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
            gateway: [10, 100, number, 1].into(),
            own: Vec::new(),
            dhcp: Default::default(),
        },
        limits: Limits::default(),
        lifetimes: Lifetimes::default(),
        on_reboot: Default::default(),
        labels: Vec::new(),
        number: Some(number.into()),
    }
}
