//! Tokens that end while their calls are under way.

use futures_util::stream;
use proto::{Reason, sandbox::v1::*};
use tokio::{task::JoinSet, time::Instant};
use tokio_stream::StreamExt as _;
use tonic::{Code, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use super::{
    exec::{argv, message},
    *,
};
use crate::node::fake::counted;

/// Longest time from the end of a token to that of its calls, and some for the way.
const SOON: Duration = Duration::from_millis(1200);

type Call = std::pin::Pin<Box<dyn Future<Output = Status> + Send>>;

/// Reads a stream to its error.
async fn last<T>(answer: Result<tonic::Response<Streaming<T>>, Status>) -> Status {
    let mut stream = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return status,
    };
    loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => return Status::ok("the stream has ended"),
            Err(status) => return status,
        }
    }
}

/// Begins a call of each kind that lasts, on a connection of its own.
fn calls(lab: &Lab, token: &str, id: &str) -> Vec<(&'static str, Call)> {
    let api = || lab.api_as(token);
    let operator = OperatorServiceClient::with_interceptor(lab.channel(), bearer(token));
    let run = |exec_id: &str| ExecStart { exec_id: exec_id.into(), ..argv(id, &["sleep"]) };
    let start = message(exec_request::Message::Start(run("")));
    let exec = stream::iter([start]).chain(stream::pending());
    let subject = Some(stream_exec_request::Subject::Start(run("named")));
    let output = StreamExecRequest { subject, no_stdin: true };
    let command = ExecCommandRequest { start: Some(run("")), ..ExecCommandRequest::default() };
    let begin = ArchiveStart { id: id.into(), path: "/up".into(), ..ArchiveStart::default() };
    let begin =
        UploadArchiveRequest { message: Some(upload_archive_request::Message::Start(begin)) };
    let upload = stream::iter([begin]).chain(stream::pending());
    let follow = WatchEventsRequest { follow: true, ..WatchEventsRequest::default() };
    let all = WatchAllEventsRequest { follow: true, ..WatchAllEventsRequest::default() };
    let service = "sandbox.v1.SandboxService".to_owned();
    let port = ForwardTcp { port: 9, ..ForwardTcp::default() };
    let open = ForwardOpen { id: id.into(), target: Some(forward_open::Target::Tcp(port)) };
    let open = ForwardRequest { message: Some(forward_request::Message::Open(open)) };
    let forward = stream::iter([open]).chain(stream::pending());
    let listen = ForwardListenRequest { id: id.into(), port: 80 };
    let (mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h, mut i) =
        (api(), api(), api(), api(), api(), api(), api(), api(), api());
    let mut operator = operator;
    let mut health = HealthClient::with_interceptor(lab.channel(), bearer(token));
    let mut reflection = ServerReflectionClient::with_interceptor(lab.channel(), bearer(token));
    let watch = WatchSandboxRequest { id: id.into() };
    vec![
        ("WatchSandbox", Box::pin(async move { last(a.watch_sandbox(watch).await).await })),
        (
            "WatchSandboxes",
            Box::pin(async move {
                last(b.watch_sandboxes(WatchSandboxesRequest::default()).await).await
            }),
        ),
        ("WatchEvents", Box::pin(async move { last(c.watch_events(follow).await).await })),
        (
            "WatchAllEvents",
            Box::pin(async move { last(operator.watch_all_events(all).await).await }),
        ),
        ("Exec", Box::pin(async move { last(d.exec(exec).await).await })),
        ("StreamExec", Box::pin(async move { last(e.stream_exec(output).await).await })),
        (
            "ExecCommand",
            Box::pin(async move {
                f.exec_command(command).await.err().unwrap_or_else(|| Status::ok("an answer"))
            }),
        ),
        (
            "UploadArchive",
            Box::pin(async move {
                g.upload_archive(upload).await.err().unwrap_or_else(|| Status::ok("an answer"))
            }),
        ),
        ("Forward", Box::pin(async move { last(h.forward(forward).await).await })),
        ("ForwardListen", Box::pin(async move { last(i.forward_listen(listen).await).await })),
        (
            "Watch",
            Box::pin(async move { last(health.watch(HealthCheckRequest { service }).await).await }),
        ),
        (
            "ServerReflectionInfo",
            Box::pin(async move {
                last(reflection.server_reflection_info(stream::pending()).await).await
            }),
        ),
    ]
}

impl Lab {
    /// Adds a token that may make all calls of team red; returns its text and its id.
    async fn second(&self, expires_ms: u64) -> (String, String) {
        let scopes = "sandbox operator".parse().expect("scopes");
        let order =
            token::Order { expires_ms, ..token::Order::new("red".parse().expect("team"), scopes) };
        let issued = token::issue(order, 1);
        self.store.add_token(issued.token.clone()).await.expect("stored");
        (issued.text(Format::Plain), issued.token.id)
    }

    /// Begins all calls with a token, ends the token, and checks that each call ends soon, as a new one does.
    async fn calls_end(&self, token: &str, says: &str, end: impl AsyncFnOnce()) {
        let sandbox = self.create("r1").await.expect("made");
        let mut under_way = JoinSet::new();
        for (name, call) in calls(self, token, &sandbox.id) {
            under_way.spawn(async move { (name, call.await) });
        }
        let other = WatchSandboxRequest { id: sandbox.id.clone() };
        let mut other = self.api().watch_sandbox(other).await.expect("watches").into_inner();
        tokio::time::sleep(Duration::from_secs(5)).await;
        if let Some(ended) = under_way.try_join_next() {
            panic!("it does not last: {ended:?}");
        }
        end().await;
        let ended = Instant::now();
        while let Some(call) = under_way.join_next().await {
            let (name, status) = call.expect("no panic");
            assert!(ended.elapsed() <= SOON, "{name} after {:?}", ended.elapsed());
            assert_eq!(status.code(), Code::Unauthenticated, "{name} {status:?}");
            assert_eq!(daemon::status::reason(&status), Some(Reason::TokenInvalid), "{name}");
            assert!(status.message().contains(says), "{name} {status:?}");
        }
        // Another token of the team goes on.
        other.next().await.expect("a message").expect("no error");
        self.get(&sandbox.id).await.expect("found");
    }
}

