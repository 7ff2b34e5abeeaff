//! A node's ingress: the agent's route server and Caddy.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use agent::{
    clock::SystemClock,
    ingress::{
        OpenPort, Owner, Routes, State, Target,
        caddy::{self, Proof},
        decide::Rules,
        hold::{Holds, Limits},
        probe::Probe,
        server::{self, Ingress},
        settings::{Peers, PlainPath, Settings},
        version::Generation,
    },
    journal::AccessKey,
    revoked::Revoked,
};
use proto::{
    host::FullName,
    id::{SandboxId, SandboxRef, Vmid},
    name::Port,
    visibility::Visibility,
};
use tokio::{net::TcpStream, runtime::Runtime, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::program;
pub(crate) use crate::program::{at, ip};

/// Domain of every test.
pub(crate) const DOMAIN: &str = "sbx.test";

/// Returns the Caddy to test; `None`, with a message, if the tests are skipped.
pub(crate) fn caddy() -> Option<PathBuf> {
    let named = std::env::var_os("PVE_SANDBOX_CADDY").map(PathBuf::from);
    let found = named.unwrap_or_else(|| PathBuf::from(program::DEBIAN));
    if std::env::var_os("PVE_SANDBOX_SKIP_INGRESS_TESTS").is_some_and(|value| value == "1") {
        eprintln!("skipped: PVE_SANDBOX_SKIP_INGRESS_TESTS=1");
        return None;
    }
    assert!(
        found.is_file(),
        "no Caddy at {}: install Debian's package `caddy`, name another one by PVE_SANDBOX_CADDY, or skip by \
         PVE_SANDBOX_SKIP_INGRESS_TESTS=1",
        found.display()
    );
    Some(found)
}

/// Returns the form of the configuration for the Caddy to test.
pub(crate) fn generation() -> Generation {
    program::version(&caddy().expect("not skipped")).generation()
}

/// Returns from the test if the tests are skipped.
macro_rules! need_caddy {
    () => {
        if $crate::node::caddy().is_none() {
            return;
        }
    };
}
pub(crate) use need_caddy;

/// An in-memory route table.
#[derive(Debug, Default)]
pub(crate) struct Table {
    local: Mutex<HashMap<Vmid, Target>>,
    owners: Mutex<HashMap<Vmid, Owner>>,
    /// Names that the controller told.
    names: Mutex<HashMap<FullName, SandboxId>>,
    wakes: AtomicU32,
    /// Time that a wake takes, ms; 0 stands for 50.
    thaw_ms: AtomicU32,
    /// Uses that were recorded.
    uses: AtomicU32,
    /// Ports that a container listens on for itself.
    loopback: Mutex<BTreeSet<(Vmid, u16)>>,
    /// Looks into containers for such ports.
    looks: AtomicU32,
}

#[async_trait::async_trait]
impl Routes for Table {
    fn local(&self, sandbox: SandboxRef) -> Option<Target> {
        let local = self.local.lock().expect("no panic");
        match sandbox {
            SandboxRef::Vmid(vmid) => local.get(&vmid).cloned(),
            SandboxRef::Id(id) => local.values().find(|target| target.id == id).cloned(),
        }
    }

    fn named(&self, name: &FullName) -> Option<SandboxId> {
        let local = self.local.lock().expect("no panic");
        let own = local.values().find(|target| target.name.as_ref() == Some(name));
        let own = own.map(|target| target.id);
        own.or_else(|| self.names.lock().expect("no panic").get(name).copied())
    }

    async fn owner(&self, sandbox: SandboxRef) -> Owner {
        let owners = self.owners.lock().expect("no panic");
        let vmid = match sandbox {
            SandboxRef::Vmid(vmid) => Some(vmid),
            // Only by the names that were told: the other ids of other nodes are not known.
            SandboxRef::Id(of) => {
                let is_told = self.names.lock().expect("no panic").values().any(|id| *id == of);
                owners.keys().copied().find(|vmid| is_told && id(vmid.get()) == of)
            }
        };
        vmid.and_then(|vmid| owners.get(&vmid).cloned()).unwrap_or(Owner::Nobody)
    }

    fn used(&self, _: &SandboxId) {
        self.uses.fetch_add(1, Ordering::Relaxed);
    }

    async fn on_loopback(&self, vmid: Vmid, port: u16) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.loopback.lock().expect("no panic").contains(&(vmid, port))
    }

    async fn wake(&self, sandbox: SandboxRef) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
        // A thaw takes a moment, too.
        let thaw_ms = match self.thaw_ms.load(Ordering::Relaxed) {
            0 => 50,
            thaw_ms => u64::from(thaw_ms),
        };
        tokio::time::sleep(Duration::from_millis(thaw_ms)).await;
        let mut local = self.local.lock().expect("no panic");
        let named = |target: &&mut Target| match sandbox {
            SandboxRef::Vmid(vmid) => target.vmid == vmid,
            SandboxRef::Id(id) => target.id == id,
        };
        if let Some(target) = local.values_mut().find(named) {
            target.state = State::Running;
        }
    }
}

