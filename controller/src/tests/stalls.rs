//! Stalled streams: output that nobody reads, commands and sandboxes that read nothing. They cost
//! their own callers, and block no other call of their node. Time is paused: a second passes only
//! when nothing can move, so a call that waits for another's stream is seen at once.

use std::any::Any;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::Request as HttpRequest;
use http_body_util::{BodyExt as _, Full};
use proto::{Reason, sandbox::v1::*};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{
    exec::{argv, message},
    *,
};
use crate::node::fake::{Pipe, counted};

/// Stalled streams of each kind.
const STALLED: usize = 5;
/// Calls beside them, each within `LIMIT`.
const CALLS: usize = 200;
const LIMIT: Duration = Duration::from_secs(2);
/// Time in which a stream fills whatever it can fill.
const FULL: Duration = Duration::from_secs(1);

/// Whatever keeps a stream open without reading it.
type Held = Box<dyn Any + Send>;

/// Kind of stalled stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Output,
    /// Single bytes of output: many small frames.
    Drip,
    Terminal,
    Logs,
    GrpcWeb,
    Stdin,
    Upload,
    ReadFile,
    Download,
    Watch,
    Events,
}

const ALL: [Kind; 10] = [
    Kind::Output,
    Kind::Terminal,
    Kind::Logs,
    Kind::GrpcWeb,
    Kind::Stdin,
    Kind::Upload,
    Kind::ReadFile,
    Kind::Download,
    Kind::Watch,
    Kind::Events,
];

impl Kind {
    /// Returns the number of stalled streams.
    fn stalled(self) -> usize {
        // Each of these is some 100,000 messages.
        if self == Self::Drip { 2 } else { STALLED }
    }
}

/// Two teams on one node: one with stalled streams, and another.
struct Scene {
    lab: Lab,
    /// Connection of the team with the stalled streams.
    channel: Channel,
    /// Two sandboxes of that team, one of them paused.
    running: String,
    paused: String,
    other: String,
    blue: String,
}

fn over(channel: &Channel, token: &str) -> Api {
    SandboxServiceClient::with_interceptor(channel.clone(), bearer(token))
        .max_decoding_message_size(4 << 20)
}

async fn made(api: &mut Api, request_id: &str) -> String {
    let request = CreateSandboxRequest { node: "n1".into(), ..request(request_id) };
    create(api, request).await.expect("made").id
}

fn endless() -> impl futures_util::Stream<Item = Bytes> + Send {
    stream::repeat(Bytes::from(vec![0; 64 * 1024]))
}

impl Scene {
    async fn new() -> Self {
        let lab = Lab::new().await;
        let blue = token(&lab.store, "blue", "sandbox").await;
        let channel = lab.channel();
        let mut api = over(&channel, &lab.red);
        let running = made(&mut api, "r1").await;
        let paused = made(&mut api, "r2").await;
        let other = made(&mut lab.api_as(&blue), "b1").await;
        for (path, bytes) in [("/big", 8 << 20), ("/small", 100)] {
            for (api, id) in [(&mut api, &running), (&mut lab.api_as(&blue), &other)] {
                let start =
                    ArchiveStart { id: id.clone(), path: path.into(), ..ArchiveStart::default() };
                let start = upload_archive_request::Message::Start(start);
                let data = counted(bytes);
                let data = data.chunks(256 * 1024).map(|part| {
                    upload_archive_request::Message::Data(Bytes::copy_from_slice(part))
                });
                let messages: Vec<_> = std::iter::once(start)
                    .chain(data)
                    .map(|message| UploadArchiveRequest { message: Some(message) })
                    .collect();
                api.upload_archive(stream::iter(messages)).await.expect("uploaded");
            }
        }
        let pause = PauseSandboxRequest { id: paused.clone(), ..PauseSandboxRequest::default() };
        api.pause_sandbox(pause).await.expect("paused");
        Self { lab, channel, running, paused, other, blue }
    }

    /// Returns the team's client, on the connection of its streams.
    fn red(&self) -> Api {
        over(&self.channel, &self.lab.red)
    }

