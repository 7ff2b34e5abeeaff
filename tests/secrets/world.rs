//! The shipped controller over the shipped agent, in one process: stores on the disk as in production,
//! a fake PVE, and real shims and helpers, for which this machine is the sandbox.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use agent::{
    Agent,
    journal::{Pools, Record, SqliteJournal},
    load::HostLoad,
    pve::{
        Pve,
        fake::{FakeCluster, Pace},
    },
    saga::Faults,
    sandbox::{Bridge, Lifetimes, Limits, Options, Probe, Template, exec::shims::Shims},
    shim,
    sys::image,
};
use controller::{
    Controller,
    audit::Audit,
    ca::{Lives, Signer},
    clock::{SystemClock, SystemRandom},
    enrolment::Settings,
    node::Lane,
    ssh,
    store::{AccessStore as _, sqlite::Sqlite},
    token,
};
use daemon::{flow::Leg, peer::Peer};
use proto::{id::Vmid, name::NodeName, scope::Scopes, spec::Size, token::Format};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, server::Connected};

/// Snapshot of all sandboxes.
pub(crate) const SNAPSHOT: &str = "base_v1";
/// Template of that snapshot.
const TEMPLATE: u32 = 9001;

pub(crate) struct World {
    pub(crate) dir: PathBuf,
    pub(crate) token: String,
    pub(crate) shims: Arc<Here>,
    pub(crate) audit: Audit,
    dial: mpsc::Sender<io::Result<DuplexStream>>,
    controller: Controller,
    _agent: Arc<Agent>,
}

impl World {
    pub(crate) async fn new(dir: &Path) -> Self {
        for name in ["node", "shims", "controller", "inside"] {
            std::fs::create_dir(dir.join(name)).expect("a directory");
        }
        let shims = Arc::new(Here { dir: dir.join("shims"), closed: AtomicBool::new(false) });
        let name: NodeName = "n1".parse().expect("a name");
        let agent = Arc::new(node(&name, &dir.join("node"), Arc::clone(&shims)).await);
        let (door, incoming) = mpsc::channel(16);
        let served = Arc::clone(&agent);
        tokio::spawn(async move { served.serve(ReceiverStream::new(incoming)).await });

        let store = Sqlite::open(&dir.join("controller/controller.db")).expect("a store");
        let order = token::Order::new("red".parse().expect("a team"), Scopes::ALL);
        let issued = token::issue(order, 1);
        store.add_token(issued.token.clone()).await.expect("stored");
        let (clock, options) = (Arc::new(SystemClock), controller::audit::Options::default());
        let audit = Audit::open(&dir.join("controller/audit"), clock, options).await;
        let audit = audit.expect("an audit log");
        let controller = Controller::start(controller::Parts {
            store: Arc::new(store),
            audit: audit.clone(),
            connector: Arc::new(Dialler(door)),
            clock: Arc::new(SystemClock),
            random: Arc::new(SystemRandom),
            nodes: controller::node::Options {
                seeds: vec![(name, String::new())],
                discover: false,
                agent_port: 7445,
                limits: controller::placement::Limits::default(),
            },
            creates: controller::sandbox::Options::default(),
            events: controller::events::Options::default(),
            limits: controller::config::ApiLimits::default(),
            urls: controller::url::UrlTemplate::new("http://port-{port}-vm-{vmid}.test")
                .expect("a template")
                .into(),
        });
        let controller = controller.await.expect("a controller");
        controller::ca::init(&dir.join("controller"), &[]).expect("a CA");
        let signer = Signer::load(&dir.join("controller"), Lives::default()).expect("the CA");
        controller.enrol(signer, Settings::default());
        let (dial, dialled) = mpsc::channel(16);
        let (api, stopped) = (controller.api(), controller.stopping().cancelled_owned());
        tokio::spawn(async move { api.serve(ReceiverStream::new(dialled), stopped).await });
        assert_eq!(controller.settled(Duration::from_secs(20)).await, (1, 1));
        let token = issued.text(Format::Plain);
        Self { dir: dir.to_owned(), token, shims, audit, dial, controller, _agent: agent }
    }

    /// Opens a connection to the controller's API.
    pub(crate) fn channel(&self) -> Channel {
        let dial = self.dial.clone();
        daemon::channel::over(Leg::Api, move || {
            let dial = dial.clone();
            async move {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
                dial.send(Ok(far)).await.map_err(refused)?;
                Ok(near)
            }
        })
    }

