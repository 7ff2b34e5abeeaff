//! A canary in every input, looked for wherever the product writes or shows something: the files of
//! both daemons and of the shims, the audit log, the log at the level TRACE, errors, command lines.
//! `search` has the table of what may be seen where. tests/lxc/secrets.rs does the same on real nodes.

mod inputs;
mod search;
mod ssh;
mod world;

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use prost::Message as _;
use proto::sandbox::v1::{
    Argv, CreateSandboxRequest, CreateTokenRequest, DeleteSandboxRequest, ExecRequest, ExecStart,
    FileContent, GetSandboxRequest, ListExecsRequest, Phase, Progress, Sandbox, Scope,
    WriteFilesRequest, exec_request::Message as Ask, exec_response::Message as Said, exec_start,
    operator_service_client::OperatorServiceClient, sandbox_service_client::SandboxServiceClient,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};

use search::{Input, Log, Place, Search};
use world::{SNAPSHOT, World};

/// Longest wait for one thing.
const DEADLINE: Duration = Duration::from_secs(60);
/// Signal that ends a command.
const KILL: u32 = 9;

type Auth = Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send + Sync>;
type Api = SandboxServiceClient<InterceptedService<Channel, Auth>>;

fn bearer(token: &str) -> Auth {
    let value = format!("Bearer {token}");
    Box::new(move |mut request| {
        let value = MetadataValue::try_from(value.as_str()).expect("ASCII");
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    })
}

fn api(world: &World, token: &str) -> Api {
    SandboxServiceClient::with_interceptor(world.channel(), bearer(token))
}

/// Looks everywhere.
fn look_around(search: &mut Search, world: &World, log: &Log) {
    search.look_into(Place::Journal, &world.dir.join("node"));
    search.look_into(Place::Shims, &world.dir.join("shims"));
    let audit = world.dir.join("controller/audit");
    search.look_into(Place::Audit, &audit);
    for file in ["controller.db", "controller.db-wal", "controller.db-shm"] {
        let bytes = std::fs::read(world.dir.join("controller").join(file)).unwrap_or_default();
        search.look(Place::Store, &bytes);
    }
    search.look(Place::Log, &log.bytes());
    search.look_at_processes();
}

