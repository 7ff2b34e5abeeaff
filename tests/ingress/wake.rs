//! Paused and booting sandboxes: a request that somebody wants wakes one that allows it, waits within
//! bounds, and is told when it has to wait for long.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use agent::ingress::{State, hold::Limits};
use tokio::{task::JoinSet, time::Instant};
use tokio_tungstenite::tungstenite;

use crate::{
    http::{Client, Request, Response, get, once},
    node::{Node, at, host, ip, need_caddy},
    sandbox::Sandbox,
    websocket,
};

const PAUSED: State = State::Paused { wakes: true };

/// Headers of a browser that opens a page.
fn page<'a>(host: &'a str, target: &'a str) -> Request<'a> {
    Request::get(host, target)
        .with("Accept", "text/html,application/xhtml+xml,*/*;q=0.8")
        .with("Sec-Fetch-Mode", "navigate")
        .with("Sec-Fetch-Dest", "iframe")
        .with("Sec-Fetch-Site", "cross-site")
}

async fn ask(node: &Node, request: &Request<'_>) -> Response {
    once(node.public, request).await.expect("an answer")
}

/// Waits until something holds.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_wakes_a_paused_sandbox_and_is_answered() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "woken").await;
    let IpAddr::V4(ip) = sandbox.address.ip() else { panic!("IPv4 only") };
    node.table.put(100_001, ip, PAUSED, &[8000]);
    // A closed port is reported as closed, and wakes nobody.
    assert_eq!(get(node.public, &host(8001, 100_001), "/").await.status, 403);
    assert_eq!(node.table.wakes(), 0);
    let answer = get(node.public, &host(8000, 100_001), "/").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(node.table.wakes(), 1);
    assert_eq!(get(node.public, &host(8000, 100_001), "/").await.status, 200);
    assert_eq!(node.table.wakes(), 1, "it runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn request_does_not_wake_a_sandbox_that_forbids_it() {
    need_caddy!();
    let node = Node::start(1).await;
    let IpAddr::V4(ip) = at(10, 8000).ip() else { panic!("IPv4 only") };
    node.table.put(100_001, ip, State::Paused { wakes: false }, &[8000]);
    let answer = get(node.public, &host(8000, 100_001), "/").await;
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("this sandbox is paused"), "{}", answer.text());
    assert_eq!(get(node.public, &host(8001, 100_001), "/").await.status, 403);
    assert_eq!(node.table.wakes(), 0);
}

/// A script of another site: its browser asks first, and sends the request only when it may.
#[tokio::test(flavor = "multi_thread")]
async fn page_of_another_site_wakes_a_public_port_by_a_request_that_needs_a_preflight() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "woken").await;
    node.table.put(100_001, ip(10), PAUSED, &[8000]);
    let name = host(8000, 100_001);
    let from = "https://other.test";
    let preflight = Request { method: "OPTIONS", ..Request::get(&name, "/api") }
        .with("Origin", from)
        .with("Access-Control-Request-Method", "POST")
        .with("Access-Control-Request-Headers", "content-type");
    let answer = ask(&node, &preflight).await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    for (header, value) in [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-headers", "content-type"),
        // Its server is asked as soon as it can answer.
        ("access-control-max-age", "0"),
    ] {
        assert_eq!(answer.head.all(header), [value], "{:?}", answer.head);
    }
    let methods = answer.head.get("access-control-allow-methods").unwrap_or_default();
    assert!(methods.contains("POST"), "{methods}");
    assert_eq!((node.table.wakes(), sandbox.got().len()), (0, 0), "it wakes nothing");

    let post = Request { method: "POST", body: b"{}", ..Request::get(&name, "/api") }
        .with("Origin", from)
        .with("Content-Type", "application/json")
        .with("Sec-Fetch-Site", "cross-site")
        .with("Sec-Fetch-Mode", "cors")
        .with("Sec-Fetch-Dest", "empty");
    let answer = ask(&node, &post).await;
    assert_eq!((answer.status, node.table.wakes()), (200, 1), "{}", answer.text());
    // Now its server is asked, and what the ingress adds holds for a while.
    let before = sandbox.got().len();
    let answer = ask(&node, &preflight).await;
    assert_eq!((answer.status, answer.head.get("access-control-max-age")), (204, Some("600")));
    assert_eq!(sandbox.got().len(), before + 1);
}

