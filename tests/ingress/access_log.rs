use std::time::Duration;

use agent::ingress::{Owner, version::Generation};
use tokio::time::{Instant, sleep};

use crate::{
    http::{Request, once},
    node::{Node, at, generation, host, id, need_caddy},
    peers::{Pki, two},
    sandbox::{CUT, NONE, Sandbox},
};

/// Waits until a log has so many lines.
async fn lines(node: &Node, count: usize) -> Vec<serde_json::Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = node.access_log();
        if text.lines().count() >= count {
            let parsed = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
            return parsed.collect();
        }
        assert!(Instant::now() < deadline, "{text}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Each request has a line with its sandbox, on both nodes with one id, and no credentials.
#[tokio::test(flavor = "multi_thread")]
async fn access_log_names_the_sandbox_and_holds_no_secret() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    let host_name = host(8000, 100_001);
    let request = Request::get(&host_name, "/path?sbx_token=canary1&x=canary2")
        .with("Cookie", "__Host-sbx=canary3")
        .with("Authorization", "Bearer canary4")
        .with("X-Sbx-Token", "canary5")
        .with("Referer", "https://x/?t=canary6");
    assert_eq!(once(edge.public, &request).await.expect("an answer").status, 200);
    let closed = host(22, 100_001);
    assert_eq!(once(owner.public, &Request::get(&closed, "/")).await.expect("one").status, 403);

    let at_edge = lines(&edge, 1).await;
    let at_owner = lines(&owner, 2).await;
    let rid = sandbox.last().head.get("x-request-id").expect("an id").to_owned();
    let target = format!("{rid} peer {} vmid=100001 port=8000", id(100_001));
    assert_eq!(at_owner[0]["user_id"], target.as_str());
    let user = at_edge[0]["user_id"].as_str().expect("text");
    assert!(user.starts_with(&format!("{rid} edge")), "{user}");
    for line in [&at_edge[0], &at_owner[0]] {
        assert_eq!(line["status"], 200);
        assert_eq!(line["request"]["host"], host_name.as_str());
        assert_eq!(line["request"]["uri"], "/path");
        assert!(line["duration"].as_f64().is_some_and(|took| took > 0.0), "{line}");
    }
    assert_eq!(at_owner[1]["status"], 403);
    for log in [edge.access_log(), owner.access_log(), edge.log(), owner.log()] {
        assert!(!log.contains("canary"), "{log}");
    }
}

/// Caddy tells of an answer that breaks off in its own log, with the request.
#[tokio::test(flavor = "multi_thread")]
async fn log_of_an_answer_that_breaks_off_holds_no_secret() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    let host_name = host(8000, 100_001);
    let request = |answer| {
        Request::get(&host_name, "/path?sbx_token=canary1&x=canary2")
            .with("X-Answer", answer)
            .with("X-Answer-With", "Set-Cookie: session=canary3")
            .with("Cookie", "__Host-sbx=canary4")
            .with("Authorization", "Bearer canary5")
            .with("X-Sbx-Token", "canary6")
            .with("Referer", "https://x/?t=canary7")
    };
    // In the middle of the answer, and before it.
    once(edge.public, &request(CUT)).await.expect_err("it breaks off");
    let answer = once(edge.public, &request(NONE)).await.expect("an answer");
    assert_eq!(answer.status, 502, "{}", answer.text());
    // Only later versions say which request it was.
    let path = if generation() == Generation::Fixed { "\"uri\":\"/path\"" } else { "" };
    for node in [&edge, &owner] {
        let deadline = Instant::now() + Duration::from_secs(10);
        let is_told = |line: &str| line.contains("incomplete response") && line.contains(path);
        while !node.log().lines().any(is_told) {
            assert!(Instant::now() < deadline, "{}", node.log());
            sleep(Duration::from_millis(10)).await;
        }
        for log in [node.log(), node.access_log()] {
            assert!(!log.contains("canary"), "{log}");
        }
    }
}