/// Asks until an answer is the wanted one.
async fn until(api: &mut Api, id: &str, reached: impl Fn(&Sandbox) -> bool) -> Sandbox {
    let begun = Instant::now();
    loop {
        let answer = api.get_sandbox(GetSandboxRequest { id: id.to_owned() }).await;
        let sandbox = answer.expect("known").into_inner().sandbox.expect("a sandbox");
        if reached(&sandbox) {
            return sandbox;
        }
        assert!(begun.elapsed() < DEADLINE, "it does not get there: {sandbox:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits for a file with this content.
async fn until_holds(path: &Path, content: &str) {
    let begun = Instant::now();
    while std::fs::read(path).ok().as_deref() != Some(content.as_bytes()) {
        assert!(begun.elapsed() < DEADLINE, "{} has something else", path.display());
        sleep(Duration::from_millis(20)).await;
    }
}

fn creation(dir: &Path) -> CreateSandboxRequest {
    let env =
        [("TOKEN".to_owned(), Input::Env.canary()), (Input::EnvName.canary(), "plain".to_owned())];
    CreateSandboxRequest {
        request_id: "r-1".into(),
        snapshot_id: SNAPSHOT.into(),
        env: env.into(),
        metadata: [("note".to_owned(), Input::Metadata.canary())].into(),
        files: vec![file(&dir.join("inside/first"), Input::FirstFile)],
        wait: Some(prost_types::Duration::default()),
        ..CreateSandboxRequest::default()
    }
}

fn file(path: &Path, input: Input) -> FileContent {
    let path = path.to_str().expect("UTF-8").to_owned();
    FileContent { path, content: input.canary().into(), mode: 0o600 }
}

fn command(id: &str, dir: &Path) -> ExecStart {
    let line = format!("cat > {}/inside/stdin; sleep 600; :", dir.display());
    let args = ["/bin/sh", "-c", &line, "--", &Input::Argv.canary()].map(str::to_owned);
    ExecStart {
        id: id.to_owned(),
        exec_id: "run-1".into(),
        command: Some(exec_start::Command::Argv(Argv { args: args.into() })),
        env: [("KEY".to_owned(), Input::ExecEnv.canary())].into(),
        ..ExecStart::default()
    }
}

/// Runs a command, calls `meanwhile` while it runs, and ends it.
async fn run(api: &mut Api, start: ExecStart, dir: &Path, meanwhile: impl AsyncFnOnce(&mut Api)) {
    let (requests, asked) = mpsc::channel(8);
    let say = async |message| {
        requests.send(ExecRequest { message: Some(message) }).await.expect("taken");
    };
    say(Ask::Start(start)).await;
    say(Ask::Stdin(Input::Stdin.canary().into())).await;
    say(Ask::StdinEof(true)).await;
    let answers = api.exec(ReceiverStream::new(asked)).await.expect("it starts");
    let mut answers = answers.into_inner();
    until_holds(&dir.join("inside/stdin"), &Input::Stdin.canary()).await;
    meanwhile(api).await;
    say(Ask::Signal(KILL)).await;
    while let Some(answer) = answers.message().await.expect("an answer") {
        if matches!(answer.message, Some(Said::Exit(_))) {
            return;
        }
    }
    panic!("the command has no end");
}

/// Makes every kind of error with a secret in what is wrong.
async fn errors(world: &World, api: &mut Api, id: &str) -> Vec<Status> {
    let bad = Input::Refused.canary();
    let create = |change: &dyn Fn(&mut CreateSandboxRequest)| {
        let mut request = CreateSandboxRequest { request_id: "r-2".into(), ..creation(&world.dir) };
        change(&mut request);
        request
    };
    let creations = [
        create(&|request| drop(request.env.insert("NO NAME".into(), bad.clone()))),
        create(&|request| drop(request.env.insert("A".into(), format!("{bad}\0")))),
        create(&|request| drop(request.env.insert("A".into(), bad.repeat(3000)))),
        create(&|request| request.files.push(file(Path::new("no/root"), Input::Refused))),
        create(&|request| request.snapshot_id = "none".into()),
        // The first one's request_id, and another body.
        create(&|request| {
            request.request_id = "r-1".into();
            request.env.insert("A".into(), bad.clone());
        }),
    ];
    let mut errors = Vec::new();
    for request in creations {
        errors.push(api.create_sandbox(request).await.expect_err("refused"));
    }
    let start = |change: &dyn Fn(&mut ExecStart)| {
        let mut start = ExecStart { exec_id: String::new(), ..command(id, &world.dir) };
        change(&mut start);
        start
    };
    for start in [
        start(&|start| drop(start.env.insert("NO NAME".into(), bad.clone()))),
        start(&|start| start.id = "pvelxc-none".into()),
        start(&|start| start.user = "nobody-of-this-name".into()),
        start(&|start| start.cwd = "/no/such/directory".into()),
    ] {
        let (requests, asked) = mpsc::channel(1);
        let message = Some(Ask::Start(start));
        requests.send(ExecRequest { message }).await.expect("taken");
        let refused = match api.exec(ReceiverStream::new(asked)).await {
            Ok(answers) => answers.into_inner().message().await.expect_err("refused"),
            Err(status) => status,
        };
        errors.push(refused);
    }
    let files = vec![file(Path::new("/proc/none/file"), Input::Refused)];
    let write = WriteFilesRequest { id: id.to_owned(), files, user: String::new() };
    errors.push(api.write_files(write).await.expect_err("refused"));
    let wrong = Input::WrongToken.canary();
    for token in [wrong.clone(), format!("pvesb_0123456789ab_{wrong}")] {
        let request = GetSandboxRequest { id: id.to_owned() };
        let mut stranger = self::api(world, &token);
        errors.push(stranger.get_sandbox(request).await.expect_err("refused"));
    }
    errors
}

/// Makes a token by the API; returns its text.
async fn token(world: &World) -> String {
    let channel = world.channel();
    let mut operator = OperatorServiceClient::with_interceptor(channel, bearer(&world.token));
    let request = CreateTokenRequest {
        team: "red".into(),
        name: "ci".into(),
        scopes: vec![Scope::Read.into(), Scope::Exec.into(), Scope::Manage.into()],
        ..CreateTokenRequest::default()
    };
    operator.create_token(request).await.expect("made").into_inner().text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_seen_only_where_the_table_says() {
    let log = Log::start();
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let world = World::new(dir).await;
    let text = token(&world).await;
    let (_, secret) = proto::token::split(&text).expect("a token");
    let mut search = Search::new(secret);
    let mut api = api(&world, &text);

    // While nothing can be written into the sandbox, the controller keeps the files of its creation.
    world.shims.closed.store(true, Ordering::Relaxed);
    let made = api.create_sandbox(creation(dir)).await.expect("accepted").into_inner();
    let id = made.sandbox.expect("a sandbox").id;
    until(&mut api, &id, |sandbox| sandbox.progress() == Progress::Files).await;
    look_around(&mut search, &world, &log);
    world.shims.closed.store(false, Ordering::Relaxed);
    until(&mut api, &id, |sandbox| sandbox.phase() == Phase::Running).await;
    until_holds(&dir.join("inside/first"), &Input::FirstFile.canary()).await;
    let files = vec![file(&dir.join("inside/written"), Input::WrittenFile)];
    let write = WriteFilesRequest { id: id.clone(), files, user: String::new() };
    api.write_files(write).await.expect("written");
    until_holds(&dir.join("inside/written"), &Input::WrittenFile.canary()).await;

    run(&mut api, command(&id, dir), dir, async |api| {
        look_around(&mut search, &world, &log);
        let list = ListExecsRequest { id: id.clone(), ..ListExecsRequest::default() };
        let list = api.list_execs(list).await.expect("listed").into_inner();
        search.look(Place::Lists, &list.encode_to_vec());
        let sandbox = until(api, &id, |_| true).await;
        search.look(Place::Lists, &sandbox.encode_to_vec());
        for error in errors(&world, api, &id).await {
            search.look(Place::Errors, format!("{error} {error:?}").as_bytes());
            search.look(Place::Errors, error.details());
        }
    })
    .await;
    look_around(&mut search, &world, &log);
    inputs::send(&mut search, &world, &log, &mut api, &id).await;
    ssh::send(&mut search, &world, &log, &mut api, &id).await;
    api.delete_sandbox(DeleteSandboxRequest { id: id.clone() }).await.expect("deleted");
    until(&mut api, &id, |sandbox| sandbox.phase() == Phase::Deleted).await;
    look_around(&mut search, &world, &log);
    let (node, controller) = (dir.join("node"), dir.join("controller"));
    world.stop().await;
    search.look_into(Place::Journal, &node);
    search.look_into(Place::Audit, &controller.join("audit"));
    assert!(log.bytes().len() > 10_000, "the log is recorded");
    search.judge();
}
