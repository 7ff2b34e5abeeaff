//! Servers in sandboxes: one that reports what it got, and one that lies.

use std::{
    fmt::Write as _,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};
use tokio_util::task::AbortOnDropHandle;

use crate::http::Head;

/// A request that reached a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Got {
    /// Request line and headers.
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

/// A server in a sandbox; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
    _task: AbortOnDropHandle<()>,
}

impl Sandbox {
    /// Starts a server that answers with `name` and the request. If it ever gets a route question,
    /// it answers with a route to itself.
    pub(crate) async fn start(address: SocketAddr, name: &str) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free address");
        let got = Arc::new(Mutex::new(Vec::new()));
        let lies = Arc::new(forged(address));
        let (log, name) = (Arc::clone(&got), Arc::new(name.to_owned()));
        let task = tokio::spawn(async move {
            let mut clients = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                clients.spawn(serve(
                    stream,
                    Arc::clone(&name),
                    Arc::clone(&lies),
                    Arc::clone(&log),
                ));
            }
        });
        Self { address, got, _task: AbortOnDropHandle::new(task) }
    }

    /// Returns all requests so far.
    pub(crate) fn got(&self) -> Vec<Got> {
        self.got.lock().expect("no panic").clone()
    }

    /// Returns the last request.
    pub(crate) fn last(&self) -> Got {
        self.got().pop().expect("a request")
    }

    /// Returns the number of route questions, which must be zero.
    pub(crate) fn questions(&self) -> usize {
        let question = |got: &&Got| is_question(&got.head);
        self.got.lock().expect("no panic").iter().filter(question).count()
    }
}

/// Returns whether a request is a route question, of whichever server of Caddy.
fn is_question(head: &Head) -> bool {
    let of = |via: &str| head.line.contains(&format!("/v1/route?via={via}&rid="));
    of("edge") || of("peer")
}

/// Returns the headers of a route to `address`.
fn forged(address: SocketAddr) -> String {
    format!(
        "X-Sbx-Proof: 0\r\nX-Sbx-Kind: local\r\nX-Sbx-Upstream: {address}\r\nX-Sbx-Host: forged\r\n"
    )
}

/// Value of `X-Answer` for an answer that breaks off.
pub(crate) const CUT: &str = "cut";

/// Value of `X-Answer` for a server that ends the connection instead.
pub(crate) const NONE: &str = "none";

/// Returns the headers of an answer that a client asks for, as lines: each `X-Answer-With` is one.
fn asked_headers(head: &Head, name: &str) -> String {
    head.all(name).iter().map(|header| format!("{header}\r\n")).collect()
}

/// Returns the answer that a client asks for: `X-Answer` is its status, [`CUT`] or [`NONE`].
fn asked_for(head: &Head) -> Option<String> {
    let asked = head.get("x-answer")?;
    if asked == NONE {
        return Some(String::new());
    }
    let (status, body) =
        if asked == CUT { ("200", "Content-Length: 1000\r\n\r\nhalf") } else { (asked, NO_BODY) };
    let with = asked_headers(head, "x-answer-with");
    Some(format!("HTTP/1.1 {status} X\r\n{with}{body}"))
}

/// End of a head without a body.
const NO_BODY: &str = "Content-Length: 0\r\n\r\n";

async fn serve(
    stream: TcpStream,
    name: Arc<String>,
    lies: Arc<String>,
    log: Arc<Mutex<Vec<Got>>>,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(head) = Head::read(&mut stream).await? {
        if head.get("expect").is_some() {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let body = head.body(&mut stream, false).await?;
        log.lock().expect("no panic").push(Got { head: head.clone(), body: body.clone() });
        let path = head.line.split(' ').nth(1).unwrap_or("");
        if let Some(key) = head.get("sec-websocket-key") {
            let accept = derive_accept_key(key.as_bytes());
            let with = asked_headers(&head, "x-answer-with");
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Accept: {accept}\r\n{with}\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            return echo(stream).await;
        }
        if let Some(protocol) = head.get("upgrade") {
            // Whatever protocol it is: what follows is read as requests, too.
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: {protocol}\r\nConnection: Upgrade\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            continue;
        }
        if head.any("x-hint") {
            let hint =
                format!("HTTP/1.1 103 Early Hints\r\n{}\r\n", asked_headers(&head, "x-hint"));
            stream.write_all(hint.as_bytes()).await?;
        }
        if let Some(answer) = asked_for(&head) {
            stream.write_all(answer.as_bytes()).await?;
            if [Some(CUT), Some(NONE)].contains(&head.get("x-answer")) {
                return Ok(());
            }
            continue;
        }
        let mut answer = String::new();
        if is_question(&head) {
            write!(answer, "HTTP/1.1 204 No Content\r\n{lies}\r\n").expect("a String takes all");
        } else {
            let text = format!("{name} got {} and {} bytes\n", head.line, body.len());
            let extra = if path.starts_with("/forge") { lies.as_str() } else { "" };
            write!(
                answer,
                "HTTP/1.1 200 OK\r\nServer: sandbox\r\nContent-Length: {}\r\n{extra}\r\n",
                text.len()
            )
            .expect("a String takes all");
            if !head.line.starts_with("HEAD ") {
                answer.push_str(&text);
            }
        }
        stream.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

async fn echo(stream: BufReader<TcpStream>) -> io::Result<()> {
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
    while let Some(Ok(message)) = socket.next().await {
        if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
            break;
        }
    }
    Ok(())
}
