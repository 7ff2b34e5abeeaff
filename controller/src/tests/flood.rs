//! Callers that take all they can get, with and without a token, and what is left for others.

use futures_util::stream;
use http::Request as HttpRequest;
use http_body_util::StreamBody;
use proto::{Reason, sandbox::v1::*};
use tokio::{task::JoinSet, time::Instant};
use tokio_stream::StreamExt as _;
use tonic::{Code, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tower::ServiceExt as _;

use super::*;

/// Less than any wait.
const MOMENT: Duration = Duration::from_millis(4);
const CHECK: &str = "/grpc.health.v1.Health/Check";

/// Every path that can be called without a token, and one that does not exist.
const OPEN: &[&str] = &[
    CHECK,
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/sandbox.v1.SandboxService/GetSandbox",
    "/sandbox.v1.SandboxService/Exec",
    "/sandbox.v1.SandboxService/NoSuchMethod",
    "/",
];

/// A message that never comes.
fn never() -> tonic::body::Body {
    tonic::body::Body::new(StreamBody::new(stream::pending::<Result<_, Status>>()))
}

type Answered = Result<http::Response<tonic::body::Body>, tonic::transport::Error>;

/// Begins a call whose message never comes; returns its answer, which nobody reads.
async fn stall(
    channel: Channel,
    path: &str,
    content_type: &str,
    token: Option<String>,
) -> Answered {
    let mut request = HttpRequest::post(format!("http://x{path}"))
        .header("content-type", content_type)
        .header("te", "trailers");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request.body(never()).expect("a request");
    channel.oneshot(request).await
}

async fn check(channel: Channel) -> Result<i32, Status> {
    let service = "sandbox.v1.SandboxService".to_owned();
    let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await?;
    Ok(answer.into_inner().status)
}

async fn list(api: &mut Api) -> Result<(), Status> {
    api.list_sandboxes(ListSandboxesRequest::default()).await.map(drop)
}

#[tokio::test(start_paused = true)]
async fn callers_without_a_token_take_nothing_from_teams() {
    let lab = Lab::new().await;
    let mut blue = lab.api_as(&token(&lab.store, "blue", "sandbox").await);
    list(&mut blue).await.expect("before");
    let unknown = issued("red", "sandbox").text(Format::Plain);
    let mut flood = JoinSet::new();
    let mut channels = Vec::new();
    for n in 0..90 {
        let channel = lab.channel();
        channels.push(channel.clone());
        for path in OPEN {
            for kind in ["application/grpc", "application/grpc-web+proto"] {
                for token in [None, Some("nonsense".to_owned()), Some(unknown.clone())] {
                    flood.spawn(stall(channel.clone(), path, kind, token));
                }
            }
        }
        if n % 50 == 31 {
            // Also during the flood.
            list(&mut blue).await.expect("while they come");
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The flood is still there: its own connections have no free permit.
    let checks: JoinSet<_> = channels.iter().cloned().map(check).collect();
    for answer in checks.join_all().await {
        assert_eq!(reason(answer), Reason::TooManyCalls);
    }
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        list(&mut blue).await.expect("a call of a team");
        list(&mut lab.api()).await.expect("on a connection that comes later");
        assert_eq!(check(lab.channel()).await.expect("a check of health"), 1);
    }
    drop((flood, channels));
}

#[tokio::test(start_paused = true)]
async fn health_checks_without_a_message_end_and_few_wait() {
    let lab = Lab::new().await;
    let channel = lab.channel();
    let begin = |channel: Channel| async move {
        let request = HttpRequest::post(format!("http://x{CHECK}"))
            .header("content-type", "application/grpc")
            .body(never())
            .expect("a request");
        let answer = channel.oneshot(request).await.expect("an answer");
        Status::from_header_map(answer.headers()).expect("a status")
    };
    let mut calls: JoinSet<_> = (0..10).map(|_| begin(channel.clone())).collect();
    let mut answers = Vec::new();
    while let Some(answer) = calls.join_next().await {
        let status = answer.expect("no panic");
        answers.push((status.code(), daemon::status::reason(&status).expect("a reason")));
    }
    let (busy, late) = (Reason::TooManyCalls, Reason::OutcomeUnknown);
    let refused = answers.iter().filter(|a| **a == (Code::ResourceExhausted, busy)).count();
    let ended = answers.iter().filter(|a| **a == (Code::DeadlineExceeded, late)).count();
    assert_eq!((refused, ended), (6, 4), "{answers:?}");
    assert_eq!(check(channel).await.expect("there is room again"), 1);
}

#[tokio::test(start_paused = true)]
async fn health_check_with_a_long_message_is_refused() {
    let lab = Lab::new().await;
    let long = HealthCheckRequest { service: "x".repeat(5000) };
    let answer = HealthClient::new(lab.channel()).check(long).await;
    assert_eq!(reason(answer), Reason::TooLarge);
}

#[tokio::test(start_paused = true)]
async fn health_check_is_open_but_watch_and_reflection_need_a_token() {
    let lab = Lab::new().await;
    assert_eq!(check(lab.channel()).await.expect("healthy"), 1);
    let unknown = HealthCheckRequest { service: "no.Such".into() };
    let answer = HealthClient::new(lab.channel()).check(unknown).await;
    assert_eq!(answer.expect_err("unknown").code(), Code::NotFound);

    let watch = || HealthCheckRequest { service: "sandbox.v1.SandboxService".into() };
    let answer = HealthClient::new(lab.channel()).watch(watch()).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);
    let plain = token(&lab.store, "blue", "sandbox").await;
    let mut health = HealthClient::with_interceptor(lab.channel(), bearer(&plain));
    let mut seen = health.watch(watch()).await.expect("with one").into_inner();
    assert_eq!(seen.next().await.expect("a word").expect("no error").status, 1);

    let ask = || {
        stream::iter([ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        }])
    };
    let answer = ServerReflectionClient::new(lab.channel()).server_reflection_info(ask()).await;
    assert_eq!(reason(answer), Reason::TokenInvalid);
    let mut client = ServerReflectionClient::with_interceptor(lab.channel(), bearer(&plain));
    let mut answers = client.server_reflection_info(ask()).await.expect("asked").into_inner();
    let answer = answers.next().await.expect("an answer").expect("no error").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"sandbox.v1.SandboxService".to_owned()), "{names:?}");
}

