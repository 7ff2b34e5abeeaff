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

#[tokio::test(start_paused = true)]
async fn operators_make_list_and_revoke_tokens_of_any_team() {
    let lab = Lab::new().await;
    let mut operator = lab.operator();
    let ask = CreateTokenRequest {
        team: "blue".into(),
        name: "ci".into(),
        user: "ada@example.com".into(),
        scopes: vec![Scope::Manage.into()],
        ttl: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        csr: String::new(),
    };
    let made = operator.create_token(ask.clone()).await.expect("made").into_inner();
    let shown = made.token.expect("a token");
    assert_eq!(shown.scopes().collect::<Vec<_>>(), [Scope::Read, Scope::Manage]);
    assert_eq!((shown.team.as_str(), shown.user.as_str()), ("blue", "ada@example.com"));
    let mut blue = lab.api_as(&made.text);
    create(&mut blue, request("r1")).await.expect("made with it");

    assert_eq!(reason(operator.create_token(ask.clone()).await), Reason::NameTaken);
    let hour = prost_types::Duration { seconds: 3600 * 24 * 365 * 11, nanos: 0 };
    for wrong in [
        CreateTokenRequest { team: "a b".into(), ..ask.clone() },
        CreateTokenRequest { name: "0123456789ab".into(), ..ask.clone() },
        CreateTokenRequest { user: "a\nb".into(), ..ask.clone() },
        CreateTokenRequest { scopes: vec![0], ..ask.clone() },
        CreateTokenRequest { scopes: vec![99], ..ask.clone() },
        CreateTokenRequest { ttl: Some(hour), ..ask.clone() },
    ] {
        assert_eq!(
            reason(operator.create_token(wrong.clone()).await),
            Reason::FieldInvalid,
            "{wrong:?}"
        );
    }

    for n in 0..5 {
        let more = CreateTokenRequest { name: format!("t{n}"), ..ask.clone() };
        operator.create_token(more).await.expect("made");
    }
    let (mut names, mut page_token) = (Vec::new(), String::new());
    loop {
        let team = "blue".to_owned();
        let ask = ListTokensRequest { team, page_size: 2, page_token, ..Default::default() };
        let page = operator.list_tokens(ask).await.expect("a page").into_inner();
        assert!(page.tokens.len() <= 2);
        names.extend(page.tokens.into_iter().map(|token| token.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    names.sort_unstable();
    assert_eq!(names, ["ci", "t0", "t1", "t2", "t3", "t4"]);
    let wrong = ListTokensRequest { page_token: "x".into(), ..Default::default() };
    assert_eq!(reason(operator.list_tokens(wrong).await), Reason::FieldInvalid);

    // By name in its team, by id in any.
    let by_name = |team: &str| RevokeTokenRequest { token: "ci".into(), team: team.into() };
    assert_eq!(reason(operator.revoke_token(by_name("")).await), Reason::TokenNotFound);
    let revoked = operator.revoke_token(by_name("blue")).await.expect("revoked").into_inner();
    assert!(revoked.token.expect("a token").revoked_at.is_some());
    assert_eq!(reason(look(&mut blue).await), Reason::TokenInvalid);
    let by_id = RevokeTokenRequest { token: shown.id, team: String::new() };
    operator.revoke_token(by_id).await.expect("twice is once");
    operator.create_token(ask).await.expect("the name is free again");

    let teams = operator.list_teams(ListTeamsRequest { page_size: 1, ..Default::default() });
    let teams = teams.await.expect("a page").into_inner();
    assert_eq!((teams.teams[0].name.as_str(), teams.next_page_token.as_str()), ("blue", "blue"));
    let next = ListTeamsRequest { page_token: "blue".into(), ..Default::default() };
    let teams = operator.list_teams(next).await.expect("a page").into_inner();
    assert_eq!((teams.teams[0].name.as_str(), teams.next_page_token.as_str()), ("red", ""));
}

/// Status of a refusal without what differs by the request: everything that a caller can read.
fn told<T: std::fmt::Debug>(answer: Result<T, Status>, id: &str) -> (i32, String, Vec<u8>, String) {
    let status = answer.expect_err("refused");
    let without = |text: &str| text.replace(id, "ID");
    let details = String::from_utf8_lossy(status.details()).into_owned();
    let mut headers = status.metadata().clone().into_headers();
    // The second of the answer, which is the controller's clock.
    headers.remove("date");
    let metadata = format!("{headers:?}");
    (status.code() as i32, without(status.message()), without(&details).into_bytes(), metadata)
}

/// Answer to a call about an object that the caller's team does not have, and what it has cost.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    told: (i32, String, Vec<u8>, String),
    transactions: u64,
    node_calls: usize,
}

/// Lab whose store and nodes are watched.
struct Watched {
    lab: Lab,
    memory: Arc<Memory>,
}

impl Watched {
    /// Number of transactions of the store, and of calls that have come to the nodes.
    fn counts(&self) -> (u64, usize) {
        let calls = self.lab.agents.iter().map(|agent| agent.arrived());
        (self.memory.transactions(), calls.sum())
    }

    async fn ask<T: std::fmt::Debug>(
        &self,
        call: impl Future<Output = Result<T, Status>>,
        id: &str,
    ) -> Asked {
        let before = self.counts();
        let told = told(call.await, id);
        // Whatever the call has left to others, while time stands still.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let after = self.counts();
        Asked { told, transactions: after.0 - before.0, node_calls: after.1 - before.1 }
    }

    /// Makes every kind of call that names a sandbox.
    async fn ask_all(&self, api: &mut Api, id: &str) -> Vec<Asked> {
        let named = || id.to_owned();
        let argv = Argv { args: vec!["true".into()] };
        let command = Some(exec_start::Command::Argv(argv));
        let start = Some(ExecStart { id: named(), command, ..ExecStart::default() });
        let exec = ExecCommandRequest { start, ..ExecCommandRequest::default() };
        let change = Sandbox { id: named(), ..Sandbox::default() };
        let change = proto::update::request(change, &["wake_on"]);
        let subject = Some(explain_placement_request::Subject::Id(named()));
        let file = FileContent { path: "/a".into(), ..FileContent::default() };
        let files = vec![file];
        let write = WriteFilesRequest { id: named(), files, user: String::new() };
        let stat = StatFileRequest { id: named(), path: "/a".into(), user: String::new() };
        let events = WatchEventsRequest { id: named(), ..WatchEventsRequest::default() };
        let expose =
            ExposeHttpServiceRequest { id: named(), name: String::new(), port: 80, visibility: 0 };
        let hide = HideHttpServiceRequest { id: named(), name: "port-80".into() };
        let link = CreateAccessLinkRequest {
            id: named(),
            service: "80".into(),
            ..CreateAccessLinkRequest::default()
        };
        let revoke = RevokeAccessRequest { id: named(), service: "80".into() };
        let usage = GetUsageRequest { ids: vec![named()], ..GetUsageRequest::default() };
        let execs = ListExecsRequest { id: named(), ..ListExecsRequest::default() };
        let pause = PauseSandboxRequest { id: named(), or_stop: true };
        vec![
            self.ask(api.get_sandbox(GetSandboxRequest { id: named() }), id).await,
            self.ask(api.delete_sandbox(DeleteSandboxRequest { id: named() }), id).await,
            self.ask(api.start_sandbox(StartSandboxRequest { id: named() }), id).await,
            self.ask(api.stop_sandbox(StopSandboxRequest { id: named(), grace: None }), id).await,
            self.ask(api.pause_sandbox(pause), id).await,
            self.ask(api.resume_sandbox(ResumeSandboxRequest { id: named() }), id).await,
            self.ask(api.watch_sandbox(WatchSandboxRequest { id: named() }), id).await,
            self.ask(api.explain_placement(ExplainPlacementRequest { subject }), id).await,
            self.ask(api.update_sandbox(change), id).await,
            self.ask(api.exec_command(exec), id).await,
            self.ask(api.list_execs(execs), id).await,
            self.ask(api.write_files(write), id).await,
            self.ask(api.stat_file(stat), id).await,
            self.ask(api.watch_events(events), id).await,
            self.ask(api.expose_http_service(expose), id).await,
            self.ask(api.hide_http_service(hide), id).await,
            self.ask(api.create_access_link(link), id).await,
            self.ask(api.revoke_access(revoke), id).await,
            self.ask(api.get_usage(usage), id).await,
        ]
    }

    /// Makes the calls of another team, for pairs of what a team has and what nobody has, in the same form.
    async fn pairs(&self) -> Vec<(String, [Vec<Asked>; 2])> {
        let lab = &self.lab;
        let theirs = CreateSandboxRequest { name: "web".into(), ..request("r1") };
        let theirs = create(&mut lab.api(), theirs).await.expect("made");
        let ended = lab.create("r2").await.expect("made");
        let delete = DeleteSandboxRequest { id: ended.id.clone() };
        lab.api().delete_sandbox(delete).await.expect("deleted");
        let nobody = proto::id::SandboxId::new(1_600_000_000_000, &[7; 10]).to_string();
        let mut api = lab.api_as(&token(&lab.store, "blue", "sandbox").await);
        look(&mut api).await.expect("the token is known");
        let vmid = theirs.vmid.to_string();
        let mut all = Vec::new();
        for (known, unknown) in [
            (theirs.id.as_str(), nobody.as_str()),
            (ended.id.as_str(), nobody.as_str()),
            (vmid.as_str(), "299999"),
            ("web", "wab"),
        ] {
            let of_known = self.ask_all(&mut api, known).await;
            let of_unknown = self.ask_all(&mut api, unknown).await;
            all.push((known.to_owned(), [of_known, of_unknown]));
        }
        all
    }
}

async fn watched() -> Watched {
    let memory = Arc::new(Memory::new());
    Watched { lab: Lab::over(memory.clone()).await, memory }
}

#[tokio::test(start_paused = true)]
async fn id_of_another_team_is_answered_as_one_that_nobody_has() {
    for (known, [of_known, of_unknown]) in watched().await.pairs().await {
        for (known_one, unknown_one) in of_known.iter().zip(&of_unknown) {
            assert_eq!(known_one.told, unknown_one.told, "{known}");
            assert_eq!(known_one.told.0, tonic::Code::NotFound as i32, "{known_one:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn id_of_another_team_costs_what_one_costs_that_nobody_has() {
    for (known, [of_known, of_unknown]) in watched().await.pairs().await {
        for (known_one, unknown_one) in of_known.iter().zip(&of_unknown) {
            let cost = |asked: &Asked| (asked.transactions, asked.node_calls);
            assert_eq!(cost(known_one), cost(unknown_one), "{known}: {known_one:?}");
            // Each call reads its token at least, so the transactions are counted.
            assert!(known_one.transactions > 0, "{known_one:?}");
            assert_eq!(known_one.node_calls, 0, "no node hears of it: {known_one:?}");
        }
    }
}
