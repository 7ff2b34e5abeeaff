//! A node: its files, the join command, and an agent over a fake PVE.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc};

use agent::{
    Agent, Parts,
    bridge::Paths,
    certificates::Certificates,
    join::{self, Done, Error, Line},
    journal::{Pools, memory::MemoryJournal},
    load::HostLoad,
    pve::fake::{FakeCluster, Pace},
    revoked::Revoked,
    saga::Faults,
    sandbox::{Bridge, Lifetimes, Limits, Options, exec::shims::NoShims},
};
use daemon::{
    key_files::KeyFiles,
    peer::Peer,
    replace::Access,
    tls::{ClientAuth, Identity, LiveIdentity},
};
use proto::{id::Vmid, name::NodeName};
use tokio::net::TcpListener;
use tokio_stream::StreamExt as _;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) struct Node {
    name: NodeName,
    dir: tempfile::TempDir,
    pub(crate) address: SocketAddr,
    revoked: Arc<Revoked>,
}

impl Node {
    /// Makes a bare node: PVE knows its name, and nothing else is there.
    pub(crate) fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        // Free until the agent listens.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let revoked = Arc::new(Revoked::load(dir.path().join("revoked")).expect("no list"));
        let node = Self { name: name.parse().expect("a name"), dir, address, revoked };
        for part in ["pve", "net", "proc/net"] {
            fs::create_dir_all(node.file(part)).expect("made");
        }
        let members = format!("{{\"nodename\":\"{name}\",\"version\":0}}");
        fs::write(node.file("pve/.members"), members).expect("written");
        let interfaces = format!("source {}/*\n", node.file("interfaces.d").display());
        fs::write(node.file("interfaces"), interfaces).expect("written");
        let path = |file: &str| node.file(file).display().to_string();
        let tls = |name: &str| {
            let path = |file: &str| path(&format!("tls/{name}{file}"));
            let (ca, cert, key) = (path("ca.crt"), path("node.crt"), path("node.key"));
            format!("ca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\n")
        };
        let config = format!(
            "# the operator's own\nlisten = \"{address}\"\n[pve]\nroot = \"{}\"\nproc = \"{}\"\n\
             [tls]\n{}[ingress.tls]\n{}",
            path("pve"),
            path("proc"),
            tls(""),
            tls("ingress-"),
        );
        fs::write(node.file("agent.toml"), config).expect("written");
        node
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn config(&self) -> String {
        fs::read_to_string(self.file("agent.toml")).expect("read")
    }

    pub(crate) fn certificate(&self) -> String {
        fs::read_to_string(self.file("tls/node.crt")).unwrap_or_default()
    }

    /// Returns the certificate of the ingress hop, as another node's Caddy tells its agent.
    pub(crate) fn hop_certificate(&self) -> String {
        let pem = fs::read_to_string(self.file("tls/ingress-node.crt")).expect("read");
        // The first certificate of the file: PEM is the base64 of its DER, in lines.
        let lines = pem.lines().skip(1).take_while(|line| !line.starts_with("-----"));
        lines.collect()
    }

    /// True when this node's agent refuses a peer with this certificate.
    pub(crate) fn refuses(&self, certificate: &str) -> bool {
        self.revoked.refuses(certificate.as_bytes())
    }

    /// Has this node's agent refuse all certificates of a node, as a controller told it that is lost.
    pub(crate) fn has_revoked(&self, node: &NodeName) {
        self.revoked.replace([(node.clone(), 0)].into()).expect("written");
    }

    pub(crate) fn name(&self) -> &NodeName {
        &self.name
    }

    /// Returns the files of its network.
    pub(crate) fn bridge(&self) -> Paths {
        Paths {
            interfaces: self.file("interfaces"),
            interfaces_d: self.file("interfaces.d"),
            etc: self.file("etc"),
            config: self.file("agent.toml"),
        }
    }

