//! A fake controller with one sandbox, whose commands it plays, behind real TLS.

mod enrolment;
mod operator;
mod user;

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
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
        enrolment_service_server::EnrolmentServiceServer,
        operator_service_server::OperatorServiceServer,
        sandbox_service_server::SandboxServiceServer, *,
    },
};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};
use tokio_stream::Stream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status};

use crate::{events::Events, files::Files, forward::Listeners, session::Sessions};

pub(crate) const ID: &str = "pvelxc-01h455vb4peh5vsknk084sn02q";
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
    /// Number of pages of the list that were read.
    pub(crate) lists: AtomicU32,
    /// Filters of the lists and watches that were asked for.
    pub(crate) filters: Mutex<Vec<SandboxFilter>>,
    /// Whether the first watch of many sandboxes breaks.
    pub(crate) watch_breaks: bool,
    /// Number of watches of many sandboxes.
    pub(crate) watches: AtomicU32,
    /// Number of deletions.
    pub(crate) deletes: AtomicU32,
    /// Number of usage requests.
    pub(crate) readings: AtomicU32,
    /// Whether the creation fails instead of running.
    pub(crate) create_fails: bool,
    /// Whether archives stop coming in their middle.
    pub(crate) archives_stall: bool,
    /// Whether the creation never ends.
    pub(crate) create_hangs: bool,
    /// Numbers of messages after which the next streams of commands break.
    pub(crate) cuts: Mutex<VecDeque<usize>>,
    pub(crate) sessions: Sessions,
    pub(crate) files: Files,
    pub(crate) events: Events,
    pub(crate) listeners: Listeners,
}

pub(crate) struct Fake {
    pub(crate) behaviour: Arc<Behaviour>,
    pub(crate) port: u16,
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
                .add_service(OperatorServiceServer::with_interceptor(fake.clone(), authorized))
                .add_service(EnrolmentServiceServer::with_interceptor(fake, authorized))
                .serve_with_incoming(incoming),
        );
        Self { behaviour, port, dir, _stop: stop.drop_guard() }
    }

    /// Path of a file of the fake: `cert.pem`, `token`, or one that the program makes in its home.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Program under test, with a home and without a controller.
    pub(crate) fn bare(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        for name in ["ENDPOINT", "TOKEN_FILE", "CA"] {
            command.env_remove(format!("SANDBOXCTL_{name}"));
        }
        command
    }

    /// Address of this controller.
    pub(crate) fn endpoint(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// Program under test, configured for this controller.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxctl"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("SANDBOXCTL_ENDPOINT", self.endpoint())
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

/// Sandbox whose port has no URL.
pub(crate) const WITHOUT_URL: &str = "without-url";

fn known(id: &str, phase: Phase) -> Result<Option<Sandbox>, Status> {
    if id == WITHOUT_URL {
        let mut sandbox = sandbox(phase, Progress::Done);
        for service in &mut sandbox.services {
            service.url.clear();
            service.no_url = "no address begins with 10.9.".into();
        }
        return Ok(Some(sandbox));
    }
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
            visibility: Visibility::Team.into(),
            ..HttpService::default()
        }],
        metadata: BTreeMap::from([("user".into(), "ada".into())]),
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        boot: 1,
        attempt: 1,
        revision: 7,
        request_id: "r-1".into(),
        progress: progress.into(),
        wake_on: Some(WakeOn { http: true, ssh: false, exec: true }),
        egress: Egress::Open.into(),
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
