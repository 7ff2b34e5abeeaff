//! Who reaches an open port: links, sessions, tokens, and that the sandbox sees no credential.

use agent::{
    clock::{Clock as _, SystemClock},
    ingress::{Owner, State},
    sandbox::access::credential::{Credential, Purpose},
};
use proto::{name::Port, visibility::Visibility};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::{
    http::{Request, Response, get, once},
    node::{Node, PARENT, at, host, id, key, need_caddy},
    peers::{Pki, two},
    sandbox::Sandbox,
};

/// Sandbox of these tests.
const NUMBER: u32 = 100_001;

/// Time now, seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemClock::default().now_ms() / 1000
}

/// Signs a credential for port 8000, generation 1, that is good for some seconds.
pub(crate) fn credential(purpose: Purpose, life_s: u64) -> String {
    let made = Credential {
        purpose,
        port: Port::try_from(8000).expect("a port"),
        generation: 1,
        expires_s: now_s() + life_s,
        user: Some("ada@example.com".parse().expect("a label")),
    };
    made.sign(&key(NUMBER), &id(NUMBER))
}

/// Headers of a browser that loads a page.
fn page<'a>(host: &'a str, target: &'a str) -> Request<'a> {
    Request::get(host, target).with("Accept", "text/html,*/*").with("Sec-Fetch-Mode", "navigate")
}

/// Checks that the last request had no credential, and the identity that we say.
#[track_caller]
fn assert_told(sandbox: &Sandbox, access: Option<&str>) {
    let head = sandbox.last().head;
    let shown = format!("{head:?}");
    for secret in ["sbxl1_", "sbxt1_", "sbxs1_", "sbx_token", "sbx_link", "forged"] {
        assert!(!shown.contains(secret), "{secret} came through: {shown}");
    }
    let ours: Vec<_> = head
        .headers
        .iter()
        .filter(|(name, _)| name.to_ascii_lowercase().replace(['_', '.'], "-").starts_with("x-sbx"))
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    match access {
        None => assert_eq!(ours, []),
        Some(access) => {
            assert_eq!(head.get("x-sbx-user"), Some("ada@example.com"), "{shown}");
            assert_eq!(head.get("x-sbx-access"), Some(access), "{shown}");
            assert_eq!(ours.len(), 2, "{shown}");
        }
    }
}

