use std::time::Duration;

use agent::{ingress::State, sandbox::access::kill_connections};
use futures_util::StreamExt;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    http::get,
    node::{Node, at, host, ip, need_caddy},
    sandbox::Sandbox,
    websocket,
};

#[tokio::test(flavor = "multi_thread")]
async fn hiding_a_port_closes_its_open_connections() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let other = Sandbox::start(at(10, 8001), "other").await;
    node.table.put(100_001, ip(10), State::Running, &[8000, 8001]);
    let mut hidden = websocket::open(node.public, &host(8000, 100_001)).await.expect("open");
    let mut kept = websocket::open(node.public, &host(8001, 100_001)).await.expect("open");
    websocket::echo(&mut hidden, Message::text("hello")).await;
    websocket::echo(&mut kept, Message::text("hello")).await;

    node.table.put(100_001, ip(10), State::Running, &[8001]);
    assert_eq!(get(node.public, &host(8000, 100_001), "/").await.status, 403);
    let cut = kill_connections::connections(sandbox.address).await.expect("the kernel can");
    assert!(cut >= 1, "{cut}");
    let end = timeout(Duration::from_secs(2), hidden.next()).await.expect("closed at once");
    assert!(!matches!(end, Some(Ok(Message::Text(_) | Message::Binary(_)))), "{end:?}");
    websocket::echo(&mut kept, Message::text("the other port stays")).await;
    assert_eq!(other.got().len(), 1);
}