pub(crate) fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("a vmid")
}

/// Returns the id of the sandbox in a container.
pub(crate) fn id(number: u32) -> SandboxId {
    let [a, b, c, d] = number.to_be_bytes();
    SandboxId::new(1_700_000_000_000, &[a, b, c, d, 0, 0, 0, 0, 0, 0])
}

/// Returns the key of the sandbox in a container.
pub(crate) fn key(number: u32) -> AccessKey {
    AccessKey::new([number.to_be_bytes()[3]; 32])
}

/// Page that may use sessions, unless a test names none.
pub(crate) const PARENT: &str = "https://app.example.com";

impl Table {
    /// Returns the number of wakes.
    pub(crate) fn wakes(&self) -> u32 {
        self.wakes.load(Ordering::Relaxed)
    }

    /// Returns the number of uses.
    pub(crate) fn uses(&self) -> u32 {
        self.uses.load(Ordering::Relaxed)
    }

    /// Returns the number of looks into containers.
    pub(crate) fn looks(&self) -> u32 {
        self.looks.load(Ordering::Relaxed)
    }

    /// Sets the time that a wake takes.
    pub(crate) fn thaw_in(&self, time: Duration) {
        let thaw_ms = u32::try_from(time.as_millis()).expect("short");
        self.thaw_ms.store(thaw_ms, Ordering::Relaxed);
    }

    /// Makes a container listen on a port for itself alone.
    pub(crate) fn listen_on_loopback(&self, number: u32, port: u16) {
        self.loopback.lock().expect("no panic").insert((vmid(number), port));
    }

    /// Adds a sandbox with open ports.
    pub(crate) fn put(&self, number: u32, ip: Ipv4Addr, state: State, ports: &[u16]) {
        let port = |port: &u16| Port::try_from(u32::from(*port)).expect("a port");
        let target = Target {
            id: id(number),
            vmid: vmid(number),
            team: "red".parse().expect("a team"),
            name: None,
            state,
            ip: Some(IpAddr::V4(ip)),
            ports: ports.iter().map(|number| (port(number), OpenPort::PUBLIC)).collect(),
            main: None,
            key: Some(key(number)),
        };
        self.local.lock().expect("no panic").insert(vmid(number), target);
    }

    /// Says who reaches the open ports of a sandbox, and the generation of their credentials.
    pub(crate) fn guard(&self, number: u32, visibility: Visibility, generation: u64) {
        let mut local = self.local.lock().expect("no panic");
        let target = local.get_mut(&vmid(number)).expect("a sandbox");
        target.ports.values_mut().for_each(|open| *open = OpenPort { visibility, generation });
    }

    /// Gives a sandbox to a team; without this it is red's.
    pub(crate) fn give(&self, number: u32, team: &str) {
        let mut local = self.local.lock().expect("no panic");
        let target = local.get_mut(&vmid(number)).expect("a sandbox");
        target.team = team.parse().expect("a team");
    }

    /// Gives a sandbox a name and a main port.
    pub(crate) fn name(&self, number: u32, name: &str, main: Option<u16>) {
        let mut local = self.local.lock().expect("no panic");
        let target = local.get_mut(&vmid(number)).expect("a sandbox");
        target.name = Some(name.parse().expect("a name"));
        target.main = main.map(|port| Port::try_from(u32::from(port)).expect("a port"));
    }

    /// Makes the controller tell that a name leads to a sandbox.
    pub(crate) fn told(&self, name: &str, number: u32) {
        let name = name.parse().expect("a name");
        self.names.lock().expect("no panic").insert(name, id(number));
    }

    /// Adds a sandbox on another node.
    pub(crate) fn elsewhere(&self, number: u32, owner: Owner) {
        self.owners.lock().expect("no panic").insert(vmid(number), owner);
    }
}