/// Checks that access is refused, in a form that a script in a browser can read.
#[track_caller]
fn assert_refused(answer: &Response, status: u16, form: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.head.get("content-type"), Some(form));
    assert_eq!(answer.head.get("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.head.get("cache-control"), Some("no-store"));
    assert!(!answer.head.any("x-sbx-") && !answer.head.any("set-cookie"), "{:?}", answer.head);
}

const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

#[tokio::test(flavor = "multi_thread")]
async fn link_begins_a_session_that_hide_ends() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(NUMBER, sandbox.address);
    node.table.guard(NUMBER, Visibility::Team, 1);
    let host = host(8000, NUMBER);

    assert_refused(&get(node.public, &host, "/").await, 401, JSON);
    let answer = once(node.public, &page(&host, "/")).await.expect("an answer");
    assert_refused(&answer, 401, HTML);
    assert!(answer.text().contains("sandboxctl link"), "{}", answer.text());
    assert!(sandbox.got().is_empty());

    let target = format!("/a%2Fb?x=1&sbx_link={}&y=%20", credential(Purpose::Link, 60));
    let answer = once(node.public, &page(&host, &target)).await.expect("an answer");
    assert_eq!(answer.status, 303, "{}", answer.text());
    assert_eq!(answer.head.get("location"), Some("/a%2Fb?x=1&y=%20"));
    assert_eq!(answer.head.get("referrer-policy"), Some("strict-origin"));
    let cookie = answer.head.get("set-cookie").expect("a session").to_owned();
    assert!(cookie.starts_with("__Host-sbx-8000=sbxs1_"), "{cookie}");
    for rule in ["Path=/", "Secure", "HttpOnly", "SameSite=None", "Partitioned"] {
        assert!(cookie.contains(rule), "{rule} in {cookie}");
    }
    assert!(!cookie.contains("Domain"), "{cookie}");
    assert!(sandbox.got().is_empty(), "the exchange does not reach the sandbox");

    let pair = cookie.split(';').next().expect("a pair");
    let cookies = format!("a=1; {pair}; b=2");
    let request = page(&host, "/x?y=1")
        .with("Cookie", &cookies)
        .with("X-Sbx-User", "forged")
        .with("x_sbx_user", "forged")
        .with("X.Sbx.Access", "forged");
    let answer = once(node.public, &request).await.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(sandbox.last().head.get("cookie"), Some("a=1; b=2"));
    assert_told(&sandbox, Some("team"));

    // A page of a sibling, which is the same site to a browser, cannot use the session; one that the operator
    // named can, and so can a frame.
    let sibling = Request { method: "POST", body: b"x", ..Request::get(&host, "/") }
        .with("Cookie", &cookies)
        .with("Sec-Fetch-Site", "same-site")
        .with("Sec-Fetch-Mode", "cors")
        .with("Origin", "https://port-8000-vm-100002.sbx.test");
    assert_refused(&once(node.public, &sibling).await.expect("an answer"), 403, JSON);
    let parent = Request { method: "POST", body: b"x", ..Request::get(&host, "/") }
        .with("Cookie", &cookies)
        .with("Sec-Fetch-Site", "cross-site")
        .with("Origin", PARENT);
    assert_eq!(once(node.public, &parent).await.expect("an answer").status, 200);
    let frame = page(&host, "/")
        .with("Cookie", &cookies)
        .with("Referer", "https://other.test/")
        .with("Sec-Fetch-Site", "cross-site")
        .with("Sec-Fetch-Dest", "iframe");
    assert_eq!(once(node.public, &frame).await.expect("an answer").status, 200);
    // A preflight has no cookie, and does not reach the application, whatever it brings along.
    let before = sandbox.got().len();
    for (origin, allowed) in [(PARENT, PARENT), ("https://other.test", "*")] {
        let preflight = Request { method: "OPTIONS", body: b"x", ..Request::get(&host, "/") }
            .with("Origin", origin)
            .with("Authorization", "Basic eDp5")
            .with("Access-Control-Request-Method", "PUT");
        let answer = once(node.public, &preflight).await.expect("an answer");
        assert_eq!(answer.status, 204);
        assert_eq!(answer.head.get("access-control-allow-origin"), Some(allowed));
        assert!(!answer.head.any("x-sbx-"), "{:?}", answer.head);
    }
    assert_eq!(sandbox.got().len(), before);

    // The port was hidden and opened again.
    let served = sandbox.got().len();
    node.table.guard(NUMBER, Visibility::Team, 2);
    let request = page(&host, "/").with("Cookie", &cookies);
    assert_refused(&once(node.public, &request).await.expect("an answer"), 401, HTML);
    let answer = once(node.public, &page(&host, &target)).await.expect("an answer");
    assert_refused(&answer, 401, HTML);
    assert_eq!(sandbox.got().len(), served);
}

