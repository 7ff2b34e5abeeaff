use std::time::Duration;

use agent::ingress::{State, hold::Limits};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    http::{Response, get},
    node::{Node, at, host, ip, need_caddy},
    program::raise_descriptors,
    sandbox::Sandbox,
};

/// Descriptors that thousands of requests at once need.
const DESCRIPTORS: u32 = 8192;
/// Most questions about the sandboxes of one team that wait at once, as the agent has it.
const TEAM_MAX: usize = 1024;
/// Requests beyond that.
const BEYOND: usize = 176;

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

/// Waits until the agent has answered one of these requests, which it does at once to those beyond a bound.
async fn first_answer(requests: &mut JoinSet<Response>) -> Response {
    let first = timeout(Duration::from_secs(15), requests.join_next()).await;
    first.expect("some are refused at once").expect("there are some").expect("no panic")
}

/// Asks for a sandbox again and again; each answer comes soon.
async fn assert_fast(node: &Node, number: u32) {
    for _ in 0..50 {
        let begun = Instant::now();
        let answer = get(node.public, &host(8000, number), "/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }
}

/// A team whose servers are silent: eight sandboxes with two ports each. That their requests are also bounded is
/// shown below.
#[tokio::test(flavor = "multi_thread")]
async fn silent_sandboxes_of_one_team_do_not_slow_down_another_team() {
    need_caddy!();
    raise_descriptors(DESCRIPTORS);
    let node = Node::start(1).await;
    let alive = Sandbox::start(at(10, 8000), "alive").await;
    node.put(100_001, alive.address);
    node.table.give(100_001, "blue");
    let mut silent = JoinSet::new();
    for number in 0..8u8 {
        node.table.put(100_010 + u32::from(number), ip(20 + number), State::Running, &[8000, 8001]);
        for port in [8000, 8001] {
            silent.spawn(Swallows::at(at(20 + number, port)));
        }
    }
    let _silent = silent.join_all().await;
    let mut to_the_silent = JoinSet::new();
    for number in 0..1600u32 {
        let port = if number % 2 == 0 { 8000 } else { 8001 };
        let (public, host) = (node.public, host(port, 100_010 + number / 2 % 8));
        to_the_silent.spawn(async move { get(public, &host, "/").await });
    }
    assert_fast(&node, 100_001).await;
    for answer in to_the_silent.join_all().await {
        assert!(matches!(answer.status, 502 | 503), "{} {}", answer.status, answer.text());
    }
}

/// Requests that wait for as long as the test lasts: those of one team never take all places.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_requests_of_one_team_are_bounded_and_leave_room_for_another_team() {
    need_caddy!();
    raise_descriptors(DESCRIPTORS);
    // The bounds of held requests are not the ones that this test is about.
    let hold = Duration::from_secs(60);
    let wide = Limits { hold, team_held: 10_000, node_held: 10_000, ..Limits::default() };
    let node = Node::holding(1, wide).await;
    node.table.thaw_in(Duration::from_secs(120));
    let alive = Sandbox::start(at(10, 8000), "alive").await;
    node.put(100_001, alive.address);
    node.table.give(100_001, "blue");
    for number in 100_010..100_013 {
        node.table.put(number, ip(20), State::Paused { wakes: true }, &[8000]);
    }
    let mut waiting = JoinSet::new();
    for number in (100_010..100_013).cycle().take(TEAM_MAX + BEYOND) {
        let (public, host) = (node.public, host(8000, number));
        waiting.spawn(async move { get(public, &host, "/").await });
    }
    for _ in 0..BEYOND {
        let answer = first_answer(&mut waiting).await;
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert!(answer.text().contains("too many requests wait"), "{}", answer.text());
    }
    assert_fast(&node, 100_001).await;
    assert_eq!(waiting.len(), TEAM_MAX, "the others wait");
}
