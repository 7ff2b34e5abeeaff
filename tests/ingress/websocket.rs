use std::{net::SocketAddr, time::Duration};

use agent::ingress::State;
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest},
};

use crate::{
    node::{Node, at, host, ip, need_caddy},
    sandbox::Sandbox,
};

/// Opens a WebSocket through Caddy.
pub(crate) async fn open(
    caddy: SocketAddr,
    host: &str,
) -> Result<WebSocketStream<TcpStream>, tungstenite::Error> {
    let request = format!("ws://{host}/ws").into_client_request().expect("a request");
    let stream = TcpStream::connect(caddy).await.expect("connected");
    let (socket, _) = tokio_tungstenite::client_async(request, stream).await?;
    Ok(socket)
}

/// Sends a message and checks that the same one comes back.
pub(crate) async fn echo(
    socket: &mut WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>,
    message: Message,
) {
    socket.send(message.clone()).await.expect("sent");
    let back = timeout(Duration::from_secs(10), socket.next()).await.expect("in time");
    assert_eq!(back.expect("open").expect("a message"), message);
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_survives_other_sandboxes_and_agent_restarts() {
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let mut socket = open(node.public, &host(8000, 100_001)).await.expect("open");
    echo(&mut socket, Message::text("hello")).await;
    echo(&mut socket, Message::binary(vec![7u8; 300_000])).await;

    // Other sandboxes come and go, ports open and close, the agent restarts.
    for number in 0..200 {
        node.table.put(200_000 + number, ip(10), State::Running, &[8000]);
        node.table.put(200_000 + number, ip(10), State::Gone, &[]);
    }
    node.restart_agent();
    echo(&mut socket, Message::text("still here")).await;
    node.kill_agent();
    echo(&mut socket, Message::text("without an agent too")).await;
    node.start_agent();
    assert!(node.caddy_runs());

    // A port that is not exposed accepts no WebSocket, either.
    match open(node.public, &host(8001, 100_001)).await {
        Err(tungstenite::Error::Http(answer)) => assert_eq!(answer.status(), 403),
        other => panic!("{other:?}"),
    }
    echo(&mut socket, Message::text("to the end")).await;
}
