//! A node's way in from the web: an agent with many sandboxes over the fake PVE, its route server, and the
//! real Caddy with the rendered configuration. Beside it the same Caddy as a plain proxy.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    time::Duration,
};

use agent::{
    Agent,
    clock::SystemClock,
    ingress::{
        caddy::{self, Proof},
        decide::Rules,
        hold::{Holds, Limits},
        owner_resolver::{OwnerResolver, Sources},
        probe::Probe,
        routes::NodeRoutes,
        server::{self, Ingress},
        settings::{PlainPath, Settings},
        version::Generation,
    },
    name_directory::NameDirectory,
    revoked::Revoked,
    sandbox::access::expose::Reach,
};
use anyhow::{Context as _, Result, ensure};
use proto::{name::Port, visibility::Visibility};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    program,
    stage::{Stage, create, id},
};

/// Domain of the sandboxes.
const DOMAIN: &str = "sbx.test";
/// Port of the peer server, which nobody asks.
const PEER_PORT: u16 = 8481;
/// Sandboxes that are created between two lines of progress.
const FILL: u32 = 1000;
/// Longest start of a Caddy.
const STARTS: Duration = Duration::from_secs(15);

/// A Caddy; it ends when dropped.
#[derive(Debug)]
pub(super) struct Caddy {
    child: Child,
    /// Address for clients.
    pub(super) address: SocketAddr,
}

impl Caddy {
    async fn start(
        program: &Path,
        config: &Value,
        dir: &Path,
        address: SocketAddr,
        env: &[(&str, &str)],
    ) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join("caddy.json");
        std::fs::write(&file, config.to_string())?;
        let started = Self { child: program::run(program, &file, dir, env), address };
        let deadline = Instant::now() + STARTS;
        while TcpStream::connect(address).await.is_err() {
            let log = || std::fs::read_to_string(dir.join("caddy.log")).unwrap_or_default();
            ensure!(Instant::now() < deadline, "Caddy did not start: {}", log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(started)
    }

    /// Starts one that sends every request to one address, and asks nobody, as Debian's own unit starts it.
    pub(super) async fn plain(program: &Path, dir: &Path, upstream: SocketAddr) -> Result<Self> {
        let address = program::at(2, 8480);
        let proxy =
            json!({ "handler": "reverse_proxy", "upstreams": [{ "dial": upstream.to_string() }] });
        let config = json!({
            "admin": { "disabled": true, "config": { "persist": false } },
            "apps": { "http": { "servers": { "plain": {
                "listen": [address.to_string()],
                "automatic_https": { "disable": true },
                "routes": [{ "handle": [proxy] }],
            } } } },
        });
        Self::start(program, &config, dir, address, &[]).await
    }
}

impl Drop for Caddy {
    fn drop(&mut self) {
        // It may have ended already; who measures it has seen that.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An agent with sandboxes whose addresses are on the loopback, and its route server.
#[derive(Debug)]
pub(super) struct Node {
    stage: Stage,
    agent: Arc<Agent>,
    settings: Settings,
    proof: Proof,
    known: u32,
    _stop: DropGuard,
}

impl Node {
    pub(super) async fn start() -> Result<Self> {
        let [a, b, ..] = program::ip(0).octets();
        // Not the addresses of the Caddys.
        let address = |c, d| Ipv4Addr::new(a, b ^ 0x80, c, d);
        let stage = Stage::with_addresses((address(0, 2), address(80, 254)))?;
        let agent = stage.start_in_memory().await?;
        let dir = stage.state.path();
        let plain = |path: PathBuf| PlainPath::try_from(path.as_path());
        let settings = Settings {
            domain: DOMAIN.parse()?,
            public: vec![program::at(1, 8480)],
            route_socket: plain(dir.join("route.sock"))?,
            https: true,
            frames: true,
            cors: true,
            peers: None,
            secure: None,
            access_log: Some(plain(dir.join("access.log"))?),
            generation: Generation::Before,
        };
        let proof = Proof::ensure(&dir.join("caddy.json"))?;
        let clock = Arc::new(SystemClock::default());
        let sources =
            Sources { root: dir.to_owned(), memory: dir.join("owners"), peer_port: PEER_PORT };
        let owners = OwnerResolver::new(stage.pve.node(&stage.name), clock.clone(), sources);
        let names = Arc::new(NameDirectory::load(dir.join("names")));
        let routes = NodeRoutes::new(Arc::clone(agent.sandboxes()), Arc::new(owners), names);
        let ingress = Ingress {
            routes: Arc::new(routes),
            rules: Rules {
                domain: settings.domain.clone(),
                parents: Vec::new(),
                cors: settings.cors,
            },
            clock,
            proof: proof.clone(),
            probe: Probe::default(),
            revoked: Arc::new(Revoked::load(dir.join("revoked"))?),
            metrics: Arc::default(),
            holds: Holds::new(Limits::default()),
        };
        let stop = CancellationToken::new();
        let listener = server::listen(Path::new(settings.route_socket.as_str()), None)?;
        tokio::spawn(server::serve(listener, Arc::new(ingress), stop.clone()));
        Ok(Self { stage, agent, settings, proof, known: 0, _stop: stop.drop_guard() })
    }

    pub(super) fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    pub(super) fn dir(&self) -> &Path {
        self.stage.state.path()
    }

    /// Lets connections to sandboxes be cut, as those to real ones are.
    pub(super) fn reachable(&self) {
        self.stage.pve.set_entry("/usr/bin/env");
    }

    /// Creates sandboxes until there are so many.
    pub(super) async fn fill(&mut self, known: u32) -> Result<()> {
        while self.known < known {
            let next = known.min(self.known + FILL);
            create(&self.agent, self.known..next).await?;
            self.known = next;
            eprintln!("{next} of {known} sandboxes");
        }
        Ok(())
    }

    /// Returns the address of a sandbox.
    pub(super) fn address(&self, number: u32) -> Result<IpAddr> {
        let live = self.agent.sandboxes().live();
        let record = live.iter().find(|record| record.id == id(number)).context("no sandbox")?;
        Ok(record.lease().context("it has no address")?.into())
    }

    /// Opens a port of a sandbox to all, and returns its host.
    pub(super) async fn expose(&self, number: u32, port: u16) -> Result<String> {
        let reach = Reach { wanted: Some(Visibility::Public), default: Visibility::Public };
        let opened = Port::try_from(u32::from(port))?;
        self.agent.sandboxes().expose(&id(number), "web".parse()?, opened, reach).await?;
        Ok(format!("port-{port}-{}.{DOMAIN}", id(number)))
    }

    /// Closes the port that [`Self::expose`] has opened.
    pub(super) async fn hide(&self, number: u32) -> Result<()> {
        self.agent.sandboxes().hide(&id(number), "web".parse()?).await?;
        Ok(())
    }

    /// Starts a Caddy as the unit of the ingress does, with the configuration that the agent renders for it.
    pub(super) async fn caddy(&self, program: &Path) -> Result<Caddy> {
        let generation = program::version(program).generation();
        let settings = Settings { generation, ..self.settings.clone() };
        let config = serde_json::from_str(&caddy::text(&settings, &self.proof))?;
        let address = *settings.public.first().context("an address")?;
        Caddy::start(program, &config, &self.dir().join("ours"), address, &program::memory()).await
    }

    /// Ends the agent.
    pub(super) async fn end(self) {
        self.agent.kill().await;
    }
}
