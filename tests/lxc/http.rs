//! Minimal HTTP and WebSocket client for tests of the ingress, over plain sockets, so that the test
//! sees the bytes.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// Returns the loopback port of a node's ingress.
pub(crate) fn ingress_port(node: &str) -> u16 {
    match node {
        "node1" => 8480,
        "node2" => 8482,
        _ => 8483,
    }
}

pub(crate) fn host(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split(['/', ':']).next().unwrap_or_default().to_owned()
}

fn connect(node: &str) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", ingress_port(node))).expect("ingress");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
    stream
}

/// Returns the status of a GET through a node that may not answer.
pub(crate) fn status(node: &str, host: &str) -> Option<u16> {
    try_get(node, host, "/").map(|(status, _)| status)
}

/// Returns status and body of a GET through a node that may not answer, or may be killed in the middle of the body.
pub(crate) fn try_get(node: &str, host: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", ingress_port(node))).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Some((status, body.to_owned()))
}

/// Returns status and body of a GET through a node.
pub(crate) fn get(node: &str, host: &str) -> (u16, String) {
    ask(node, host, "GET / HTTP/1.1")
}

/// Returns status and body of a request through a node; `line` is its first line, and may be followed by
/// headers.
pub(crate) fn ask(node: &str, host: &str, line: &str) -> (u16, String) {
    let mut stream = connect(node);
    write!(stream, "{line}\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("send");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answer");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status.unwrap_or_else(|| panic!("no status: {answer}")), body.to_owned())
}

/// Sends a GET with more header lines through a node; returns the whole answer.
pub(crate) fn exchange(node: &str, host: &str, target: &str, headers: &str) -> String {
    let mut stream = connect(node);
    write!(stream, "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")
        .expect("send");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// An open WebSocket.
pub(crate) struct Socket(TcpStream);

impl Socket {
    /// Upgrades a connection through a node.
    pub(crate) fn open(node: &str, host: &str) -> Self {
        let mut stream = connect(node);
        write!(
            stream,
            "GET /echo HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .expect("send");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("head");
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        // The accept value for the example key of RFC 6455.
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Self(stream)
    }

    /// Sends a masked text frame and returns the text that comes back; fails if the connection is
    /// gone.
    pub(crate) fn echo(&mut self, text: &str) -> std::io::Result<String> {
        let length = u8::try_from(text.len()).expect("short");
        let mask = [1, 2, 3, 4];
        let mut frame = vec![0x81, 0x80 | length];
        frame.extend(mask);
        frame.extend(text.bytes().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.0.write_all(&frame)?;
        let mut head = [0; 2];
        self.0.read_exact(&mut head)?;
        let mut body = vec![0; usize::from(head[1] & 0x7f)];
        self.0.read_exact(&mut body)?;
        if head[0] != 0x81 {
            return Err(std::io::Error::other("not a text frame"));
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}