    /// Runs the join command.
    pub(crate) async fn join(&self, line: &Line) -> Result<Vec<String>, Error> {
        let Done(done) = join::run(line, &self.bridge(), &self.file("net")).await?;
        Ok(done)
    }

    /// Starts an agent with the files of the join; it ends when the guard is dropped.
    pub(crate) async fn serve(&self) -> DropGuard {
        let files = |name: &str, access| KeyFiles {
            certificate: self.file(&format!("tls/{name}node.crt")),
            key: self.file(&format!("tls/{name}node.key")),
            access,
        };
        let (own, hop) = (files("", Access::PRIVATE), files("ingress-", Access::PRIVATE));
        own.recover().expect("whole");
        let ca = self.file("tls/ca.crt");
        let identity = Identity::load(&own.certificate, &own.key, &ca).expect("identity");
        let live = LiveIdentity::new(&identity).expect("certificate and key fit");
        let server = live.server(ClientAuth::Required).expect("TLS");
        let agent = Agent::start(self.parts()).await.expect("an agent");
        let node = self.name.to_string();
        agent.keep_revoked(Arc::clone(&self.revoked));
        agent.renew(Arc::new(Certificates::new(node, (own, Some(hop)), ca, live)));
        let listener = self.listen().await;
        let stop = CancellationToken::new();
        let incoming = daemon::listen::tls(listener, server, stop.clone());
        let controller = |conn: &std::io::Result<daemon::listen::Conn>| {
            conn.as_ref().map_or(true, |conn| *conn.peer() == Peer::Controller)
        };
        let (incoming, stopped) = (incoming.filter(controller), stop.clone());
        tokio::spawn(async move {
            let served = stopped.run_until_cancelled(agent.serve(incoming)).await;
            agent.kill().await;
            if let Some(Err(error)) = served {
                panic!("the agent's server ended: {error}");
            }
        });
        stop.drop_guard()
    }

    /// Listens on the node's port, which the agent before may still be leaving.
    async fn listen(&self) -> TcpListener {
        for _ in 0..100 {
            if let Ok(listener) = TcpListener::bind(self.address).await {
                return listener;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("{} does not become free", self.address);
    }

    fn parts(&self) -> Parts {
        let pve = FakeCluster::new(std::slice::from_ref(&self.name), Pace::default(), 1);
        let vmid = |number| Vmid::try_from(number).expect("in range");
        // As `vmids.stripe` in agent.toml gives each node that is in no cluster numbers of its own.
        let number = self.name.as_str().trim_start_matches('n').parse::<u32>();
        let first = 100_000 + 1000 * number.expect("n and a number");
        let pools = Pools {
            vmids: (vmid(first), vmid(first + 999)),
            addresses: ([10, 100, 1, 2].into(), [10, 100, 1, 254].into()),
            address_quarantine_ms: 60_000,
        };
        let disk = Arc::new(daemon::disk::SoundDisk);
        let load = HostLoad {
            cores: 8.0,
            memory_total: 1 << 35,
            memory_available: 1 << 34,
            ..HostLoad::default()
        };
        Parts {
            sandboxes: Options {
                templates: Vec::new(),
                network: Bridge {
                    name: "vmbr0".into(),
                    prefix: 24,
                    gateway: [10, 100, 1, 1].into(),
                    own: Vec::new(),
                    dhcp: Default::default(),
                },
                limits: Limits::default(),
                lifetimes: Lifetimes::default(),
                on_reboot: Default::default(),
                labels: Vec::new(),
                number: None,
            },
            reconcile: agent::reconcile::Options::default(),
            pve: pve.node(&self.name),
            journal: Arc::new(MemoryJournal::new("j1", pools, disk)),
            clock: Arc::new(agent::clock::SystemClock::default()),
            host_load: Box::new(move |_, _| load),
            shims: Arc::new(NoShims),
            dhcp: None,
            isolation: None,
            resolver: None,
            faults: Faults::default(),
        }
    }
}
