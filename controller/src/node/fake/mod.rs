//! Agent for tests and simulations: the real gRPC service over in-memory streams, with made-up
//! sandboxes and faults that can be switched on.

mod answers;
mod exec;
mod files;
mod forward;
mod names;
mod net;
mod service;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use daemon::sync::Mutex;
use proto::{
    Reason,
    agent::v1::{
        self as wire, agent_service_server::AgentServiceServer,
        name_service_server::NameServiceServer,
    },
    id::SandboxId,
    name::NodeName,
    sandbox::v1::{self as api, Phase, Sandbox},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::server::Connected};
use tower::{Service as _, layer::layer_fn, service_fn};

use super::calls::Call;

pub use exec::{Program, Runner, counted};
pub use names::Names;
pub use net::{Dialler, Net, Pipe};

/// Most connections that wait to be accepted.
const BACKLOG: usize = 64;

/// Faults of a fake agent.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Reason with which creations are refused.
    pub refuse: Option<Reason>,
    /// Reason with which accepted creations fail.
    pub fail: Option<Reason>,
    /// Creations are neither carried out nor answered.
    pub hang: bool,
    /// Point at which a creation breaks the connection.
    pub cut: Option<Cut>,
    /// Time for which a creation is CREATING.
    pub boot: Duration,
    /// Creations take no time: the answer says RUNNING.
    pub at_once: bool,
    /// Output from before an attachment is not kept.
    pub forgets_output: bool,
    /// Other changing calls are carried out but not answered.
    pub mute: bool,
    /// Commands are started but their callers not answered.
    pub mute_execs: bool,
    /// Call that is neither carried out nor answered, however often it comes.
    pub unanswered: Option<Call>,
    /// Reason with which files are not written.
    pub refuse_files: Option<Reason>,
    /// Answers like a node that cannot close a sandbox, or whose version does not say so.
    pub isolates_nothing: bool,
    /// Makes every sandbox open, like an agent of a version that knows of nothing else.
    pub opens: bool,
    /// Reports no commands, as older agents do.
    pub tells_no_commands: bool,
    /// Whether it keeps no sandbox to an allow-list.
    pub filters_nothing: bool,
    /// Answers like an older agent, which knows no names.
    pub knows_no_names: bool,
    /// Answers like an agent for which every open port is public.
    pub guards_nothing: bool,
    /// Opens every port to everybody and says nothing about it, like an older agent that has just taken the
    /// place of the one that said hello.
    pub forgets_visibility: bool,
    /// Sandbox that it finds in a container without a record.
    pub recovers: Option<Sandbox>,
    /// Time that its clean-up takes, and what that finds.
    pub garbage: Option<(Duration, Vec<api::GarbageItem>)>,
}

/// Point at which the connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The node never receives the creation.
    Before,
    /// The node makes the sandbox, and its answer is lost.
    After,
}

#[derive(Debug)]
pub(super) struct World {
    journal_id: String,
    revision: u64,
    epoch: u64,
    seq: u64,
    next_vmid: u32,
    /// Range of vmids that it tells; zeros, as an agent that tells none.
    vmids: (u32, u32),
    sandboxes: BTreeMap<SandboxId, Sandbox>,
    cancelled: BTreeMap<SandboxId, u32>,
    members: Vec<wire::Member>,
    /// Reported load, beside what follows from the sandboxes.
    load: api::NodeLoad,
    faults: Faults,
    /// Creations that arrived, with their attempts, whatever became of them.
    received: Vec<(SandboxId, u32)>,
    /// Rules for ports that came with the last creation.
    port_rules: Option<wire::PortRules>,
    /// Creations with a reservation.
    reservations: BTreeSet<SandboxId>,
    execs: exec::Execs,
    /// Bytes of kept output, by sandbox.
    kept: BTreeMap<String, u64>,
    /// Streams of commands by name; cancelling one ends it.
    streams: BTreeMap<String, CancellationToken>,
    /// Interner of messages after which the next streams of commands break.
    breaks: VecDeque<u32>,
    files: files::Files,
    /// Names that it was told; `None` before.
    names: Option<names::Names>,
    listeners: forward::Listeners,
    /// Number of calls that came.
    arrived: usize,
    /// Number of calls that came and are not answered.
    swallowed: usize,
}

