//! A fake controller with one sandbox, whose commands it plays, behind real TLS.

mod operator;

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    process::{Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use daemon::{
    status::Refusal,
    tls::{ClientAuth, Identity},
};
use proto::{
    Progress, Reason,
    sandbox::v1::{
        operator_service_server::OperatorServiceServer,
        sandbox_service_server::{SandboxService, SandboxServiceServer},
        *,
    },
};
use tokio::{io::AsyncWriteExt, process::Command, sync::mpsc, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    events::Events,
    files::Files,
    session::{self, Sessions},
};

pub(crate) const ID: &str = "pvelxc-01h455vb4pex5vsknk084sn02q";
const TOKEN: &str = "t0ken";

/// Behaviour of the fake, and counts of the calls that it received.
#[derive(Debug, Default)]
pub(crate) struct Behaviour {
    /// Snapshots to list.
    pub(crate) snapshots: Vec<&'static str>,
    /// Creations answered with OUTCOME_UNKNOWN before one succeeds.
    pub(crate) unknown: AtomicU32,
    /// Calls to a sandbox's node that find its agent stopped, before it is back.
    pub(crate) away: AtomicU32,
    /// Number of creation requests.
    pub(crate) creates: AtomicU32,
    /// Number of usage requests.
    pub(crate) readings: AtomicU32,
    /// Whether the creation fails instead of running.
    pub(crate) create_fails: bool,
    /// Whether the creation never ends.
    pub(crate) create_hangs: bool,
    /// Numbers of messages after which the next streams of commands break.
    pub(crate) cuts: Mutex<VecDeque<usize>>,
    pub(crate) sessions: Sessions,
    pub(crate) files: Files,
    pub(crate) events: Events,
}

pub(crate) struct Fake {
    pub(crate) behaviour: Arc<Behaviour>,
    port: u16,
    dir: tempfile::TempDir,
    _stop: DropGuard,
}

impl Fake {
    pub(crate) async fn start(behaviour: Behaviour) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let made =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("certificate");
        let [cert, key, token] = ["cert.pem", "key.pem", "token"].map(|name| dir.path().join(name));
        std::fs::write(&cert, made.cert.pem()).expect("write");
        std::fs::write(&key, made.signing_key.serialize_pem()).expect("write");
        std::fs::write(&token, format!("{TOKEN}\n")).expect("write");
        let identity = Identity::load(&cert, &key, &cert).expect("identity");
        let config = daemon::tls::server(&identity, ClientAuth::None).expect("tls");

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("bound").port();
        let (behaviour, stop) = (Arc::new(behaviour), CancellationToken::new());
        let incoming = daemon::listen::tls(listener, config, stop.clone());
        let fake = Service(behaviour.clone());
        let authorized = |request: Request<()>| {
            let given =
                request.metadata().get("authorization").and_then(|value| value.to_str().ok());
            if given == Some("Bearer t0ken") {
                Ok(request)
            } else {
                Err(refuse(Reason::TokenInvalid))
            }
        };
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(SandboxServiceServer::with_interceptor(fake.clone(), authorized))
                .add_service(OperatorServiceServer::with_interceptor(fake, authorized))
                .serve_with_incoming(incoming),
        );
        Self { behaviour, port, dir, _stop: stop.drop_guard() }
    }

    /// Program under test, configured for this controller.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxctl"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("SANDBOXCTL_ENDPOINT", format!("https://localhost:{}", self.port))
            .env("SANDBOXCTL_TOKEN_FILE", self.dir.path().join("token"))
            .env("SANDBOXCTL_CA", self.dir.path().join("cert.pem"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().expect("spawn")).await
    }

    pub(crate) async fn run_with(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().expect("spawn");
        let (mut pipe, bytes) = (child.stdin.take().expect("piped"), stdin.to_owned());
        let fed = tokio::spawn(async move { pipe.write_all(&bytes).await });
        let ran = finish(child).await;
        fed.abort();
        ran
    }
}

#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("utf-8")
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_slice(&self.stdout).expect("json")
    }
}

