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