    /// Serves SSH from now on; returns the port.
    pub(crate) async fn serve_ssh(&self) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let settings = ssh::Settings { host: String::new(), port, connections_max: 8 };
        let key = ssh::host_key::load_or_make(&self.dir.join("controller")).expect("a key");
        tokio::spawn(self.controller.ssh(key, &settings).serve(listener));
        port
    }

    /// Writes everything that waits to be written.
    pub(crate) async fn stop(self) {
        self.controller.stop().await;
        self.audit.close().await;
    }
}

async fn node(name: &NodeName, state: &Path, shims: Arc<Here>) -> Agent {
    let cluster = FakeCluster::new(std::slice::from_ref(name), Pace::default(), 7);
    cluster.add_template(name, vmid(TEMPLATE));
    let pools = Pools {
        vmids: (vmid(100_000), vmid(100_099)),
        addresses: ([10, 100, 1, 2].into(), [10, 100, 1, 254].into()),
        address_quarantine_ms: 0,
    };
    let load = HostLoad {
        cores: 8.0,
        memory_total: 64 << 30,
        memory_available: 48 << 30,
        ..HostLoad::default()
    };
    let parts = agent::Parts {
        sandboxes: options(),
        reconcile: agent::reconcile::Options::default(),
        pve: cluster.node(name) as Arc<dyn Pve>,
        journal: Arc::new(
            SqliteJournal::open(&state.join("journal.sqlite"), pools).expect("a journal"),
        ),
        // Orders carry deadlines by the host's own clock.
        clock: Arc::new(agent::clock::SystemClock::default()),
        host_load: Box::new(move |_, _| load),
        shims,
        dhcp: None,
        isolation: None,
        resolver: None,
        faults: Faults::default(),
    };
    Agent::start(parts).await.expect("an agent")
}

fn options() -> Options {
    Options {
        templates: vec![Template {
            snapshot: SNAPSHOT.parse().expect("a snapshot"),
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
            gateway: [10, 100, 1, 1].into(),
            own: Vec::new(),
            dhcp: Default::default(),
        },
        limits: Limits::default(),
        lifetimes: Lifetimes::default(),
        on_reboot: Default::default(),
        labels: Vec::new(),
        number: None,
    }
}

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

/// Shims that serve in this process, with the real helper.
#[derive(Debug)]
pub(crate) struct Here {
    dir: PathBuf,
    /// True while no sandbox can be entered.
    pub(crate) closed: AtomicBool,
}

impl Here {
    fn socket(&self, record: &Record) -> PathBuf {
        self.dir.join(format!("{}-{}.sock", record.vmid, record.boot))
    }
}

#[async_trait::async_trait]
impl Shims for Here {
    async fn find(&self, record: &Record) -> Option<UnixStream> {
        UnixStream::connect(self.socket(record)).await.ok()
    }

    async fn start(&self, record: &Record) -> io::Result<UnixStream> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(io::Error::other("the test says so"));
        }
        let socket = self.socket(record);
        let listener = UnixListener::bind(&socket)?;
        let parts = shim::Parts {
            host: Arc::new(Inside),
            image: image::sealed("pve-sandbox-helper", image::HELPER)?,
            dir: self.dir.clone(),
            ids: self.dir.join("ids"),
            socket: socket.clone(),
            output_bytes_max: shim::OUTPUT_BYTES_MAX,
        };
        tokio::spawn(async move { shim::serve(listener, parts).await });
        UnixStream::connect(&socket).await
    }
}

/// This machine, as a shim sees its container.
#[derive(Debug)]
struct Inside;

impl shim::Host for Inside {
    fn processes(&self) -> Vec<u32> {
        let all = std::fs::read_dir("/proc").expect("procfs").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| *pid != std::process::id()).collect()
    }

    fn frozen(&self) -> bool {
        false
    }

    fn runs(&self) -> bool {
        true
    }

    fn enter(&self) -> Vec<OsString> {
        ["/usr/bin/env", "-i", "--"].map(OsString::from).into()
    }
}

/// Connector of the controller to the one agent.
#[derive(Debug)]
struct Dialler(mpsc::Sender<io::Result<Link>>);

impl controller::node::Connector for Dialler {
    fn channel(&self, _: &NodeName, _address: &str, _: Lane) -> io::Result<Channel> {
        let door = self.0.clone();
        Ok(daemon::channel::over(Leg::Agent, move || {
            let door = door.clone();
            async move {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
                door.send(Ok(Link(far))).await.map_err(refused)?;
                Ok(near)
            }
        }))
    }
}

/// A connection of the controller, as the agent sees it.
#[derive(Debug)]
struct Link(DuplexStream);

impl Connected for Link {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer::Controller
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