#[tokio::test(flavor = "multi_thread")]
async fn token_opens_by_header_query_and_websocket_and_never_reaches_the_sandbox() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(NUMBER, sandbox.address);
    owner.table.guard(NUMBER, Visibility::Token, 1);
    edge.table.elsewhere(NUMBER, Owner::Peer(owner.peer));
    let host = host(8000, NUMBER);
    let token = credential(Purpose::Token, 60);
    // Directly, and through another node.
    for node in [&owner, &edge] {
        for header in ["X-Sbx-Token", "e2b-traffic-access-token", "x-daytona-preview-token"] {
            let request = Request { method: "POST", body: b"body", ..Request::get(&host, "/") }
                .with(header, &token)
                .with("X-Sbx-Access", "forged");
            let answer = once(node.public, &request).await.expect("an answer");
            assert_eq!(answer.status, 200, "{header}: {} {}", answer.text(), node.log());
            assert_told(&sandbox, Some("token"));
            assert!(!sandbox.last().head.any(header), "{header} came through");
        }
        for (target, seen) in [
            (format!("/a%2Fb?sbx_token={token}&x={{env.HOME}}"), "/a%2Fb?x={env.HOME}"),
            (format!("/?x=1&sbx_token={token}"), "/?x=1"),
            (format!("/a?sbx_token={token}"), "/a"),
        ] {
            let post = Request { method: "POST", body: b"body", ..Request::get(&host, &target) };
            let answer = once(node.public, &post).await.expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert_eq!(sandbox.last().head.line, format!("POST {seen} HTTP/1.1"));
            assert_told(&sandbox, Some("token"));
            // A browser is led to the URL without it.
            let answer = once(node.public, &page(&host, &target)).await.expect("an answer");
            assert_eq!((answer.status, answer.head.get("location")), (303, Some(seen)));
            let cookie = answer.head.get("set-cookie").expect("a session");
            let pair = cookie.split(';').next().expect("a pair");
            let request = page(&host, "/").with("Cookie", pair);
            assert_eq!(once(node.public, &request).await.expect("an answer").status, 200);
            assert_told(&sandbox, Some("token"));
        }
        let uri = format!("ws://{host}/ws?sbx_token={token}");
        let request = uri.into_client_request().expect("a request");
        let stream = TcpStream::connect(node.public).await.expect("connected");
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await.expect("open");
        assert_eq!(sandbox.last().head.line, "GET /ws HTTP/1.1");
        assert_told(&sandbox, Some("token"));
        drop(socket);
        let bearer = format!("Bearer {token}");
        let request = Request::get(&host, "/").with("Authorization", &bearer);
        assert_refused(&once(node.public, &request).await.expect("an answer"), 401, JSON);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn void_credentials_and_private_ports_let_nobody_in() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    for number in [NUMBER, NUMBER + 1] {
        node.put(number, sandbox.address);
        node.table.guard(number, Visibility::Token, 1);
    }
    let host_name = host(8000, NUMBER);
    let good = credential(Purpose::Token, 60);
    for (why, host, token) in [
        ("expired", &host_name, credential(Purpose::Token, 0)),
        ("a link", &host_name, credential(Purpose::Link, 60)),
        ("a session", &host_name, credential(Purpose::Session, 60)),
        ("another sandbox", &host(8000, NUMBER + 1), good.clone()),
        ("cut short", &host_name, good[..good.len() - 1].to_owned()),
        ("nonsense", &host_name, "x".repeat(5000)),
    ] {
        let request = Request::get(host, "/").with("X-Sbx-Token", &token);
        let answer = once(node.public, &request).await.expect("an answer");
        assert_eq!(answer.status, 401, "{why}: {}", answer.text());
    }
    let twice = format!("/?sbx_token={good}&sbx_token=x");
    assert_eq!(get(node.public, &host_name, &twice).await.status, 400);

    let request = Request::get(&host_name, "/").with("X-Sbx-Token", &good);
    assert_eq!(once(node.public, &request).await.expect("an answer").status, 200);
    let served = sandbox.got().len();
    node.table.guard(NUMBER, Visibility::Private, 1);
    assert_refused(&once(node.public, &request).await.expect("an answer"), 403, JSON);

    // Whoever is unknown wakes nobody.
    let std::net::IpAddr::V4(ip) = sandbox.address.ip() else { panic!("IPv4 only") };
    node.table.put(NUMBER, ip, State::Paused { wakes: true }, &[8000]);
    node.table.guard(NUMBER, Visibility::Token, 1);
    assert_eq!(get(node.public, &host_name, "/").await.status, 401);
    assert_eq!((node.table.wakes(), sandbox.got().len()), (0, served));
    assert_eq!(once(node.public, &request).await.expect("an answer").status, 200);
    assert_eq!(node.table.wakes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_that_is_not_needed_does_not_reach_a_public_port() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(NUMBER, sandbox.address);
    let host = host(8000, NUMBER);
    let target = format!("/a?sbx_token={}&b=1", credential(Purpose::Token, 60));
    let answer = once(node.public, &page(&host, &target)).await.expect("an answer");
    assert_eq!((answer.status, answer.head.get("location")), (303, Some("/a?b=1")));
    assert!(!answer.head.any("set-cookie"), "{:?}", answer.head);
    let post = Request { method: "POST", body: b"x", ..Request::get(&host, &target) };
    assert_eq!(once(node.public, &post).await.expect("an answer").status, 200);
    let head = sandbox.last().head;
    assert_eq!(head.line, "POST /a?b=1 HTTP/1.1");
    assert_eq!(head.get("x-sbx-access"), Some("public"));
    // An ordinary request to a public port has nothing of ours.
    assert_eq!(get(node.public, &host, "/").await.status, 200);
    assert_told(&sandbox, None);
}
