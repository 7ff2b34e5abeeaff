//! Asks what runs on this node: the name server, Caddy, the agent's route server. Every wait has a deadline.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use daemon::{
    doctor::reach::{self, Listener, PATIENCE, local},
    tls,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket, UnixStream},
    time::timeout,
};

use super::facts::WebAnswer;

/// Longest answer that is read, bytes.
const ANSWER_MAX: u64 = 8192;
/// Number of a container that cannot exist: the last of all.
const NOBODY: u32 = 999_999_999;
/// Text of Caddy for a host that is not of its domain.
const NO_SANDBOX: &str = "this host is no sandbox";

/// Question for the version of a name server, which it answers by itself (`version.bind`, TXT, CHAOS).
const DNS_QUESTION: &[u8] =
    b"\x70\x76\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07version\x04bind\x00\x00\x10\x00\x03";

/// Answer of dnsmasq to the question begins with this, and its version follows.
const DNSMASQ: &[u8] = b"dnsmasq-";

/// Asks a name server which program it is. `None`: nothing answers; else whether it says that it is dnsmasq.
pub(super) async fn name_server(address: SocketAddr) -> Option<bool> {
    let asked = async {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        socket.connect(address).await?;
        socket.send(DNS_QUESTION).await?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).await?;
        Ok::<_, io::Error>(is_dnsmasq(&answer[..length]))
    };
    timeout(PATIENCE, asked).await.ok()?.ok()?
}

/// Reads what a name server has answered; `None` when it is no answer to the question. Pure.
fn is_dnsmasq(answer: &[u8]) -> Option<bool> {
    let is_answer = answer.len() >= 12 && answer[..2] == DNS_QUESTION[..2] && answer[2] & 0x80 != 0;
    // The text is not compressed, whatever stands before it.
    is_answer.then(|| answer.windows(DNSMASQ.len()).any(|bytes| bytes == DNSMASQ))
}

fn host(domain: &str) -> String {
    format!("port-1-vm-{NOBODY}.{domain}")
}

/// Asks Caddy for a sandbox that cannot exist: Caddy asks the agent, and the agent says so.
pub(super) async fn web(listen: SocketAddr, domain: &str) -> WebAnswer {
    let connected = timeout(PATIENCE, TcpStream::connect(local(listen))).await;
    let Ok(Ok(stream)) = connected else { return WebAnswer::Nobody };
    ask(stream, domain).await
}

/// Asks like `web`, by https. Returns the certificate that was shown, too (DER).
pub(super) async fn secure(listen: SocketAddr, domain: &str) -> (WebAnswer, Vec<u8>) {
    let Ok(tls) = tls::client_that_looks() else { return (WebAnswer::NoTls, Vec::new()) };
    match reach::connect(local(listen), &host(domain), tls).await {
        Ok((stream, shown)) => (ask(stream, domain).await, shown),
        Err(Listener::Nobody) => (WebAnswer::Nobody, Vec::new()),
        Err(Listener::Other(_) | Listener::Accepted(_)) => (WebAnswer::NoTls, Vec::new()),
    }
}

async fn ask(stream: impl AsyncRead + AsyncWrite + Unpin, domain: &str) -> WebAnswer {
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", host(domain));
    match timeout(PATIENCE, exchange(stream, &request)).await {
        Err(_) => WebAnswer::Silent,
        Ok(Err(_)) => WebAnswer::Other,
        Ok(Ok(text)) => web_answer(&text),
    }
}

/// Reads what Caddy said. Pure.
fn web_answer(text: &str) -> WebAnswer {
    let lower = text.to_lowercase();
    // The answers of the ingress have both, and no other server has them by accident.
    let is_ours = lower.contains("\ncache-control: no-store")
        && lower.contains("\naccess-control-allow-origin: *");
    match status(text) {
        Some(_) if is_ours && lower.contains(NO_SANDBOX) => WebAnswer::OtherDomain,
        // Caddy waits for the agent, and says 502 when its time is over.
        Some(502) if is_ours => WebAnswer::Silent,
        Some(_) if is_ours => WebAnswer::Ours,
        Some(_) | None => WebAnswer::Other,
    }
}

/// Asks the agent's route server, as Caddy does.
pub(super) async fn routes(socket: &Path, domain: &str) -> bool {
    let asked = async {
        let stream = UnixStream::connect(socket).await?;
        let host = host(domain);
        let question =
            format!("GET /v1/route?via=edge&rid=doctor HTTP/1.1\r\nHost: {host}\r\n\r\n");
        exchange(stream, &question).await
    };
    let answer = timeout(PATIENCE, asked).await;
    matches!(answer, Ok(Ok(text)) if status(&text).is_some())
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: &str,
) -> io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn status(text: &str) -> Option<u16> {
    text.strip_prefix("HTTP/1.1 ")?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::ingress::render::NO_AGENT;

    #[tokio::test]
    async fn name_server_says_which_program_it_is_until_it_has_gone() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("bound");
        let serving = tokio::spawn(async move {
            let mut question = [0; 512];
            for text in ["", "unbound 1.17.1", "dnsmasq-2.90"] {
                let (length, from) = server.recv_from(&mut question).await.expect("asked");
                question[2] |= 0x80;
                let answer = [&question[..length], text.as_bytes()].concat();
                server.send_to(&answer, from).await.expect("answered");
            }
        });
        for is_dnsmasq in [false, false, true] {
            assert_eq!(name_server(address).await, Some(is_dnsmasq));
        }
        serving.await.expect("ended");
        assert_eq!(name_server(address).await, None, "it has gone");
        assert_eq!(is_dnsmasq(DNS_QUESTION), None, "a question is no answer");
    }

    #[test]
    fn answers_of_the_ingress_are_told_from_those_of_others() {
        let ours = |status: &str, body: &str| {
            let head = "Cache-Control: no-store\r\nAccess-Control-Allow-Origin: *\r\n";
            web_answer(&format!("HTTP/1.1 {status}\r\n{head}\r\n{body}\n"))
        };
        assert_eq!(ours("404 Not Found", "there is no such sandbox"), WebAnswer::Ours);
        assert_eq!(ours("404 Not Found", NO_SANDBOX), WebAnswer::OtherDomain);
        let silent = format!("{NO_AGENT} (502)");
        assert_eq!(ours("502 Bad Gateway", &silent), WebAnswer::Silent);
        assert_eq!(web_answer("HTTP/1.1 200 OK\r\nServer: nginx\r\n\r\n"), WebAnswer::Other);
        assert_eq!(web_answer("SSH-2.0-x\r\n"), WebAnswer::Other);
    }

    #[tokio::test]
    async fn port_without_a_server_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        drop(listener);
        assert_eq!(web(address, "sandbox.test").await, WebAnswer::Nobody);
        assert!(!routes(Path::new("/nowhere.sock"), "sandbox.test").await);
    }
}
