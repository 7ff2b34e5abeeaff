//! HTTP/1.1 by hand: the test controls every byte that a client sends, and sees every byte that a
//! server got.

use std::{fmt::Write as _, io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

/// Longest wait of a test for one answer.
const DEADLINE: Duration = Duration::from_secs(30);

/// Head of a request or a response.
#[derive(Debug, Clone, Default)]
pub(crate) struct Head {
    /// First line.
    pub(crate) line: String,
    /// Headers as received: order, case, repetitions.
    pub(crate) headers: Vec<(String, String)>,
}

impl Head {
    /// Reads a head; returns `None` at the end of the stream.
    pub(crate) async fn read(
        stream: &mut (impl AsyncBufReadExt + Unpin),
    ) -> io::Result<Option<Self>> {
        let mut head = Self::default();
        let mut line = Vec::new();
        loop {
            line.clear();
            if stream.read_until(b'\n', &mut line).await? == 0 {
                return if head.line.is_empty() { Ok(None) } else { Err(cut()) };
            }
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            match text.split_once(": ").or_else(|| text.split_once(':')) {
                _ if text.is_empty() => return Ok(Some(head)),
                _ if head.line.is_empty() => head.line = text,
                Some((name, value)) => head.headers.push((name.to_owned(), value.to_owned())),
                None => return Err(cut()),
            }
        }
    }

    /// Returns all values of a header.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let own = |(n, _): &&(String, String)| n.eq_ignore_ascii_case(name);
        self.headers.iter().filter(own).map(|(_, value)| value.as_str()).collect()
    }

    /// Returns the value of a header that occurs exactly once.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        match self.all(name)[..] {
            [value] => Some(value),
            _ => None,
        }
    }

    /// Returns whether any header's name has this prefix, in any case.
    pub(crate) fn any(&self, prefix: &str) -> bool {
        let prefix = prefix.to_ascii_lowercase();
        self.headers.iter().any(|(name, _)| name.to_ascii_lowercase().starts_with(&prefix))
    }

    /// Reads the body for this head. `to_end`: without a length the body ends with the stream.
    pub(crate) async fn body(
        &self,
        stream: &mut (impl AsyncBufReadExt + Unpin),
        to_end: bool,
    ) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if self.all("transfer-encoding").iter().any(|v| v.eq_ignore_ascii_case("chunked")) {
            loop {
                let mut size = String::new();
                stream.read_line(&mut size).await?;
                let size = usize::from_str_radix(size.trim(), 16).map_err(|_| cut())?;
                if size == 0 {
                    // Includes trailers, so that a test sees them.
                    while stream.read_until(b'\n', &mut body).await? > 2 {}
                    body.truncate(body.len() - 2);
                    return Ok(body);
                }
                let start = body.len();
                body.resize(start + size + 2, 0);
                stream.read_exact(&mut body[start..]).await?;
                body.truncate(start + size);
            }
        }
        match self.get("content-length") {
            Some(length) => {
                body.resize(length.parse().map_err(|_| cut())?, 0);
                stream.read_exact(&mut body).await?;
            }
            None if to_end => drop(stream.read_to_end(&mut body).await?),
            None => {}
        }
        Ok(body)
    }
}

fn cut() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Status line and headers.
    pub(crate) head: Head,
    /// Answers with status 103 before it.
    pub(crate) hints: Vec<Head>,
    /// Body without its encoding.
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Returns the body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection of a client.
#[derive(Debug)]
pub(crate) struct Client<S = TcpStream>(BufReader<S>);

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream))
    }
}

impl<S: AsyncRead + tokio::io::AsyncWrite + Unpin> Client<S> {
    /// Uses an open stream.
    pub(crate) fn over(stream: S) -> Self {
        Self(BufReader::new(stream))
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.0.get_mut().write_all(bytes.as_ref()).await?;
        self.0.get_mut().flush().await
    }

    /// Reads a response with the hints before it, and skips 100 Continue. `head`: the request was a HEAD request.
    pub(crate) async fn response(&mut self, head: bool) -> io::Result<Response> {
        timeout(DEADLINE, self.read_response(head)).await?
    }

    async fn read_response(&mut self, to_head: bool) -> io::Result<Response> {
        let mut hints = Vec::new();
        loop {
            let head = Head::read(&mut self.0).await?.ok_or_else(cut)?;
            let status =
                head.line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(cut)?;
            match status {
                100 => continue,
                103 => {
                    hints.push(head);
                    continue;
                }
                _ => {}
            }
            let empty = to_head || matches!(status, 101 | 204 | 304);
            let body = if empty { Vec::new() } else { head.body(&mut self.0, true).await? };
            return Ok(Response { status, head, hints, body });
        }
    }

    /// Sends one request on this connection, which stays open.
    pub(crate) async fn request(&mut self, request: &Request<'_>) -> io::Result<Response> {
        self.send(request.bytes()).await?;
        self.response(request.method == "HEAD").await
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    /// Target, as in the request line.
    pub(crate) target: &'a str,
    /// Value of the Host header.
    pub(crate) host: &'a str,
    /// More headers.
    pub(crate) headers: Vec<(&'a str, &'a str)>,
    /// Body, sent with a length.
    pub(crate) body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Creates a GET request.
    pub(crate) fn get(host: &'a str, target: &'a str) -> Self {
        Self { method: "GET", target, host, headers: Vec::new(), body: b"" }
    }

    /// Adds a header.
    pub(crate) fn with(mut self, name: &'a str, value: &'a str) -> Self {
        self.headers.push((name, value));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let Self { method, target, host, headers, body } = self;
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n");
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").expect("a String takes all");
        }
        if !body.is_empty() {
            write!(head, "Content-Length: {}\r\n", body.len()).expect("a String takes all");
        }
        head.push_str("\r\n");
        [head.as_bytes(), body].concat()
    }
}

/// Sends one request on its own connection.
pub(crate) async fn once(address: SocketAddr, request: &Request<'_>) -> io::Result<Response> {
    Client::connect(address).await?.request(request).await
}

/// Sends a GET on its own connection; it must be answered.
pub(crate) async fn get(address: SocketAddr, host: &str, target: &str) -> Response {
    once(address, &Request::get(host, target)).await.expect("an answer")
}