/// Where an operator allows other sites nothing, a paused sandbox allows them nothing, either.
#[tokio::test(flavor = "multi_thread")]
async fn preflight_of_a_paused_public_port_is_refused_without_cors() {
    need_caddy!();
    let node = Node::shaped(1, None, |settings| settings.cors = false).await;
    node.table.put(100_001, ip(10), PAUSED, &[8000]);
    let name = host(8000, 100_001);
    let preflight = Request { method: "OPTIONS", ..Request::get(&name, "/api") }
        .with("Origin", "https://other.test")
        .with("Access-Control-Request-Method", "POST");
    assert_eq!(ask(&node, &preflight).await.status, 503);
    assert_eq!(node.table.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_requests_wake_a_paused_sandbox_once() {
    need_caddy!();
    let node = Node::start(1).await;
    let _sandbox = Sandbox::start(at(10, 8000), "woken").await;
    node.table.put(100_001, ip(10), PAUSED, &[8000]);
    node.table.thaw_in(Duration::from_millis(500));
    let (caddy, name): (SocketAddr, _) = (node.public, host(8000, 100_001));
    let mut requests = JoinSet::new();
    for number in 0..100 {
        let name = name.clone();
        requests.spawn(async move {
            let request = Request {
                method: if number % 2 == 0 { "GET" } else { "POST" },
                body: if number % 2 == 0 { b"" } else { b"kept while it waits" },
                ..Request::get(&name, "/")
            };
            once(caddy, &request).await.expect("an answer").text()
        });
    }
    let mut posts = 0;
    for text in requests.join_all().await {
        assert!(text.starts_with("woken got "), "{text}");
        posts += usize::from(text.contains("19 bytes"));
    }
    assert_eq!((posts, node.table.wakes()), (50, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn request_whose_client_has_gone_holds_no_place() {
    need_caddy!();
    let limits = Limits { team_held: 1, ..Limits::default() };
    let node = Node::holding(1, limits).await;
    let _sandbox = Sandbox::start(at(10, 8000), "woken").await;
    node.table.put(100_001, ip(10), PAUSED, &[8000]);
    node.table.thaw_in(Duration::from_secs(4));
    let name = host(8000, 100_001);
    let mut gone = Client::connect(node.public).await.expect("connected");
    gone.send(format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")).await.expect("sent");
    until("the wake did not begin", || node.table.wakes() == 1).await;
    // Its place is taken.
    let full = get(node.public, &name, "/").await;
    assert_eq!((full.status, full.head.get("retry-after")), (503, Some("2")), "{}", full.text());
    assert!(full.text().contains("too many requests wait"), "{}", full.text());
    drop(gone);
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        let answer = get(node.public, &name, "/").await;
        if answer.status == 200 {
            break;
        }
        assert!(Instant::now() < deadline, "it was still held: {}", answer.text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(node.table.wakes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_nobody_made_do_not_wake_a_sandbox() {
    need_caddy!();
    let node = Node::start(1).await;
    let _sandbox = Sandbox::start(at(10, 8000), "woken").await;
    node.table.put(100_001, ip(10), PAUSED, &[8000]);
    let name = host(8000, 100_001);
    let of = |method, target| Request { method, ..Request::get(&name, target) };
    for request in [
        of("HEAD", "/"),
        of("OPTIONS", "/api").with("Access-Control-Request-Method", "POST"),
        of("GET", "/favicon.ico"),
        of("GET", "/robots.txt"),
        page(&name, "/").with("Sec-Purpose", "prefetch"),
        of("GET", "/events").with("Accept", "text/event-stream"),
        of("GET", "/socket.io/?EIO=4&transport=polling"),
        of("GET", "/poll").with("Sec-Fetch-Site", "same-origin").with("Sec-Fetch-Dest", "empty"),
    ] {
        let answer = ask(&node, &request).await;
        assert_eq!(answer.status, 503, "{request:?}");
        assert_eq!(answer.head.get("retry-after"), Some("30"), "{request:?}");
        if request.method != "HEAD" {
            assert!(answer.text().contains("does not wake it"), "{}", answer.text());
        }
    }
    // An old tab's socket, which opens itself again and again.
    match websocket::open(node.public, &name).await {
        Err(tungstenite::Error::Http(answer)) => assert_eq!(answer.status(), 503),
        other => panic!("{other:?}"),
    }
    assert_eq!(node.table.wakes(), 0);
    // The tab is loaded again: now its socket finds a running sandbox.
    assert_eq!(ask(&node, &page(&name, "/")).await.status, 200);
    websocket::open(node.public, &name).await.expect("it runs");
    let uses = node.table.uses();
    assert_eq!(ask(&node, &of("HEAD", "/")).await.status, 200);
    assert_eq!(get(node.public, &name, "/favicon.ico").await.status, 200);
    assert_eq!((node.table.wakes(), node.table.uses()), (1, uses), "these are no uses");
}

#[tokio::test(flavor = "multi_thread")]
async fn person_sees_a_page_that_waits_and_a_program_gets_json() {
    need_caddy!();
    let limits = Limits {
        hold: Duration::from_millis(700),
        page_after: Duration::from_millis(200),
        ..Limits::default()
    };
    let node = Node::holding(1, limits).await;
    let _sandbox = Sandbox::start(at(10, 8000), "booted").await;
    node.table.put(100_001, ip(10), State::Booting, &[8000]);
    let name = host(8000, 100_001);
    let begun = Instant::now();
    let answer = ask(&node, &page(&name, "/editor?folder=/root")).await;
    assert!(begun.elapsed() < Duration::from_millis(650), "{:?}", begun.elapsed());
    assert_eq!((answer.status, answer.head.get("retry-after")), (503, Some("2")));
    assert_eq!(answer.head.get("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(answer.head.get("cache-control"), Some("no-store"));
    assert!(answer.text().contains("http-equiv=\"refresh\" content=\"2\""), "{}", answer.text());
    assert!(answer.text().contains("Starting"), "{}", answer.text());
    // It may be framed by another site.
    assert_eq!(answer.head.get("x-frame-options"), None);
    let json = ask(&node, &Request::get(&name, "/").with("Accept", "application/json")).await;
    assert_eq!((json.status, json.head.get("content-type")), (503, Some("application/json")));
    let json: serde_json::Value = serde_json::from_slice(&json.body).expect("JSON");
    assert_eq!((&json["code"], &json["retry_after_s"]), (&"sandbox_booting".into(), &2.into()));
    assert!(begun.elapsed() >= Duration::from_millis(900), "a program is held for longer");
    node.table.put(100_001, ip(10), State::Running, &[8000]);
    let answer = ask(&node, &page(&name, "/editor?folder=/root")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(node.table.wakes(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn team_that_wakes_too_often_is_told_when_it_may_again() {
    need_caddy!();
    let node = Node::holding(1, Limits { team_wakes: 1, ..Limits::default() }).await;
    let _sandbox = Sandbox::start(at(10, 8000), "woken").await;
    for number in [100_001, 100_002] {
        node.table.put(number, ip(10), PAUSED, &[8000]);
    }
    assert_eq!(get(node.public, &host(8000, 100_001), "/").await.status, 200);
    let refused = get(node.public, &host(8000, 100_002), "/").await;
    assert_eq!(refused.status, 503);
    let again: u32 = refused.head.get("retry-after").and_then(|s| s.parse().ok()).expect("a time");
    assert!((50..=60).contains(&again), "{again}");
    assert!(refused.text().contains("too many sandboxes"), "{}", refused.text());
    assert_eq!(node.table.wakes(), 1);
}
