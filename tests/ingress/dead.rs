use std::time::Duration;

use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    http::get,
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

/// A port that accepts no connections: its queue is full and nobody takes from it.
struct Swallows {
    _listener: tokio::net::TcpListener,
    _queue: Vec<TcpStream>,
}

impl Swallows {
    async fn at(address: std::net::SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(address).expect("a free address");
        let listener = socket.listen(0).expect("listening");
        let mut queue = Vec::new();
        while let Ok(stream) =
            timeout(Duration::from_millis(300), TcpStream::connect(address)).await
        {
            queue.push(stream.expect("queued"));
        }
        Self { _listener: listener, _queue: queue }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_sandbox_does_not_slow_down_another() {
    need_caddy!();
    let node = Node::start(1).await;
    let alive = Sandbox::start(at(10, 8000), "alive").await;
    let _swallows = Swallows::at(at(11, 8000)).await;
    node.put(100_001, alive.address);
    node.put(100_002, at(11, 8000));
    node.put(100_003, at(12, 8000));

    let mut to_the_dead = JoinSet::new();
    for number in 0..300u32 {
        let (public, host) = (node.public, host(8000, 100_002 + number % 2));
        to_the_dead.spawn(async move { get(public, &host, "/").await });
    }
    let mut slowest = Duration::ZERO;
    for _ in 0..100 {
        let begun = Instant::now();
        let answer = get(node.public, &host(8000, 100_001), "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    for answer in to_the_dead.join_all().await {
        assert!(matches!(answer.status, 502 | 503), "{} {}", answer.status, answer.text());
    }
}