/// One fake agent.
#[derive(Debug)]
pub struct FakeAgent {
    name: NodeName,
    net: Arc<Net>,
    world: Mutex<World>,
    changes: watch::Sender<u64>,
}

impl FakeAgent {
    /// Starts an agent that serves under its name on `net`, with vmids from `first_vmid`.
    pub fn start(net: &Arc<Net>, name: &str, first_vmid: u32, snapshots: &[&str]) -> Arc<Self> {
        let name: NodeName = name.parse().expect("a node's name");
        let gib = 1 << 30;
        let load = api::NodeLoad {
            cores: 8.0,
            memory_total: 32 * gib,
            memory_available: 30 * gib,
            storage_free: 90 * gib,
            storage_total: 100 * gib,
            vmids_free: 1000,
            ips_free: 200,
            quorate: true,
            snapshots: snapshots.iter().map(ToString::to_string).collect(),
            snapshot_sizes: vec![
                api::Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 };
                snapshots.len()
            ],
            ..api::NodeLoad::default()
        };
        let agent = Arc::new(Self {
            name: name.clone(),
            net: net.clone(),
            world: Mutex::new(World {
                journal_id: format!("{name}-1"),
                revision: 0,
                epoch: 0,
                seq: 0,
                next_vmid: first_vmid,
                vmids: (0, 0),
                sandboxes: BTreeMap::new(),
                cancelled: BTreeMap::new(),
                members: Vec::new(),
                load,
                faults: Faults::default(),
                received: Vec::new(),
                port_rules: None,
                reservations: BTreeSet::new(),
                execs: exec::Execs::default(),
                kept: BTreeMap::new(),
                streams: BTreeMap::new(),
                breaks: VecDeque::new(),
                files: files::Files::new(),
                names: None,
                listeners: forward::Listeners::default(),
                arrived: 0,
                swallowed: 0,
            }),
            changes: watch::channel(0).0,
        });
        let (dial, dialled) = mpsc::channel(BACKLOG);
        net.register(&name, dial);
        tokio::spawn(agent.clone().serve(ReceiverStream::new(dialled)));
        agent
    }

    /// Serves further connections, such as real ones over TLS.
    pub async fn serve<I, IO, E>(self: Arc<Self>, incoming: I)
    where
        I: Stream<Item = Result<IO, E>>,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let service = AgentServiceServer::new(service::Service(self.clone()));
        let names = NameServiceServer::new(service::Service(self.clone()));
        // Calls that must not be answered end here.
        let hang = layer_fn(move |inner: Routes| {
            let agent = self.clone();
            service_fn(move |request: http::Request<tonic::body::Body>| {
                let (mut inner, agent) = (inner.clone(), agent.clone());
                let call = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
                async move {
                    if agent.swallows(&call) {
                        std::future::pending::<()>().await;
                    }
                    inner.call(request).await
                }
            })
        });
        let mut server = daemon::flow::agent_server().layer(hang);
        let served =
            server.add_service(service).add_service(names).serve_with_incoming(incoming).await;
        if let Err(error) = served {
            tracing::error!(%error, "fake agent stopped serving");
        }
    }

    /// Returns the name of its node.
    pub fn name(&self) -> &NodeName {
        &self.name
    }

    /// Switches faults.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.world.lock().faults);
    }

    /// Changes the reported load.
    pub fn load(&self, change: impl FnOnce(&mut api::NodeLoad)) {
        change(&mut self.world.lock().load);
        self.changes.send_modify(|n| *n += 1);
    }

    /// Sets how much output it keeps of a sandbox, bytes.
    pub fn keeps(&self, id: &str, bytes: u64) {
        self.world.lock().kept.insert(id.to_owned(), bytes);
    }

    /// Has it tell a range of vmids with its next hello.
    pub fn tells_vmids(&self, first: u32, last: u32) {
        self.world.lock().vmids = (first, last);
    }

    /// Adds a member to its cluster.
    pub fn add_member(&self, node: &str, ip: &str) {
        let member = wire::Member { node: node.into(), ip: ip.into(), online: !ip.is_empty() };
        self.world.lock().members.push(member);
    }

    /// Breaks every connection and accepts none until `up`.
    pub fn down(&self) {
        self.net.set_down(&self.name, true);
    }

    /// Breaks every connection and accepts those to another address only.
    pub fn move_to(&self, address: &str) {
        self.net.move_to(&self.name, address);
    }

    /// Accepts connections again.
    pub fn up(&self) {
        self.net.set_down(&self.name, false);
    }

    /// Returns the number of calls that came and are not answered.
    pub fn swallowed(&self) -> usize {
        self.world.lock().swallowed
    }

    /// Returns the number of calls that came.
    pub fn arrived(&self) -> usize {
        self.world.lock().arrived
    }

    fn swallows(&self, call: &str) -> bool {
        let mut world = self.world.lock();
        let swallowed = world.faults.unanswered.is_some_and(|silent| format!("{silent:?}") == call);
        world.arrived += 1;
        world.swallowed += usize::from(swallowed);
        swallowed
    }

    /// Loses the journal: another history begins, without any sandbox.
    pub fn lose_journal(&self) {
        let mut world = self.world.lock();
        world.journal_id.push('x');
        (world.revision, world.sandboxes) = (0, BTreeMap::new());
    }

    /// Returns its sandboxes, tombstones included.
    pub fn sandboxes(&self) -> Vec<Sandbox> {
        self.world.lock().sandboxes.values().cloned().collect()
    }

    /// Returns its living sandboxes.
    pub fn living(&self) -> Vec<Sandbox> {
        let ended = |s: &Sandbox| matches!(s.phase(), Phase::Deleted | Phase::Failed);
        self.sandboxes().into_iter().filter(|sandbox| !ended(sandbox)).collect()
    }

    /// Returns the creations that arrived, with their attempts.
    pub fn received(&self) -> Vec<(SandboxId, u32)> {
        self.world.lock().received.clone()
    }

    /// Returns the rules for ports that came with the last creation.
    pub fn port_rules(&self) -> Option<wire::PortRules> {
        self.world.lock().port_rules.clone()
    }

    /// Returns the highest epoch seen.
    pub fn epoch(&self) -> u64 {
        self.world.lock().epoch
    }

    /// Sets the highest epoch seen, as a call of another controller does.
    pub fn set_epoch(&self, epoch: u64) {
        self.world.lock().epoch = epoch;
    }

    /// Writes a sandbox to the journal.
    pub fn put(&self, mut sandbox: Sandbox) -> Sandbox {
        let mut world = self.world.lock();
        world.revision += 1;
        sandbox.revision = world.revision;
        let id = sandbox.id.parse().expect("a sandbox's id");
        world.sandboxes.insert(id, sandbox.clone());
        drop(world);
        self.changes.send_modify(|n| *n += 1);
        sandbox
    }

    /// Changes a sandbox without a word to anybody: a report of it is lost.
    pub fn change_unseen(&self, id: &SandboxId, change: impl FnOnce(&mut Sandbox)) {
        change(self.world.lock().sandboxes.get_mut(id).expect("a sandbox"));
    }

    /// Returns the creations with a reservation.
    pub fn reservations(&self) -> Vec<SandboxId> {
        self.world.lock().reservations.iter().copied().collect()
    }

    fn report(&self) -> api::NodeLoad {
        let mut world = self.world.lock();
        world.seq += 1;
        let mut load = world.load.clone();
        load.seq = world.seq;
        for sandbox in world.sandboxes.values() {
            let size = sandbox.size.unwrap_or_default();
            match sandbox.phase() {
                Phase::Running | Phase::Paused => load.running += 1,
                Phase::Creating => load.starting += 1,
                Phase::Unspecified
                | Phase::Starting
                | Phase::Stopping
                | Phase::Stopped
                | Phase::Deleting
                | Phase::Deleted
                | Phase::Failed
                | Phase::Unreachable => continue,
            }
            load.memory_allocated += u64::from(size.memory_mib) << 20;
            load.cores_allocated += size.cpu_cores;
        }
        load
    }
}