    /// Opens a stream and lets it stall.
    async fn stall(&self, kind: Kind, n: usize) -> Held {
        let mut api = self.red();
        let run = |args: &[&str]| ExecStart {
            exec_id: format!("{kind:?}-{n}"),
            ..argv(&self.running, args)
        };
        let start = |start| message(exec_request::Message::Start(start));
        match kind {
            Kind::Output | Kind::Drip => {
                let program = if kind == Kind::Drip { "drip" } else { "yes" };
                let input = stream::iter([start(argv(&self.running, &[program]))]);
                let output = api.exec(input.chain(stream::pending())).await.expect("started");
                Box::new(output)
            }
            Kind::Terminal => {
                let terminal = ExecStart { tty: true, ..run(&["yes"]) };
                let input = stream::iter([start(terminal)]).chain(stream::pending());
                Box::new(api.exec(input).await.expect("started"))
            }
            Kind::Logs => {
                let subject = stream_exec_request::Subject::Start(run(&["yes"]));
                let request = StreamExecRequest { subject: Some(subject), no_stdin: true };
                let first = api.stream_exec(request).await.expect("started");
                let attach = ExecAttach {
                    id: self.running.clone(),
                    exec_id: format!("{kind:?}-{n}"),
                    ..ExecAttach::default()
                };
                let subject = stream_exec_request::Subject::Attach(attach);
                let request = StreamExecRequest { subject: Some(subject), no_stdin: true };
                Box::new((first, api.stream_exec(request).await.expect("attached")))
            }
            Kind::GrpcWeb => {
                let subject = stream_exec_request::Subject::Start(run(&["yes"]));
                let request = StreamExecRequest { subject: Some(subject), no_stdin: true };
                Box::new(web_stream(&self.channel, &self.lab.red, "StreamExec", &request).await)
            }
            Kind::Stdin => {
                let zeros = endless().map(|bytes| message(exec_request::Message::Stdin(bytes)));
                let input = stream::iter([start(argv(&self.running, &["sleep"]))]).chain(zeros);
                Box::new(api.exec(input).await.expect("started"))
            }
            Kind::Upload => {
                let start = ArchiveStart {
                    id: self.paused.clone(),
                    path: "/up".into(),
                    ..ArchiveStart::default()
                };
                let start = upload_archive_request::Message::Start(start);
                let zeros = endless().map(upload_archive_request::Message::Data);
                let input = stream::iter([start]).chain(zeros);
                let input = input.map(|message| UploadArchiveRequest { message: Some(message) });
                Box::new(tokio::spawn(async move { api.upload_archive(input).await }))
            }
            Kind::ReadFile => {
                let (id, path) = (self.running.clone(), "/big".into());
                let request = ReadFileRequest { id, path, ..ReadFileRequest::default() };
                Box::new(api.read_file(request).await.expect("reads"))
            }
            Kind::Download => {
                let (id, path) = (self.running.clone(), "/big".into());
                let request = DownloadArchiveRequest { id, path, user: String::new() };
                Box::new(api.download_archive(request).await.expect("packs"))
            }
            Kind::Watch => {
                let request = WatchSandboxRequest { id: self.running.clone() };
                Box::new(api.watch_sandbox(request).await.expect("watches"))
            }
            Kind::Events => {
                let request = WatchEventsRequest { follow: true, ..WatchEventsRequest::default() };
                Box::new(api.watch_events(request).await.expect("watches"))
            }
        }
    }

    /// Makes every kind of call of one team on one of its sandboxes, each within its limit.
    async fn calls(&self, api: &mut Api, id: &str, beside: &str) {
        for n in 0..CALLS {
            let call = async {
                match n % 8 {
                    0 => drop(api.get_sandbox(GetSandboxRequest { id: id.into() }).await?),
                    1 => {
                        let request = ExecCommandRequest {
                            start: Some(argv(id, &["true"])),
                            ..ExecCommandRequest::default()
                        };
                        let answer = api.exec_command(request).await?.into_inner();
                        assert_eq!(answer.exit.expect("an exit").code, 0);
                    }
                    2 => {
                        let (id, path) = (id.into(), "/small".into());
                        drop(
                            api.stat_file(StatFileRequest { id, path, ..Default::default() })
                                .await?,
                        );
                    }
                    3 => {
                        let (id, path) = (id.into(), "/small".into());
                        let request = ReadFileRequest { id, path, ..ReadFileRequest::default() };
                        let mut pieces = api.read_file(request).await?.into_inner();
                        while let Some(piece) = pieces.next().await {
                            piece?;
                        }
                    }
                    4 => drop(
                        api.list_execs(ListExecsRequest { id: id.into(), ..Default::default() })
                            .await?,
                    ),
                    5 => {
                        let change = Sandbox { id: id.into(), ..Sandbox::default() };
                        let change = proto::update::request(change, &["lifetime"]);
                        drop(api.update_sandbox(change).await?);
                    }
                    6 => {
                        let request = PauseSandboxRequest { id: id.into(), or_stop: false };
                        drop(api.pause_sandbox(request).await?);
                        let id = id.into();
                        drop(api.resume_sandbox(ResumeSandboxRequest { id }).await?);
                    }
                    _ => {
                        let file = FileContent {
                            path: "/new".into(),
                            content: Bytes::from(vec![1; 200 * 1024]),
                            ..FileContent::default()
                        };
                        let (id, files) = (id.into(), vec![file]);
                        let request = WriteFilesRequest { id, files, ..Default::default() };
                        drop(api.write_files(request).await?);
                    }
                }
                Ok::<_, Status>(())
            };
            match timeout(LIMIT, call).await {
                Ok(Ok(())) => {}
                Ok(Err(status)) => panic!("call {n} beside {beside}: {status:?}"),
                Err(_) => panic!("call {n} beside {beside} was held up"),
            }
        }
    }