/// The agent's route server, in its own runtime, so that it can be killed.
#[derive(Debug)]
pub(crate) struct Agent {
    runtime: Option<Runtime>,
    stop: CancellationToken,
    revoked: Arc<Revoked>,
}

impl Agent {
    fn start(dir: &Path, table: Arc<Table>, limits: &Limits, rules: &Rules) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let stop = CancellationToken::new();
        let revoked = Arc::new(Revoked::load(dir.join("revoked")).expect("a list"));
        let ingress = Arc::new(Ingress {
            routes: table,
            rules: rules.clone(),
            clock: Arc::new(SystemClock::default()),
            proof: Proof::read(&dir.join("caddy.json")).expect("a proof"),
            probe: Probe::default(),
            revoked: Arc::clone(&revoked),
            metrics: Arc::default(),
            holds: Holds::new(limits.clone()),
        });
        let listener = {
            let _inside = runtime.enter();
            server::listen(&dir.join("route.sock"), None).expect("a socket")
        };
        runtime.spawn(server::serve(listener, ingress, stop.clone()));
        Self { runtime: Some(runtime), stop, revoked }
    }

    /// Stops everything at once, as SIGKILL does.
    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
        self.kill();
    }
}

/// A node with its route server and its Caddy.
#[derive(Debug)]
pub(crate) struct Node {
    /// Address for clients.
    pub(crate) public: SocketAddr,
    /// Address for peers.
    pub(crate) peer: SocketAddr,
    pub(crate) table: Arc<Table>,
    /// Directory of its files.
    pub(crate) dir: PathBuf,
    /// Addresses where its Caddy listens for clients.
    listen: Vec<SocketAddr>,
    /// Bounds of held requests.
    limits: Limits,
    /// Settings of the verdict, with the pages that may use sessions.
    rules: Rules,
    agent: Agent,
    old: Vec<Agent>,
    caddy: Child,
    _temp: tempfile::TempDir,
}

impl Node {
    /// Starts a node without peers; `last` is the last byte of its address.
    pub(crate) async fn start(last: u8) -> Self {
        Self::start_with(last, None, |_| {}).await
    }

    /// Starts a node without peers that holds requests within these bounds.
    pub(crate) async fn holding(last: u8, limits: Limits) -> Self {
        Self::start_within(last, None, limits, |_| {}, |_| {}).await
    }

    /// Starts a node with a change to its settings.
    pub(crate) async fn shaped(
        last: u8,
        pki: Option<&Path>,
        shape: impl FnOnce(&mut Settings),
    ) -> Self {
        Self::start_within(last, pki, Limits::default(), shape, |_| {}).await
    }

