//! What pages of other sites may do with a public port.

use crate::{
    http::{Request, once},
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

#[tokio::test(flavor = "multi_thread")]
async fn page_of_another_site_reads_and_calls_a_server_that_says_nothing_of_it() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let from = "https://other.test";

    let answer = once(node.public, &Request::get(&host, "/").with("Origin", from)).await;
    let answer = answer.expect("an answer");
    assert_eq!(answer.head.all("access-control-allow-origin"), ["*"], "{:?}", answer.head);

    // Its server is asked first, and allows nothing.
    let before = sandbox.got().len();
    let preflight = Request { method: "OPTIONS", ..Request::get(&host, "/") }
        .with("Origin", from)
        .with("Access-Control-Request-Method", "PUT")
        .with("Access-Control-Request-Headers", "x-own");
    let answer = once(node.public, &preflight).await.expect("an answer");
    assert_eq!(answer.status, 204);
    assert_eq!(answer.head.all("access-control-allow-origin"), ["*"], "{:?}", answer.head);
    assert_eq!(answer.head.get("access-control-allow-headers"), Some("x-own"));
    assert_eq!(sandbox.got().len(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn answer_of_a_server_to_a_preflight_is_kept() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    for (status, header) in [
        ("401", "X-Own: yes"),
        ("403", "X-Own: yes"),
        ("200", "Vary: Origin"),
        ("200", "vary: accept-encoding, origin"),
        ("204", "Access-Control-Allow-Methods: GET"),
        ("204", "Access-Control-Allow-Headers: x-other"),
    ] {
        let preflight = Request { method: "OPTIONS", ..Request::get(&host, "/") }
            .with("Origin", "https://other.test")
            .with("Access-Control-Request-Method", "PUT")
            .with("X-Answer", status)
            .with("X-Answer-With", header);
        let answer = once(node.public, &preflight).await.expect("an answer");
        assert_eq!(answer.status.to_string(), status, "{header}");
        assert!(!answer.head.any("access-control-allow-origin"), "{header}: {:?}", answer.head);
        let (name, value) = header.split_once(": ").expect("a header");
        assert_eq!(answer.head.get(name), Some(value), "{:?}", answer.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answer_that_differs_between_sites_is_left_alone() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    for (header, allowed) in [
        ("Vary: Origin", &[][..]),
        ("Vary: Accept-Encoding, Origin", &[]),
        ("vary: origin", &[]),
        ("Access-Control-Allow-Origin: https://one.test", &["https://one.test"]),
        ("Vary: Accept-Encoding", &["*"]),
        ("X-Sbx-Own-Cors: yes", &["*"]),
    ] {
        let request = Request::get(&host, "/")
            .with("Origin", "https://other.test")
            .with("X-Answer", "200")
            .with("X-Answer-With", header);
        let answer = once(node.public, &request).await.expect("an answer");
        assert_eq!(answer.status, 200, "{header}");
        let head = &answer.head;
        assert_eq!(head.all("access-control-allow-origin"), allowed, "{header}: {head:?}");
        assert_eq!(
            head.any("access-control-expose-headers"),
            allowed == ["*"],
            "{header}: {head:?}"
        );
        assert!(!head.any("x-sbx"), "{header}: {head:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sandbox_sees_no_credential_of_the_page_that_loads_something() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    for secret in ["sbx_token=sbxt1_secret", "sbx_link=sbxl1_secret"] {
        let page = format!("https://{host}/a.css?x=1&{secret}&y=2");
        let request = Request::get(&host, "/font").with("Referer", &page);
        assert_eq!(once(node.public, &request).await.expect("an answer").status, 200);
        let got = sandbox.last().head;
        let referer = got.get("referer").expect("a page");
        assert_eq!(referer, format!("https://{host}/a.css?x=1&&y=2"));
    }
}