pub(crate) async fn finish(child: tokio::process::Child) -> Ran {
    let output = timeout(Duration::from_secs(30), child.wait_with_output()).await;
    let Output { status, stdout, stderr } = output.expect("it ends in time").expect("it ran");
    Ran { code: status.code(), stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
}

#[derive(Debug, Clone)]
struct Service(Arc<Behaviour>);

pub(crate) fn refuse(reason: Reason) -> Status {
    Refusal::new(reason, "the fake refused").retry_after(Duration::from_millis(10)).into()
}

/// Sandbox with a right-to-left override, a zero-width space and an escape in its metadata.
pub(crate) const HOSTILE: &str = "hostile";

fn known(id: &str, phase: Phase) -> Result<Option<Sandbox>, Status> {
    if id == HOSTILE {
        let note = "a\u{202e}b\u{200b}c\x1b[2Jd".to_owned();
        let metadata = BTreeMap::from([("note".to_owned(), note)]);
        return Ok(Some(Sandbox { metadata, ..sandbox(phase, Progress::Done) }));
    }
    if id != ID && id != "100001" {
        return Err(refuse(Reason::SandboxNotFound));
    }
    Ok(Some(sandbox(phase, Progress::Done)))
}

fn sandbox(phase: Phase, progress: Progress) -> Sandbox {
    Sandbox {
        id: ID.into(),
        vmid: 100_001,
        node: "node2".into(),
        team: "lab".into(),
        phase: phase.into(),
        snapshot_id: "small".into(),
        size: Some(Size { cpu_cores: 1, memory_mib: 512, disk_gib: 20 }),
        ip: "10.100.2.7".into(),
        services: vec![HttpService {
            name: "web".into(),
            port: 8080,
            url: format!("http://port-8080-{ID}.sandbox.localhost"),
        }],
        metadata: BTreeMap::from([("user".into(), "ada".into())]),
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        boot: 1,
        attempt: 1,
        revision: 7,
        request_id: "r-1".into(),
        progress: progress.into(),
        wake_on: Some(WakeOn { http: true, ssh: false, exec: true }),
        ..Sandbox::default()
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// Refuses as many calls as `away` says.
    fn reached(&self) -> Result<(), Status> {
        let away = &self.0.away;
        let left =
            away.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        let reasons = [Reason::NodeUnreachable, Reason::ShuttingDown];
        left.map_or(Ok(()), |left| Err(refuse(reasons[left as usize % 2])))
    }
}

#[tonic::async_trait]
impl SandboxService for Service {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Answer<CreateSandboxResponse> {
        self.0.creates.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        let unknown = &self.0.unknown;
        if unknown
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok()
        {
            return Err(refuse(Reason::OutcomeUnknown));
        }
        let mut made = sandbox(Phase::Creating, Progress::Clone);
        made.request_id = request.request_id;
        made.snapshot_id = request.snapshot_id;
        Ok(Response::new(CreateSandboxResponse { sandbox: Some(made) }))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Answer<GetSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(GetSandboxResponse { sandbox }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Answer<ListSandboxesResponse> {
        let request = request.into_inner();
        let (phase, next) = match request.page_token.as_str() {
            "" => (Phase::Running, "second"),
            _ => (Phase::Creating, ""),
        };
        let sandboxes = vec![sandbox(phase, Progress::Clone)];
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token: next.into() }))
    }

    type WatchEventsStream = Streamed<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        let WatchEventsRequest { after_revision, id, follow, last } = request.into_inner();
        if !id.is_empty() {
            known(&id, Phase::Running)?;
        }
        let said = self.0.events.say(after_revision, last, follow)?;
        let said = said.into_iter().map(|said| {
            let (event, revision) = said?;
            Ok(WatchEventsResponse { event, revision })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(said.collect::<Vec<_>>()))))
    }

    type WatchSandboxStream = Streamed<WatchSandboxResponse>;

    async fn watch_sandbox(
        &self,
        request: Request<WatchSandboxRequest>,
    ) -> Answer<Self::WatchSandboxStream> {
        known(&request.into_inner().id, Phase::Running)?;
        let mut last = sandbox(Phase::Running, Progress::Done);
        if self.0.create_fails {
            last.set_phase(Phase::Failed);
            last.failure = Some(Failure {
                reason: Reason::PctFailed.into(),
                message: "start failed: no such device".into(),
                rollback: "the container was destroyed".into(),
            });
        }
        if self.0.create_hangs {
            let creating = Ok(WatchSandboxResponse {
                sandbox: Some(sandbox(Phase::Creating, Progress::Clone)),
            });
            let creating = tokio_stream::once(creating).chain(tokio_stream::pending());
            return Ok(Response::new(Box::pin(creating)));
        }
        let changes = [sandbox(Phase::Creating, Progress::Start), last];
        let changes = changes.map(|sandbox| Ok(WatchSandboxResponse { sandbox: Some(sandbox) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(changes))))
    }

    async fn start_sandbox(
        &self,
        request: Request<StartSandboxRequest>,
    ) -> Answer<StartSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Starting)?;
        Ok(Response::new(StartSandboxResponse { sandbox }))
    }

    async fn stop_sandbox(
        &self,
        request: Request<StopSandboxRequest>,
    ) -> Answer<StopSandboxResponse> {
        self.reached()?;
        let sandbox = known(&request.into_inner().id, Phase::Stopped)?;
        Ok(Response::new(StopSandboxResponse { sandbox }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Answer<DeleteSandboxResponse> {
        self.reached()?;
        let sandbox = known(&request.into_inner().id, Phase::Deleted)?;
        Ok(Response::new(DeleteSandboxResponse { sandbox }))
    }

    type ExecStream = Streamed<ExecResponse>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|request| request.message);
        let (session, from) = match first {
            Some(exec_request::Message::Start(start)) => {
                self.reached()?;
                known(&start.id, Phase::Running)?;
                (self.0.sessions.start(start), [0, 0])
            }
            Some(exec_request::Message::Attach(attach)) => {
                known(&attach.id, Phase::Running)?;
                let from = [attach.stdout_offset, attach.stderr_offset];
                (self.0.sessions.get(&attach.exec_id)?, from)
            }
            other => panic!("no start: {other:?}"),
        };
        let cut = self.0.cuts.lock().expect("no panic").pop_front();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(session::feed(session.clone(), messages));
        tokio::spawn(session::relay(session, from, sender, cut));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn exec_command(&self, _: Request<ExecCommandRequest>) -> Answer<ExecCommandResponse> {
        Err(refuse(Reason::Invariant))
    }

    async fn pause_sandbox(
        &self,
        request: Request<PauseSandboxRequest>,
    ) -> Answer<PauseSandboxResponse> {
        self.reached()?;
        let PauseSandboxRequest { id, or_stop } = request.into_inner();
        let sandbox = known(&id, if or_stop { Phase::Stopped } else { Phase::Paused })?;
        Ok(Response::new(PauseSandboxResponse { sandbox }))
    }

    async fn resume_sandbox(
        &self,
        request: Request<ResumeSandboxRequest>,
    ) -> Answer<ResumeSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(ResumeSandboxResponse { sandbox }))
    }

    async fn set_wake_on(&self, request: Request<SetWakeOnRequest>) -> Answer<SetWakeOnResponse> {
        let SetWakeOnRequest { id, wake_on } = request.into_inner();
        let sandbox = known(&id, Phase::Running)?.map(|sandbox| Sandbox { wake_on, ..sandbox });
        Ok(Response::new(SetWakeOnResponse { sandbox }))
    }

    async fn set_lifetime(
        &self,
        request: Request<SetLifetimeRequest>,
    ) -> Answer<SetLifetimeResponse> {
        let SetLifetimeRequest { id, lifetime } = request.into_inner();
        let sandbox = known(&id, Phase::Running)?.map(|sandbox| Sandbox { lifetime, ..sandbox });
        Ok(Response::new(SetLifetimeResponse { sandbox }))
    }

    async fn prune_sandboxes(
        &self,
        request: Request<PruneSandboxesRequest>,
    ) -> Answer<PruneSandboxesResponse> {
        let PruneSandboxesRequest { older_than, dry_run, .. } = request.into_inner();
        // The only sandbox was stopped a week ago.
        let old = older_than.is_some_and(|age| age.seconds < 7 * 24 * 3600);
        let one = PrunedSandbox {
            sandbox: known(ID, Phase::Stopped)?,
            deleted: !dry_run,
            error: String::new(),
        };
        let sandboxes = if old { vec![one] } else { Vec::new() };
        Ok(Response::new(PruneSandboxesResponse { sandboxes }))
    }

    async fn compare_sandboxes(
        &self,
        request: Request<CompareSandboxesRequest>,
    ) -> Answer<CompareSandboxesResponse> {
        let known_ids = request.into_inner().known_ids;
        let listed = known_ids.iter().any(|id| id == ID);
        let unlisted = if listed { None } else { known(ID, Phase::Running)? };
        Ok(Response::new(CompareSandboxesResponse {
            unlisted: unlisted.into_iter().collect(),
            missing: known_ids.into_iter().filter(|id| id != ID).collect(),
            complete: true,
        }))
    }

    type StreamExecStream = ReceiverStream<Result<StreamExecResponse, Status>>;

    async fn stream_exec(&self, _: Request<StreamExecRequest>) -> Answer<Self::StreamExecStream> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn write_exec_stdin(
        &self,
        request: Request<WriteExecStdinRequest>,
    ) -> Answer<WriteExecStdinResponse> {
        let request = request.into_inner();
        let session = self.0.sessions.get(&request.exec_id)?;
        session.input(exec_request::Message::StdinEof(request.eof));
        Ok(Response::new(WriteExecStdinResponse { offset: request.offset }))
    }

    async fn resize_exec(&self, _: Request<ResizeExecRequest>) -> Answer<ResizeExecResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn signal_exec(&self, request: Request<SignalExecRequest>) -> Answer<SignalExecResponse> {
        let request = request.into_inner();
        self.0.sessions.get(&request.exec_id)?.signal(request.signal);
        Ok(Response::new(SignalExecResponse {}))
    }

    async fn list_execs(&self, request: Request<ListExecsRequest>) -> Answer<ListExecsResponse> {
        known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(ListExecsResponse { execs: self.0.sessions.list() }))
    }

    async fn write_files(&self, _: Request<WriteFilesRequest>) -> Answer<WriteFilesResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    type ReadFileStream = ReceiverStream<Result<ReadFileResponse, Status>>;

    async fn read_file(&self, _: Request<ReadFileRequest>) -> Answer<Self::ReadFileStream> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Answer<StatFileResponse> {
        let file = self.0.files.stat(&request.into_inner().path)?;
        Ok(Response::new(StatFileResponse { file: Some(file) }))
    }

    async fn list_dir(&self, _: Request<ListDirRequest>) -> Answer<ListDirResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn remove_file(&self, _: Request<RemoveFileRequest>) -> Answer<RemoveFileResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn upload_archive(
        &self,
        request: Request<Streaming<UploadArchiveRequest>>,
    ) -> Answer<UploadArchiveResponse> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|request| request.message);
        let Some(upload_archive_request::Message::Start(start)) = first else {
            panic!("no start: {first:?}")
        };
        known(&start.id, Phase::Running)?;
        let mut archive = Vec::new();
        while let Some(message) = messages.message().await? {
            match message.message {
                Some(upload_archive_request::Message::Data(bytes)) => archive.extend(bytes),
                other => panic!("not data: {other:?}"),
            }
        }
        let entries = self.0.files.unpack(&start.path, &archive);
        Ok(Response::new(UploadArchiveResponse { entries }))
    }

    type DownloadArchiveStream = Streamed<DownloadArchiveResponse>;

    async fn download_archive(
        &self,
        request: Request<DownloadArchiveRequest>,
    ) -> Answer<Self::DownloadArchiveStream> {
        let archive = self.0.files.pack(&request.into_inner().path)?;
        let pieces: Vec<_> = archive
            .chunks(1000)
            .map(|part| Ok(DownloadArchiveResponse { data: part.to_vec().into() }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    /// Reports half a core of usage since the reading before.
    async fn get_usage(&self, _: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        let readings = u64::from(self.0.readings.fetch_add(1, Ordering::SeqCst));
        let usage = Usage {
            id: ID.into(),
            cpu_us: readings * 500_000,
            at_ns: readings * 1_000_000_000,
            memory_bytes: 64 << 20,
            memory_max_bytes: 512 << 20,
            pids: 3,
            psi_cpu: 1.5,
            ..Usage::default()
        };
        Ok(Response::new(GetUsageResponse { usages: vec![usage] }))
    }

    async fn expose_http_service(
        &self,
        request: Request<ExposeHttpServiceRequest>,
    ) -> Answer<ExposeHttpServiceResponse> {
        let ExposeHttpServiceRequest { id, name, port } = request.into_inner();
        known(&id, Phase::Running)?;
        let url = format!("http://port-{port}-{id}.sandbox.localhost");
        let name = if name.is_empty() { format!("port-{port}") } else { name };
        Ok(Response::new(ExposeHttpServiceResponse {
            service: Some(HttpService { name, port, url }),
        }))
    }

    async fn hide_http_service(
        &self,
        request: Request<HideHttpServiceRequest>,
    ) -> Answer<HideHttpServiceResponse> {
        let HideHttpServiceRequest { id, name } = request.into_inner();
        if name != "web" {
            return Err(refuse(Reason::ServiceNotFound));
        }
        let sandbox = known(&id, Phase::Running)?;
        let named = |name: &str| HttpService { name: name.into(), port: 8080, url: String::new() };
        let closed = vec![named("web"), named("www")];
        Ok(Response::new(HideHttpServiceResponse { sandbox, closed }))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Answer<ListSnapshotsResponse> {
        let snapshot = |id: &&str| Snapshot {
            id: (*id).to_owned(),
            size: Some(Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 }),
            nodes: vec!["node1".into(), "node2".into()],
        };
        let snapshots = self.0.snapshots.iter().map(snapshot).collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots }))
    }

    async fn explain_placement(
        &self,
        _: Request<ExplainPlacementRequest>,
    ) -> Answer<ExplainPlacementResponse> {
        let fits = NodeVerdict {
            node: "node2".into(),
            score: 0.25,
            parts: vec![
                ScorePart { name: "cpu".into(), value: 0.125 },
                ScorePart { name: "memory".into(), value: 0.125 },
            ],
            ..NodeVerdict::default()
        };
        let out = NodeVerdict {
            node: "node1".into(),
            filtered: "NO_MEMORY".into(),
            detail: "512 MiB wanted, 100 MiB left".into(),
            ..NodeVerdict::default()
        };
        let decision = PlacementDecision {
            node: "node2".into(),
            decided_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            nodes: vec![fits, out],
            attempt: 1,
            holders: 2,
        };
        Ok(Response::new(ExplainPlacementResponse { decision: Some(decision) }))
    }
}
