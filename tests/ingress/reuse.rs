//! Addresses that get a new owner while clients of the old one still hold their connections.

use std::os::fd::AsFd as _;

use agent::ingress::State;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_tungstenite::tungstenite::{Message, handshake::derive_accept_key};
use tokio_util::sync::CancellationToken;

use crate::{
    http::{Client, Head, Request},
    node::{Node, at, host, ip, need_caddy},
    sandbox::Sandbox,
    websocket,
};

/// Number of the sandbox that goes, and of the one that gets its address.
const OLD: u32 = 100_001;
const NEW: u32 = 100_002;

/// Serves until `gone`, and returns its open connections. It closes none by itself.
fn serve(listener: TcpListener, gone: CancellationToken) -> JoinHandle<Vec<TcpStream>> {
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Some(Ok((stream, _))) = gone.run_until_cancelled(listener.accept()).await {
            let mut stream = BufReader::new(stream);
            // The agent's probe says nothing.
            let Ok(Some(head)) = Head::read(&mut stream).await else { continue };
            let answer = match head.get("sec-websocket-key") {
                Some(key) => format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                     Sec-WebSocket-Accept: {}\r\n\r\n",
                    derive_accept_key(key.as_bytes())
                ),
                None => "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nold\n".to_owned(),
            };
            stream.write_all(answer.as_bytes()).await.expect("sent");
            held.push(stream.into_inner());
        }
        held
    })
}

/// Ends a connection without a word to the other end, as a container that is destroyed does.
fn vanish(stream: TcpStream) {
    // Closing a socket that is under repair sends nothing.
    setsockopt(&stream.as_fd(), sockopt::TcpRepair, &1).expect("the kernel can, and root may");
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn address_of_a_sandbox_that_has_gone_is_new_to_its_next_owner() {
    need_caddy!();
    let node = Node::start(1).await;
    let address = at(10, 8000);
    node.put(OLD, address);
    let gone = CancellationToken::new();
    let old = serve(TcpListener::bind(address).await.expect("free"), gone.clone());
    let (old_host, new_host) = (host(8000, OLD), host(8000, NEW));
    let mut socket = websocket::open(node.public, &old_host).await.expect("open");
    let mut client = Client::connect(node.public).await.expect("connected");
    let answer = client.request(&Request::get(&old_host, "/")).await.expect("an answer");
    assert_eq!(answer.text(), "old\n");

    node.table.put(OLD, ip(10), State::Gone, &[]);
    gone.cancel();
    let held = old.await.expect("no panic");
    assert_eq!(held.len(), 2);
    held.into_iter().for_each(vanish);
    let new = Sandbox::start(address, "new").await;
    node.put(NEW, address);

    // Sends into its open WebSocket until that ends.
    use futures_util::{SinkExt as _, StreamExt as _};
    let sent = async {
        while socket.send(Message::text("for the old one")).await.is_ok() {
            let end = tokio::time::timeout(std::time::Duration::from_millis(50), socket.next());
            match end.await {
                Ok(Some(Ok(Message::Text(text)))) => panic!("somebody answered: {text}"),
                Ok(_) => return,
                Err(_) => {}
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), sent).await.expect("it is cut");
    let post = Request { method: "POST", body: b"for the old one", ..Request::get(&old_host, "/") };
    let answer = client.request(&post).await.expect("an answer");
    assert_eq!(answer.status, 410, "{}", answer.text());
    assert_eq!(new.got().len(), 0, "{:?}", new.got());

    // The first request to the new one, which cannot be repeated, arrives.
    let post = Request { method: "POST", body: b"for the new one", ..Request::get(&new_host, "/") };
    let answer = client.request(&post).await.expect("an answer");
    assert_eq!(answer.status, 200, "{} {}", answer.text(), node.log());
    assert_eq!(new.last().body, b"for the new one");
    assert_eq!(new.got().len(), 1);
}
