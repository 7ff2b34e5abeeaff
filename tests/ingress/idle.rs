use std::time::Duration;

use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::{
    http::{Request, get, once},
    node::{Node, at, host, need_caddy},
    program::raise_descriptors,
    sandbox::Sandbox,
};

/// Connections that send nothing, or half a request.
const IDLE: usize = 3000;
/// Descriptors that this needs.
const DESCRIPTORS: u32 = 8192;

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_idle_connections_delay_nobody() {
    need_caddy!();
    raise_descriptors(DESCRIPTORS);
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let mut idle = Vec::new();
    for number in 0..IDLE {
        let mut stream = TcpStream::connect(node.public).await.expect("connected");
        match number % 3 {
            0 => {}
            1 => stream.write_all(b"GET / HT").await.expect("sent"),
            _ => {
                let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\nX-A: ");
                stream.write_all(head.as_bytes()).await.expect("sent");
            }
        }
        idle.push(stream);
    }
    let begun = Instant::now();
    for _ in 0..50 {
        assert_eq!(get(node.public, &host, "/").await.status, 200);
    }
    assert!(begun.elapsed().as_secs() < 10, "50 requests took {:?}", begun.elapsed());
    assert_eq!(sandbox.questions(), 0);
    assert_eq!(sandbox.got().len(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_too_large_are_refused_and_large_ones_pass() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let (large, huge) = ("c".repeat(60_000), "c".repeat(400_000));
    let request = Request::get(&host, "/").with("Cookie", &large);
    assert_eq!(once(node.public, &request).await.expect("an answer").status, 200);
    assert_eq!(sandbox.last().head.get("cookie").map(str::len), Some(large.len()));
    let request = Request::get(&host, "/").with("Cookie", &huge);
    // Caddy may close the connection before it has read everything.
    let answer = once(node.public, &request).await;
    assert!(answer.as_ref().map_or(true, |answer| answer.status == 431), "{answer:?}");
    let many: Vec<String> = (0..600).map(|number| format!("X-Many-{number}")).collect();
    let many = many.iter().fold(Request::get(&host, "/"), |all, name| all.with(name, "1"));
    let answer = once(node.public, &many).await.expect("an answer");
    assert_ne!(answer.status, 200, "the agent reads a bounded number");
    assert_eq!(sandbox.got().len(), 1);
}

/// An address that gets a new owner never gets a connection of the old one: no connection to a sandbox is
/// kept. Also a first POST arrives whole.
#[tokio::test(flavor = "multi_thread")]
async fn new_sandbox_at_an_address_gets_no_old_connection() {
    need_caddy!();
    let node = Node::start(1).await;
    let host = host(8000, 100_001);
    for round in 0..5 {
        let name = format!("owner{round}");
        let sandbox = Sandbox::start(at(10, 8000), &name).await;
        node.put(100_001, sandbox.address);
        let post = Request { method: "POST", body: b"first", ..Request::get(&host, "/") };
        let answer = once(node.public, &post).await.expect("an answer");
        assert!(answer.status == 200 && answer.text().starts_with(&name), "{}", answer.text());
        assert_eq!(sandbox.last().body, b"first");
        assert_eq!(sandbox.last().head.get("connection"), Some("close"));
        for _ in 0..3 {
            assert_eq!(get(node.public, &host, "/").await.status, 200);
        }
        assert_eq!(sandbox.got().len(), 4);
        let address = sandbox.address;
        drop(sandbox);
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(address).await.is_ok() {
            assert!(Instant::now() < deadline, "the sandbox ends");
            sleep(Duration::from_millis(5)).await;
        }
    }
}