#[tokio::test(start_paused = true)]
async fn revoked_token_ends_its_calls_at_once() {
    let lab = Lab::new().await;
    let (text, id) = lab.second(0).await;
    let revoke = RevokeTokenRequest { token: id, team: String::new() };
    let mut operator = lab.operator();
    lab.calls_end(&text, "revoked", async || {
        operator.revoke_token(revoke).await.expect("revoked");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn token_that_is_revoked_in_the_store_alone_ends_its_calls() {
    let lab = Lab::new().await;
    let (text, id) = lab.second(0).await;
    // As `pve-sandbox-controller token revoke` does: nobody tells the controller.
    lab.calls_end(&text, "revoked", async || {
        assert!(lab.store.revoke_token(&id, 5).await.expect("store"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn token_that_expires_ends_its_calls() {
    let lab = Lab::new().await;
    // Before a command of a unary call is given up.
    let expires_ms = lab.now_ms() + 15_000;
    let (text, _) = lab.second(expires_ms).await;
    lab.calls_end(&text, "expired", async || {
        tokio::time::sleep(Duration::from_millis(expires_ms - lab.now_ms())).await;
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn token_that_revokes_itself_gets_its_answer() {
    let lab = Lab::new().await;
    let (text, id) = lab.second(0).await;
    let mut operator = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&text));
    let revoke = RevokeTokenRequest { token: id, team: String::new() };
    let answer = operator.revoke_token(revoke.clone()).await.expect("revoked").into_inner();
    assert!(answer.token.expect("a token").revoked_at.is_some());
    assert_eq!(reason(operator.revoke_token(revoke).await), Reason::TokenInvalid);
}

#[tokio::test(start_paused = true)]
async fn stream_that_nobody_reads_gives_its_permit_back_with_its_token() {
    let mut lab = Lab::new().await;
    lab.limits = ApiLimits { team_streams_max: Some(1), ..ApiLimits::default() };
    lab.start().await;
    let sandbox = lab.create("r1").await.expect("made");
    let data = counted(8 << 20);
    let start =
        ArchiveStart { id: sandbox.id.clone(), path: "/big".into(), ..ArchiveStart::default() };
    let data = data.chunks(256 * 1024).map(bytes::Bytes::copy_from_slice);
    let messages: Vec<_> = std::iter::once(upload_archive_request::Message::Start(start))
        .chain(data.map(upload_archive_request::Message::Data))
        .map(|message| UploadArchiveRequest { message: Some(message) })
        .collect();
    lab.api().upload_archive(stream::iter(messages)).await.expect("uploaded");

    let (text, id) = lab.second(0).await;
    let read =
        ReadFileRequest { id: sandbox.id.clone(), path: "/big".into(), ..Default::default() };
    let mut stalled = lab.api_as(&text).read_file(read).await.expect("reads").into_inner();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let watch = || WatchSandboxRequest { id: sandbox.id.clone() };
    assert_eq!(reason(lab.api().watch_sandbox(watch()).await), Reason::TooManyCalls);
    let revoke = RevokeTokenRequest { token: id, team: String::new() };
    lab.operator().revoke_token(revoke).await.expect("revoked");
    lab.api().watch_sandbox(watch()).await.expect("there is room again");
    // Who reads on gets what was on its way, and then the end.
    let mut read = 0;
    let status = loop {
        match stalled.message().await {
            Ok(piece) => read += piece.expect("an error at the end").data.len(),
            Err(status) => break status,
        }
    };
    assert_eq!(daemon::status::reason(&status), Some(Reason::TokenInvalid));
    assert!(read < 8 << 20, "{read}");
}

#[tokio::test(start_paused = true)]
async fn command_outlives_the_token_that_started_it() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    let (text, id) = lab.second(0).await;
    let run = ExecStart { exec_id: "job".into(), ..argv(&sandbox.id, &["sleep"]) };
    let subject = Some(stream_exec_request::Subject::Start(run));
    let request = StreamExecRequest { subject, no_stdin: true };
    let output = lab.api_as(&text).stream_exec(request).await.expect("started");
    let revoke = RevokeTokenRequest { token: id, team: String::new() };
    lab.operator().revoke_token(revoke).await.expect("revoked");
    assert_eq!(last(Ok(output)).await.code(), Code::Unauthenticated);
    let attach =
        ExecAttach { id: sandbox.id.clone(), exec_id: "job".into(), ..ExecAttach::default() };
    let subject = Some(stream_exec_request::Subject::Attach(attach));
    let request = StreamExecRequest { subject, no_stdin: true };
    let mut output = lab.api().stream_exec(request).await.expect("attached").into_inner();
    let kill = SignalExecRequest { id: sandbox.id, exec_id: "job".into(), signal: 15 };
    lab.api().signal_exec(kill).await.expect("signalled");
    let mut exit = None;
    while let Some(said) = output.message().await.expect("no error") {
        if let Some(ExecResponse { message: Some(exec_response::Message::Exit(told)) }) =
            said.message
        {
            exit = Some(told.signal);
        }
    }
    assert_eq!(exit, Some(15));
}