    /// Checks that everything else continues during the stall: other teams, the same connection,
    /// kill and resume, and the node is ready.
    async fn others_go_on(&self, kinds: &[Kind]) {
        let beside = format!("{kinds:?}");
        // One stream of the other team runs during all of this.
        let mut blue = self.lab.api_as(&self.blue);
        let (id, path) = (self.other.clone(), "/big".into());
        let request = DownloadArchiveRequest { id, path, user: String::new() };
        let mut whole = blue.download_archive(request).await.expect("packs").into_inner();
        let mut bytes = whole.next().await.expect("a piece").expect("no error").data.len();
        let mut held = Vec::new();
        for kind in kinds {
            for n in 0..kind.stalled() {
                let stalled = timeout(Duration::from_secs(5), self.stall(*kind, n)).await;
                held.push(stalled.unwrap_or_else(|_| panic!("{kind:?} {n} did not begin")));
            }
        }
        sleep(FULL).await;
        self.calls(&mut self.lab.api_as(&self.blue), &self.other, &beside).await;
        self.calls(&mut self.red(), &self.running, &format!("its own {beside}")).await;
        // The remedies of a caller work.
        let mut api = self.red();
        let kill = async {
            for exec in api
                .list_execs(ListExecsRequest { id: self.running.clone(), ..Default::default() })
                .await?
                .into_inner()
                .execs
            {
                let (id, exec_id) = (self.running.clone(), exec.exec_id);
                api.signal_exec(SignalExecRequest { id, exec_id, signal: 9 }).await?;
            }
            api.resume_sandbox(ResumeSandboxRequest { id: self.paused.clone() }).await?;
            Ok::<_, Status>(())
        };
        timeout(LIMIT, kill).await.expect("they get through").expect("kill and resume");
        for node in self.lab.domain().nodes().statuses() {
            assert_eq!(node.not_ready, None, "{} beside {beside}", node.name);
        }
        while let Some(piece) = whole.next().await {
            bytes += piece.unwrap_or_else(|error| panic!("beside {beside}: {error}")).data.len();
        }
        assert_eq!(bytes, 8 << 20, "beside {beside}");
        drop(held);
    }

    /// Returns how many callers are attached to this run.
    async fn attached(&self, exec_id: &str) -> u32 {
        let request = ListExecsRequest { id: self.running.clone(), ..Default::default() };
        let execs = self.red().list_execs(request).await.expect("a list").into_inner().execs;
        execs.iter().find(|exec| exec.exec_id == exec_id).expect("it runs").attached
    }
}

/// Returns the answer to a gRPC-Web call, its body unread.
async fn web_stream(
    channel: &Channel,
    token: &str,
    method: &str,
    message: &impl prost::Message,
) -> http::Response<tonic::body::Body> {
    let message = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).expect("small").to_be_bytes());
    frame.extend(message);
    let body = tonic::body::Body::new(Full::new(Bytes::from(frame)).map_err(|e| match e {}));
    let request = HttpRequest::post(format!("http://x/sandbox.v1.SandboxService/{method}"))
        .header("content-type", "application/grpc-web+proto")
        .header("authorization", format!("Bearer {token}"))
        .body(body)
        .expect("a request");
    channel.clone().oneshot(request).await.expect("an answer")
}

#[tokio::test(start_paused = true)]
async fn output_that_nobody_reads_holds_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Output]).await;
}

#[tokio::test(start_paused = true)]
async fn output_in_single_bytes_that_nobody_reads_breaks_no_connection() {
    Scene::new().await.others_go_on(&[Kind::Drip]).await;
}

#[tokio::test(start_paused = true)]
async fn terminals_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Terminal]).await;
}

#[tokio::test(start_paused = true)]
async fn logs_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Logs]).await;
}

#[tokio::test(start_paused = true)]
async fn grpc_web_streams_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::GrpcWeb]).await;
}

#[tokio::test(start_paused = true)]
async fn commands_that_do_not_read_their_stdin_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Stdin]).await;
}

#[tokio::test(start_paused = true)]
async fn uploads_into_a_paused_sandbox_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Upload]).await;
}

