//! The whole controller over simulated agents: real services on both sides, streams in memory,
//! paused time that jumps, randomness from a seed.

mod access;
mod api;
mod audit;
mod breaker;
mod certificates;
mod control_places;
mod crash;
mod creates;
mod egress;
mod events;
mod exec;
mod failover;
mod files;
mod first_files;
mod flood;
mod forward;
mod host_names;
mod join;
mod lists;
mod lost_key;
mod names;
mod nodes;
mod pause;
mod ports;
mod quotas;
mod resize;
mod retention;
mod revocation;
mod sessions;
mod ssh;
mod stalls;
mod team_limits;
mod tls;
mod vmids;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use daemon::flow::Leg;
use proto::{
    Reason,
    id::SandboxRef,
    sandbox::v1::{
        CreateSandboxRequest, Phase, Progress, Sandbox,
        operator_service_client::OperatorServiceClient,
        sandbox_service_client::SandboxServiceClient,
    },
    token::Format,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};

use crate::{
    Controller, Parts,
    audit::Audit,
    clock::{Clock, Random},
    config::ApiLimits,
    node::{
        self,
        fake::{Dialler, FakeAgent, Net},
    },
    sandbox,
    store::{Store, memory::Memory},
    token,
    url::{UrlTemplate, Urls},
};

pub(crate) const SNAPSHOT: &str = "base_v1";

/// Clock that starts at a fixed moment and follows paused time.
#[derive(Debug)]
struct PausedClock(tokio::time::Instant);

impl Clock for PausedClock {
    fn now_ms(&self) -> u64 {
        1_700_000_000_000 + u64::try_from(self.0.elapsed().as_millis()).expect("a short test")
    }
}

/// Clock that a test sets ahead of the other by milliseconds.
#[derive(Debug)]
struct AheadClock(PausedClock, Arc<AtomicU64>);

impl Clock for AheadClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms() + self.1.load(Ordering::Relaxed)
    }
}

/// SplitMix64.
#[derive(Debug)]
struct Seeded(AtomicU64);

impl Random for Seeded {
    fn fill(&self, bytes: &mut [u8]) {
        for byte in bytes {
            let mut z = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            *byte = (z >> 32) as u8;
        }
    }
}

type Auth = Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send + Sync>;
type Api = SandboxServiceClient<InterceptedService<Channel, Auth>>;
type Operator = OperatorServiceClient<InterceptedService<Channel, Auth>>;

/// Three agents, a store that outlives controllers, and a controller.
struct Lab {
    net: Arc<Net>,
    agents: Vec<Arc<FakeAgent>>,
    store: Arc<dyn Store>,
    audit: Audit,
    controller: Option<Controller>,
    dial: mpsc::Sender<std::io::Result<tokio::io::DuplexStream>>,
    red: String,
    starts: u64,
    options: sandbox::Options,
    placement: crate::placement::Limits,
    events: crate::events::Options,
    limits: ApiLimits,
    urls: Urls,
    /// Beginning of the clock, which a restart does not set back.
    born: tokio::time::Instant,
    /// How far the controller's clock is ahead, milliseconds.
    ahead_ms: Arc<AtomicU64>,
    /// Whether only the first node is configured and the others must be discovered.
    discover: bool,
}

impl Lab {
    async fn new() -> Self {
        Self::over(Arc::new(Memory::new())).await
    }

    async fn over(store: Arc<dyn Store>) -> Self {
        daemon::logs::init("warn", false);
        let net = Net::new();
        let agents = (1..=3)
            .map(|n| FakeAgent::start(&net, &format!("n{n}"), n * 100_000, &[SNAPSHOT]))
            .collect();
        let red = token(&store, "red", "sandbox operator").await;
        let mut lab = Self {
            net,
            agents,
            store,
            audit: Audit::off(),
            controller: None,
            dial: mpsc::channel(1).0,
            red,
            starts: 0,
            options: sandbox::Options::default(),
            placement: crate::placement::Limits::default(),
            events: crate::events::Options::default(),
            limits: ApiLimits::default(),
            urls: UrlTemplate::new("http://port-{port}-vm-{vmid}.test:8480")
                .expect("template")
                .into(),
            born: tokio::time::Instant::now(),
            ahead_ms: Arc::default(),
            discover: false,
        };
        lab.start().await;
        lab
    }

    /// Starts a controller over the same store, after the former one was dropped as in a crash.
    async fn start(&mut self) {
        self.controller = None;
        self.starts += 1;
        let configured = if self.discover { 1 } else { self.agents.len() };
        let seed = |agent: &Arc<FakeAgent>| (agent.name().clone(), String::new());
        let seeds = self.agents[..configured].iter().map(seed).collect();
        let controller = Controller::start(Parts {
            store: self.store.clone(),
            audit: self.audit.clone(),
            connector: Arc::new(Dialler(self.net.clone())),
            clock: Arc::new(AheadClock(PausedClock(self.born), self.ahead_ms.clone())),
            random: Arc::new(Seeded(AtomicU64::new(self.starts))),
            nodes: node::Options {
                seeds,
                discover: self.discover,
                agent_port: 7445,
                limits: self.placement,
            },
            creates: self.options.clone(),
            events: self.events.clone(),
            limits: self.limits.clone(),
            urls: self.urls.clone(),
        })
        .await
        .expect("a controller");
        let (dial, dialled) = mpsc::channel(64);
        let stopped = controller.stopping().cancelled_owned();
        let api = controller.api();
        tokio::spawn(async move { api.serve(ReceiverStream::new(dialled), stopped).await });
        self.dial = dial;
        controller.settled(Duration::from_secs(8)).await;
        self.controller = Some(controller);
    }