    /// Starts a node with the certificates in `pki`, and a change to its configuration.
    pub(crate) async fn start_with(
        last: u8,
        pki: Option<&Path>,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Self {
        Self::start_within(last, pki, Limits::default(), |_| {}, change).await
    }

    async fn start_within(
        last: u8,
        pki: Option<&Path>,
        limits: Limits,
        shape: impl FnOnce(&mut Settings),
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Self {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().to_owned();
        let (public, peer) = (at(last, 8480), at(last, 8481));
        let mut settings = settings(&dir, last, pki);
        shape(&mut settings);
        let config = dir.join("caddy.json");
        let proof = Proof::ensure(&config).expect("a proof");
        let text = caddy::text(&settings, &proof);
        let mut json = serde_json::from_str(&text).expect("it is JSON");
        change(&mut json);
        std::fs::write(&config, json.to_string()).expect("writable");
        let table = Arc::new(Table::default());
        let parents = vec![PARENT.parse().expect("an origin")];
        let rules = Rules { domain: settings.domain.clone(), parents, cors: settings.cors };
        let agent = Agent::start(&dir, Arc::clone(&table), &limits, &rules);
        let caddy = run_caddy(&config, &dir);
        let old = Vec::new();
        let secure = settings.secure.iter().flat_map(|secure| &secure.listen);
        let listen = settings.public.iter().chain(secure).copied().collect();
        let node = Self {
            public,
            peer,
            table,
            dir,
            listen,
            limits,
            rules,
            agent,
            old,
            caddy,
            _temp: temp,
        };
        node.listens().await;
        node
    }

    async fn listens(&self) {
        let deadline = Instant::now() + Duration::from_secs(15);
        for address in &self.listen {
            while TcpStream::connect(address).await.is_err() {
                assert!(Instant::now() < deadline, "Caddy did not start: {}", self.log());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Refuses peers with certificates of this node that were issued before a time; 0: with any.
    pub(crate) fn revoke(&self, node: &str, accepted_from_ms: u64) {
        let node = node.parse().expect("a name");
        self.agent.revoked.replace([(node, accepted_from_ms)].into()).expect("written");
    }

    /// Returns the lines of the access log.
    pub(crate) fn access_log(&self) -> String {
        std::fs::read_to_string(self.dir.join("access.log")).unwrap_or_default()
    }

    /// Returns Caddy's log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("caddy.log")).unwrap_or_default()
    }

    /// Adds a running sandbox on this node.
    pub(crate) fn put(&self, number: u32, address: SocketAddr) {
        let IpAddr::V4(ip) = address.ip() else { panic!("IPv4 only") };
        self.table.put(number, ip, State::Running, &[address.port()]);
    }

    /// Starts the route server again, with no page that may use sessions.
    pub(crate) fn name_no_page(&mut self) {
        self.rules.parents.clear();
        self.restart_agent();
    }

    /// Stops the route server in an orderly way, and starts another one.
    pub(crate) fn restart_agent(&mut self) {
        self.agent.stop.cancel();
        let fresh = Agent::start(&self.dir, Arc::clone(&self.table), &self.limits, &self.rules);
        // The old one still finishes its requests.
        self.old.push(std::mem::replace(&mut self.agent, fresh));
    }

    /// Kills the route server.
    pub(crate) fn kill_agent(&mut self) {
        self.agent.kill();
    }

    /// Starts a route server again.
    pub(crate) fn start_agent(&mut self) {
        self.agent = Agent::start(&self.dir, Arc::clone(&self.table), &self.limits, &self.rules);
    }

    /// Ends Caddy.
    pub(crate) fn kill_caddy(&mut self) {
        self.caddy.kill().expect("a child");
        self.caddy.wait().expect("ended");
    }

    /// Starts Caddy again.
    pub(crate) async fn start_caddy(&mut self) {
        self.caddy = run_caddy(&self.dir.join("caddy.json"), &self.dir);
        self.listens().await;
    }

    /// Returns true while Caddy runs.
    pub(crate) fn caddy_runs(&mut self) -> bool {
        self.caddy.try_wait().expect("a child").is_none()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Caddy may have ended already; a test that needs it has checked that.
        drop(self.caddy.kill());
        drop(self.caddy.wait());
    }
}

/// Returns the settings of a node's Caddy, whose files are in `dir`.
pub(crate) fn settings(dir: &Path, last: u8, pki: Option<&Path>) -> Settings {
    let plain = |path: PathBuf| PlainPath::try_from(path.as_path()).expect("a plain path");
    Settings {
        domain: DOMAIN.parse().expect("a domain"),
        public: vec![at(last, 8480)],
        route_socket: plain(dir.join("route.sock")),
        https: true,
        secure: None,
        frames: true,
        cors: true,
        peers: pki.map(|pki| Peers {
            listen: at(last, 8481),
            ca: plain(pki.join("ca.crt")),
            cert: plain(pki.join("node.crt")),
            key: plain(pki.join("node.key")),
        }),
        access_log: Some(plain(dir.join("access.log"))),
        generation: generation(),
    }
}

/// Speaks first, as a server does that is none of HTTP.
pub(crate) async fn greet(mut stream: TcpStream) {
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"SSH-2.0-x\r\n").await.expect("sent");
}

pub(crate) fn run_caddy(config: &Path, dir: &Path) -> Child {
    program::run(&caddy().expect("not skipped"), config, dir, &program::memory())
}

/// Runs `caddy validate`; returns its output if it refuses.
#[expect(clippy::disallowed_methods, reason = "tests start Caddy themselves")]
pub(crate) fn validate(config: &Path) -> Result<(), String> {
    // Caddy creates its directories there.
    let home = tempfile::tempdir().expect("a directory");
    let output = Command::new(caddy().expect("not skipped"))
        .arg("validate")
        .arg("--config")
        .arg(config)
        .env_clear()
        .env("HOME", home.path())
        .output()
        .expect("Caddy starts");
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Returns the host of a port of the sandbox in a container.
pub(crate) fn host(port: u16, number: u32) -> String {
    format!("port-{port}-vm-{number}.{DOMAIN}")
}

/// Returns the host with the sandbox's id in place of the vmid.
pub(crate) fn host_by_id(port: u16, number: u32) -> String {
    format!("port-{port}-{}.{DOMAIN}", id(number))
}
