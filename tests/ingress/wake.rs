//! Paused sandboxes: a request wakes a sandbox that allows it, and no other.

use std::net::IpAddr;

use agent::ingress::State;

use crate::{
    http::get,
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

#[tokio::test(flavor = "multi_thread")]
async fn request_wakes_a_paused_sandbox_and_is_answered() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "woken").await;
    let IpAddr::V4(ip) = sandbox.address.ip() else { panic!("IPv4 only") };
    node.table.put(100_001, ip, State::Paused { wakes: true }, &[8000]);
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