    fn now_ms(&self) -> u64 {
        PausedClock(self.born).now_ms()
    }

    /// Sets the controller's clock ahead, or back to the right time.
    fn set_ahead(&self, by: Duration) {
        self.ahead_ms.store(daemon::clock::millis(by), Ordering::Relaxed);
    }

    fn channel(&self) -> Channel {
        let dial = self.dial.clone();
        daemon::channel::over(Leg::Api, move || {
            let dial = dial.clone();
            async move {
                let (near, far) = tokio::io::duplex(64 * 1024);
                let gone = |_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
                dial.send(Ok(far)).await.map_err(gone)?;
                Ok(near)
            }
        })
    }

    fn api_as(&self, token: &str) -> Api {
        SandboxServiceClient::with_interceptor(self.channel(), bearer(token))
            .max_encoding_message_size(64 << 20)
            .max_decoding_message_size(4 << 20)
    }

    fn api(&self) -> Api {
        self.api_as(&self.red)
    }

    fn operator(&self) -> Operator {
        OperatorServiceClient::with_interceptor(self.channel(), bearer(&self.red))
    }

    fn domain(&self) -> &Arc<sandbox::Sandboxes> {
        self.controller.as_ref().expect("a controller").sandboxes()
    }

    async fn create(&self, request_id: &str) -> Result<Sandbox, Status> {
        create(&mut self.api(), request(request_id)).await
    }

    /// Returns the agent that has a sandbox.
    fn holder(&self, id: &str) -> &Arc<FakeAgent> {
        let held = |agent: &&Arc<FakeAgent>| agent.living().iter().any(|s| s.id == id);
        self.agents.iter().find(held).expect("a node holds it")
    }

    fn living(&self) -> Vec<Sandbox> {
        self.agents.iter().flat_map(|agent| agent.living()).collect()
    }

    async fn get(&self, id: &str) -> Result<Sandbox, Status> {
        let request = proto::sandbox::v1::GetSandboxRequest { id: id.into() };
        let answer = self.api().get_sandbox(request).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }

    async fn until(&self, id: &str, phase: Phase) -> Sandbox {
        self.until_seen(id, |view| view.phase() == phase).await
    }

    async fn until_progress(&self, id: &str, progress: Progress) -> Sandbox {
        self.until_seen(id, |view| view.progress() == progress).await
    }

    async fn until_seen(&self, id: &str, seen: impl Fn(&Sandbox) -> bool) -> Sandbox {
        let cache = &self.domain().nodes().cache;
        let name: SandboxRef = id.parse().expect("id");
        let entry = cache.get(&name).expect("known");
        let mut changes = cache.watch(entry.id);
        let reached = async {
            loop {
                let view = cache.view(&cache.get(&name).expect("known"));
                if seen(&view) {
                    return view;
                }
                changes.changed().await.expect("the cache lives");
            }
        };
        tokio::time::timeout(Duration::from_secs(300), reached)
            .await
            .expect("it gets there in time")
    }
}

async fn token(store: &Arc<dyn Store>, team: &str, scopes: &str) -> String {
    let issued = issued(team, scopes);
    store.add_token(issued.token.clone()).await.expect("stored");
    issued.text(Format::Plain)
}

fn issued(team: &str, scopes: &str) -> token::Issued {
    let scopes = scopes.parse().expect("scopes");
    token::issue(token::Order::new(team.parse().expect("team"), scopes), 1)
}

fn bearer(token: &str) -> Auth {
    let value = format!("Bearer {token}");
    Box::new(move |mut request| {
        let value = MetadataValue::try_from(value.as_str()).expect("ascii");
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    })
}

fn request(request_id: &str) -> CreateSandboxRequest {
    CreateSandboxRequest {
        request_id: request_id.into(),
        snapshot_id: SNAPSHOT.into(),
        ..CreateSandboxRequest::default()
    }
}

async fn create(api: &mut Api, request: CreateSandboxRequest) -> Result<Sandbox, Status> {
    let answer = api.create_sandbox(request).await?;
    Ok(answer.into_inner().sandbox.expect("a sandbox"))
}

#[track_caller]
fn reason<T: std::fmt::Debug>(answer: Result<T, Status>) -> Reason {
    let status = answer.expect_err("an error");
    daemon::status::reason(&status).unwrap_or_else(|| panic!("no reason in {status:?}"))
}
