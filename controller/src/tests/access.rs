//! Tokens: what each allows, until when, and in which forms.

use std::collections::BTreeSet;

use http::Request as HttpRequest;
use proto::{Reason, sandbox::v1::*, scope::Scope};
use tower::ServiceExt as _;

use super::*;

impl Lab {
    /// Adds a token that expires after a time from now.
    async fn token_for(&self, expires: Duration) -> String {
        let order = token::Order {
            expires_ms: self.now_ms() + daemon::clock::millis(expires),
            ..token::Order::new("red".parse().expect("team"), proto::scope::Scopes::SANDBOX)
        };
        let issued = token::issue(order, self.now_ms());
        self.store.add_token(issued.token.clone()).await.expect("stored");
        issued.text(Format::Plain)
    }

    async fn used_ms(&self, text: &str) -> u64 {
        let (id, _) = proto::token::split(text).expect("a token");
        self.store.token(id).await.expect("store").expect("known").used_ms
    }
}

async fn look(api: &mut Api) -> Result<(), Status> {
    api.list_sandboxes(ListSandboxesRequest::default()).await.map(drop)
}

#[tokio::test(start_paused = true)]
async fn token_allows_the_calls_of_its_scopes_only() {
    let lab = Lab::new().await;
    let sandbox = lab.create("r1").await.expect("made");
    for (scopes, may) in [
        ("read", BTreeSet::from([Scope::Read])),
        ("exec", BTreeSet::from([Scope::Read, Scope::Exec])),
        ("manage", BTreeSet::from([Scope::Read, Scope::Manage])),
        ("admin", BTreeSet::from([Scope::Read, Scope::Admin])),
    ] {
        let text = token(&lab.store, "red", scopes).await;
        let mut api = lab.api_as(&text);
        let mut operator = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&text));
        let id = sandbox.id.clone();
        let stat = StatFileRequest { id: id.clone(), path: "/".into(), user: String::new() };
        let update = proto::update::request(Sandbox { id, ..Sandbox::default() }, &["metadata"]);
        let answers = [
            (Scope::Read, look(&mut api).await),
            (Scope::Exec, api.stat_file(stat).await.map(drop)),
            (Scope::Manage, api.update_sandbox(update).await.map(drop)),
            (Scope::Admin, operator.list_nodes(ListNodesRequest {}).await.map(drop)),
        ];
        for (needed, answer) in answers {
            let told = answer.as_ref().err().and_then(daemon::status::reason);
            let refused = told == Some(Reason::ScopeMissing);
            assert_eq!(refused, !may.contains(&needed), "{scopes} {needed:?} {answer:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn expired_token_is_refused_from_its_time_on() {
    let lab = Lab::new().await;
    let mut api = lab.api_as(&lab.token_for(Duration::from_secs(60)).await);
    look(&mut api).await.expect("before");
    tokio::time::sleep(Duration::from_secs(59)).await;
    look(&mut api).await.expect("just before");
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..2 {
        let status = look(&mut api).await.expect_err("over");
        assert!(status.message().contains("expired"), "{status:?}");
        assert_eq!(daemon::status::reason(&status), Some(Reason::TokenInvalid));
    }
}

#[tokio::test(start_paused = true)]
async fn last_use_is_written_once_a_minute_and_at_the_end() {
    let mut lab = Lab::new().await;
    let text = lab.token_for(Duration::from_hours(1)).await;
    let mut api = lab.api_as(&text);
    look(&mut api).await.expect("used");
    assert_eq!(lab.used_ms(&text).await, 0, "no call waits for a write");
    tokio::time::sleep(Duration::from_secs(61)).await;
    let first = lab.used_ms(&text).await;
    assert!(first > 0);
    for _ in 0..10 {
        look(&mut api).await.expect("used");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    let second = lab.used_ms(&text).await;
    assert!(second == first || second >= first + 60_000, "{first} {second}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    look(&mut api).await.expect("used");
    lab.controller.take().expect("a controller").stop().await;
    assert!(lab.used_ms(&text).await >= first + 120_000, "written at the end");
}

#[tokio::test(start_paused = true)]
async fn libraries_of_e2b_send_a_token_in_their_header_and_form() {
    let lab = Lab::new().await;
    let issued = issued("red", "read");
    lab.store.add_token(issued.token.clone()).await.expect("stored");
    let mut told = Vec::new();
    for text in [issued.text(Format::E2b), issued.text(Format::Plain), "e2b_00".into()] {
        let path = "/sandbox.v1.SandboxService/ListSandboxes";
        let request = HttpRequest::post(format!("http://x{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("x-api-key", text)
            .body(tonic::body::Body::empty())
            .expect("a request");
        let answer = lab.channel().oneshot(request).await.expect("an answer");
        let status = Status::from_header_map(answer.headers());
        told.push(status.as_ref().and_then(daemon::status::reason) == Some(Reason::TokenInvalid));
    }
    assert_eq!(told, [false, false, true]);
}
