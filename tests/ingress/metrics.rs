use tokio::net::UnixStream;

use crate::{
    http::{Client, Request, get},
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

/// Asks the agent as docs/caddy.md shows it.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_counted_and_only_this_machine_reads_the_counters() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    assert_eq!(get(node.public, &host(8000, 100_001), "/").await.status, 200);
    assert_eq!(get(node.public, &host(22, 100_001), "/").await.status, 403);
    // To a client that path is the sandbox's.
    let answer = get(node.public, &host(8000, 100_001), "/v1/metrics").await;
    assert!(answer.text().starts_with("alpha got GET /v1/metrics "), "{}", answer.text());
    assert_eq!(get(node.public, "agent", "/v1/metrics").await.status, 404);

    let socket = UnixStream::connect(node.dir.join("route.sock")).await.expect("connected");
    let request = Request::get("agent", "/v1/metrics");
    let answer = Client::over(socket).request(&request).await.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    for line in [
        "# TYPE pve_sandbox_route_answers_total counter",
        "pve_sandbox_route_answers_total{via=\"edge\",status=\"204\"} 2",
        "pve_sandbox_route_answers_total{via=\"edge\",status=\"403\"} 1",
        "pve_sandbox_route_answer_seconds_count 3",
    ] {
        let text = answer.text();
        assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
    }
}
