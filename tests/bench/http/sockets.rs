//! WebSockets that stay open while other sandboxes come and go.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use agent::sandbox::access::kill_connections;
use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _, stream};
use tokio::{
    net::{TcpListener, TcpStream},
    task::AbortHandle,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_async, client_async,
    tungstenite::{Message, client::IntoClientRequest},
};

use super::edge::{Caddy, Node};
use crate::{
    figures::Figures,
    stage::{create, id},
};

/// Number of open WebSockets.
const SOCKETS: u32 = 1000;
/// Number of sandboxes that they go to: those with the lowest numbers.
pub(super) const SANDBOXES: u32 = 50;
/// Sandboxes that come and go meanwhile, and how many of them at a time. No others get their numbers.
const OTHERS: u32 = 200;
const FIRST_OTHER: u32 = 1_000_000;
const AT_ONCE: usize = 8;
/// Longest wait for one message.
const MESSAGE: Duration = Duration::from_secs(20);
/// Port of the servers.
const PORT: u16 = 8000;

type Socket = WebSocketStream<TcpStream>;

/// A server of WebSockets that sends back what it gets; it ends when dropped.
struct Echo(AbortHandle);

impl Echo {
    async fn start(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let accepted = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(echo(stream));
            }
        });
        Ok(Self(accepted.abort_handle()))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn echo(stream: TcpStream) {
    // The agent's probe connects and says nothing.
    let Ok(mut socket) = accept_async(stream).await else { return };
    while let Some(Ok(message)) = socket.next().await {
        if message.is_text() && socket.send(message).await.is_err() {
            return;
        }
    }
}

/// Counts the WebSockets that still answer after all others have come and gone, and adds the figure.
pub(super) async fn measure(node: &Node, caddy: &Caddy, figures: &mut Figures) -> Result<()> {
    node.reachable();
    let (mut servers, mut sockets) = (Vec::new(), Vec::new());
    for number in 0..SANDBOXES {
        servers.push(Echo::start(SocketAddr::new(node.address(number)?, PORT)).await?);
        let host = node.expose(number, PORT).await?;
        for _ in 0..SOCKETS / SANDBOXES {
            sockets.push(open(caddy.address, &host).await?);
        }
    }
    ensure!(survivors(&mut sockets).await == sockets.len(), "not all were open at the beginning");
    eprintln!("{} WebSockets are open; {OTHERS} sandboxes come and go", sockets.len());
    let numbers = FIRST_OTHER..FIRST_OTHER + OTHERS;
    let others = stream::iter(numbers).map(|number| comes_and_goes(node, caddy, number));
    let mut others = others.buffer_unordered(AT_ONCE);
    while let Some(gone) = others.next().await {
        gone?;
    }
    drop(others);
    // The second cut of each, too.
    tokio::time::sleep(kill_connections::AGAIN + Duration::from_secs(1)).await;
    let left = u32::try_from(survivors(&mut sockets).await)?;
    figures.alone("ws_survivors", f64::from(left), &format!("of {SOCKETS}"));
    figures.bounds("ws", &[("WebSockets left", -f64::from(left), -f64::from(SOCKETS))]);
    drop(servers);
    for number in 0..SANDBOXES {
        node.hide(number).await?;
    }
    Ok(())
}

/// Creates a sandbox, opens its port, uses it, closes the port, opens and closes it again, and deletes the
/// sandbox.
async fn comes_and_goes(node: &Node, caddy: &Caddy, number: u32) -> Result<()> {
    create(node.agent(), number..number + 1).await?;
    let sandboxes = Arc::clone(node.agent().sandboxes());
    let _server = Echo::start(SocketAddr::new(node.address(number)?, PORT)).await?;
    for _ in 0..2 {
        let host = node.expose(number, PORT).await?;
        let mut socket = open(caddy.address, &host).await?;
        ensure!(answers(&mut socket).await, "its own WebSocket does not work");
        node.hide(number).await?;
        ensure!(!answers(&mut socket).await, "a WebSocket to a port that is closed still works");
    }
    sandboxes.delete(&id(number), MESSAGE).await?;
    Ok(())
}

async fn open(caddy: SocketAddr, host: &str) -> Result<Socket> {
    let request = format!("ws://{host}/ws").into_client_request()?;
    let opened = async {
        let stream = TcpStream::connect(caddy).await?;
        Ok::<_, anyhow::Error>(client_async(request, stream).await?.0)
    };
    timeout(MESSAGE, opened).await.context("a WebSocket did not open in time")?
}

/// Returns the number of those that send back what they get.
async fn survivors(sockets: &mut [Socket]) -> usize {
    let mut left = 0;
    for socket in sockets {
        left += usize::from(answers(socket).await);
    }
    left
}

async fn answers(socket: &mut Socket) -> bool {
    let asked = async {
        socket.send(Message::text("still there")).await?;
        match socket.next().await {
            Some(Ok(Message::Text(text))) if text == "still there" => Ok(()),
            other => bail!("{other:?}"),
        }
    };
    timeout(MESSAGE, asked).await.is_ok_and(|answered: Result<()>| answered.is_ok())
}