#[tokio::test(start_paused = true)]
async fn files_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::ReadFile]).await;
}

#[tokio::test(start_paused = true)]
async fn archives_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Download]).await;
}

#[tokio::test(start_paused = true)]
async fn watches_and_events_that_nobody_reads_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&[Kind::Watch, Kind::Events]).await;
}

#[tokio::test(start_paused = true)]
async fn all_kinds_at_once_hold_up_no_other_call() {
    Scene::new().await.others_go_on(&ALL).await;
}

/// Opens a connection to the API that can be cut.
fn connection(lab: &Lab) -> (Channel, CancellationToken) {
    let (dial, cut) = (lab.dial.clone(), CancellationToken::new());
    let cable = cut.clone();
    let channel = daemon::channel::over(Leg::Api, move || {
        let (dial, cut) = (dial.clone(), cable.clone());
        async move {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let gone = |_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            dial.send(Ok(far)).await.map_err(gone)?;
            Ok(Pipe::new(near, &cut))
        }
    });
    (channel, cut)
}

#[tokio::test(start_paused = true)]
async fn vanished_caller_is_noticed_though_its_stdin_was_not_taken() {
    let scene = Scene::new().await;
    for program in ["sleep", "yes"] {
        let (channel, cut) = connection(&scene.lab);
        let run = ExecStart { exec_id: program.into(), ..argv(&scene.running, &[program]) };
        let zeros = endless().map(|bytes| message(exec_request::Message::Stdin(bytes)));
        let input = stream::iter([message(exec_request::Message::Start(run))]).chain(zeros);
        let output = over(&channel, &scene.lab.red).exec(input).await.expect("started");
        sleep(FULL).await;
        assert_eq!(scene.attached(program).await, 1);
        cut.cancel();
        let missed = async {
            while scene.attached(program).await > 0 {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(Duration::from_secs(20), missed).await.expect("its node hears of it");
        drop(output);
    }
}

#[tokio::test(start_paused = true)]
async fn sandbox_gets_no_more_than_its_share_of_streams() {
    let scene = Scene::new().await;
    let (mut held, mut cuts) = (Vec::new(), Vec::new());
    let refused = loop {
        // Not over one connection, which has a limit of its own.
        let (channel, cut) = connection(&scene.lab);
        cuts.push(cut);
        let start = message(exec_request::Message::Start(argv(&scene.running, &["sleep"])));
        let input = stream::iter([start]).chain(stream::pending());
        match over(&channel, &scene.lab.red).exec(input).await {
            Ok(output) => held.push(output),
            Err(status) => break status,
        }
        assert!(held.len() < 1000, "there is a bound");
    };
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused:?}");
    assert_eq!(reason(Err::<(), _>(refused)), Reason::TooManyCalls);
    assert!(held.len() >= 64, "as many as it can run at a time: {}", held.len());
    let beside = "a sandbox with all its streams";
    scene.calls(&mut scene.lab.api_as(&scene.blue), &scene.other, beside).await;
    let request = ListExecsRequest { id: scene.running.clone(), ..Default::default() };
    scene.red().list_execs(request).await.expect("calls do not need a stream");
    for cut in cuts {
        cut.cancel();
    }
    sleep(FULL).await;
    let again = ExecCommandRequest {
        start: Some(argv(&scene.running, &["true"])),
        ..ExecCommandRequest::default()
    };
    scene.red().exec_command(again).await.expect("what was given back can be had");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn broken_bulk_connection_does_not_take_its_node_down() {
    let scene = Scene::new().await;
    let name = "n1".parse().expect("a node's name");
    let (to_command, input) = mpsc::channel(4);
    let start = message(exec_request::Message::Start(argv(&scene.running, &["cat"])));
    let input = stream::iter([start]).chain(ReceiverStream::new(input));
    let mut output = scene.red().exec(input).await.expect("started").into_inner();
    for line in ["before", "after"] {
        let stdin = message(exec_request::Message::Stdin(Bytes::from(line)));
        to_command.send(stdin).await.expect("it is read");
        let echo = async {
            loop {
                let said = output.next().await.expect("open").expect("no error").message;
                if let Some(exec_response::Message::Stdout(bytes)) = said
                    && !bytes.is_empty()
                {
                    return bytes;
                }
            }
        };
        let echo = timeout(Duration::from_secs(5), echo).await.expect("it goes on");
        assert_eq!(echo, line.as_bytes());
        scene.lab.net.cut_bulk(&name);
        for _ in 0..10 {
            sleep(Duration::from_millis(50)).await;
            let node = scene.lab.domain().nodes().get(&name).expect("a node");
            assert_eq!(node.down(), None);
        }
    }
}