/// Opens watches on one connection until one is refused: never does one wait without a word.
async fn watch_all(
    lab: &Lab,
    token: &str,
    id: &str,
) -> (Vec<Streaming<WatchSandboxResponse>>, Status) {
    let (mut watches, mut api) = (Vec::new(), lab.api_as(token));
    loop {
        match api.watch_sandbox(WatchSandboxRequest { id: id.into() }).await {
            Ok(watch) => watches.push(watch.into_inner()),
            Err(status) => return (watches, status),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn team_with_all_its_streams_disturbs_no_other_call() {
    let mut lab = Lab::new().await;
    lab.limits = ApiLimits { streams_max: 400, ..ApiLimits::default() };
    lab.start().await;
    let red = lab.create("r1").await.expect("made");
    let blue = token(&lab.store, "blue", "sandbox").await;
    let theirs = create(&mut lab.api_as(&blue), request("r1")).await.expect("made");

    let (mut watches, status) = watch_all(&lab, &lab.red.clone(), &red.id).await;
    assert_eq!((watches.len(), status.code()), (200, Code::ResourceExhausted));
    assert_eq!(daemon::status::reason(&status), Some(Reason::TooManyCalls));
    assert!(daemon::status::retry_after(&status).is_some(), "{status:?}");
    assert!(status.message().contains("team red has 200 streams"), "{status:?}");

    lab.get(&red.id).await.expect("a call that is no stream");
    let delete = DeleteSandboxRequest { id: theirs.id.clone() };
    let watch = WatchSandboxRequest { id: theirs.id };
    let mut api = lab.api_as(&blue);
    let mut watch = api.watch_sandbox(watch).await.expect("another team's watch").into_inner();
    watch.next().await.expect("a word").expect("no error");
    api.delete_sandbox(delete).await.expect("another team's call");

    // A permit is released when its stream has ended.
    drop(watches.pop());
    let mut tries = 0;
    while let Err(status) =
        lab.api().watch_sandbox(WatchSandboxRequest { id: red.id.clone() }).await
    {
        assert_eq!(status.code(), Code::ResourceExhausted);
        tries += 1;
        assert!(tries < 100, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn calls_without_a_message_use_only_their_teams_permits() {
    let mut lab = Lab::new().await;
    lab.limits = ApiLimits { calls_max: 200, ..ApiLimits::default() };
    lab.start().await;
    let blue = token(&lab.store, "blue", "sandbox").await;
    let (mut flood, mut channels) = (JoinSet::new(), Vec::new());
    for _ in 0..40 {
        let channel = lab.channel();
        channels.push(channel.clone());
        for _ in 0..20 {
            let (channel, red) = (channel.clone(), Some(lab.red.clone()));
            let path = "/sandbox.v1.SandboxService/GetSandbox";
            flood.spawn(async move { stall(channel, path, "application/grpc", red).await });
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut answers = std::collections::BTreeMap::<String, usize>::new();
    while let Some(answer) = flood.try_join_next() {
        let answer = answer.expect("no panic").expect("an answer");
        let status = Status::from_header_map(answer.headers()).expect("a status");
        *answers.entry(format!("{:?} {}", status.code(), status.message())).or_default() += 1;
    }
    assert_eq!(flood.len(), 100, "as many as the team may have wait: {answers:?}");
    assert_eq!(reason(list(&mut lab.api()).await), Reason::TooManyCalls);
    list(&mut lab.api_as(&blue)).await.expect("another team's call");
    assert_eq!(check(lab.channel()).await.expect("healthy"), 1);
    // They do not keep the permits for ever.
    tokio::time::sleep(Duration::from_secs(121)).await;
    list(&mut lab.api()).await.expect("red's own");
}

#[tokio::test(start_paused = true)]
async fn every_team_keeps_its_share_beside_many_teams() {
    let mut lab = Lab::new().await;
    lab.limits = ApiLimits { streams_max: 100, ..ApiLimits::default() };
    lab.start().await;
    let mut held = Vec::new();
    for team in ["t1", "t2", "t3", "t4", "t5", "t6"] {
        let token = token(&lab.store, team, "sandbox").await;
        let sandbox = create(&mut lab.api_as(&token), request("r1")).await.expect("made");
        held.push(watch_all(&lab, &token, &sandbox.id).await);
    }
    let red = lab.create("r1").await.expect("made");
    let mut watch = WatchSandboxRequest { id: red.id };
    let mut stream = lab.api().watch_sandbox(watch.clone()).await.expect("a stream").into_inner();
    stream.next().await.expect("a word").expect("no error");
    watch.id.clear();
    assert_eq!(reason(lab.api().watch_sandbox(watch).await), Reason::FieldInvalid);
}

#[tokio::test(start_paused = true)]
async fn revoked_token_is_refused_at_once() {
    let lab = Lab::new().await;
    let text = token(&lab.store, "blue", "sandbox").await;
    let mut api = lab.api_as(&text);
    for _ in 0..3 {
        list(&mut api).await.expect("good");
    }
    let (id, _) = proto::token::split(&text).expect("a token");
    lab.store.revoke_token(id, 5).await.expect("revoked");
    for _ in 0..3 {
        assert_eq!(reason(list(&mut api).await), Reason::TokenInvalid);
    }
}

#[tokio::test(start_paused = true)]
async fn caller_that_repeats_a_refused_call_without_a_pause_waits_and_teams_do_not() {
    let lab = Lab::new().await;
    let unknown = issued("red", "sandbox").text(Format::Plain);
    let mut stranger = lab.api_as(&unknown);
    let begun = Instant::now();
    for number in 0..300 {
        let answer = stranger.get_sandbox(GetSandboxRequest { id: "x".into() }).await;
        assert_eq!(reason(answer), Reason::TokenInvalid);
        if number == 0 {
            assert!(begun.elapsed() < MOMENT, "a single mistake is told at once");
        }
    }
    // 100 at once, and 200 others, 5 ms each.
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
    let begun = Instant::now();
    list(&mut lab.api()).await.expect("a call of a team");
    assert_eq!(check(lab.channel()).await.expect("a check of health"), 1);
    assert!(begun.elapsed() < MOMENT, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn health_checks_without_a_pause_wait_and_those_of_another_connection_do_not() {
    let lab = Lab::new().await;
    let (channel, begun) = (lab.channel(), Instant::now());
    for _ in 0..60 {
        assert_eq!(check(channel.clone()).await.expect("healthy"), 1);
    }
    // 20 at once, and 40 others, 50 ms each.
    assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(check(lab.channel()).await.expect("healthy"), 1);
    assert!(begun.elapsed() < MOMENT, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn connection_is_closed_when_too_many_refusals_wait_unless_a_team_uses_it() {
    let lab = Lab::new().await;
    let unknown = issued("red", "sandbox").text(Format::Plain);
    for has_a_team in [false, true] {
        let channel = lab.channel();
        if has_a_team {
            let good = SandboxServiceClient::with_interceptor(channel.clone(), bearer(&lab.red));
            list(&mut { good }).await.expect("listed");
        }
        let mut calls = JoinSet::new();
        for _ in 0..5000 {
            let mut bad = SandboxServiceClient::with_interceptor(channel.clone(), bearer(&unknown));
            calls.spawn(async move { bad.get_sandbox(GetSandboxRequest { id: "x".into() }).await });
        }
        let answers = calls.join_all().await;
        let told = |answer: &&Result<_, Status>| {
            answer.as_ref().err().and_then(daemon::status::reason).is_some()
        };
        let told = answers.iter().filter(told).count();
        assert_eq!(told == answers.len(), has_a_team, "{told}");
    }
}
