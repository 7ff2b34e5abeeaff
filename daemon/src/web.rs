//! Client of the web for commands: one request over a connection of its own, HTTP/1.1. Addresses, wait and
//! answer are bounded; an error says how far the request came.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header, uri::Authority};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use crate::tls;

/// Most addresses of a host that are tried.
const ADDRESSES_MAX: usize = 4;

/// Reason why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be used.
    #[error("{0} is no address of the web")]
    Address(String),
    /// The name has no address.
    #[error("the name {host} cannot be resolved")]
    Resolve {
        /// Name.
        host: String,
        /// Reason.
        source: io::Error,
    },
    /// No connection was made.
    #[error("no connection to {0}")]
    Connect(String, #[source] io::Error),
    /// The server's certificate is not accepted, or it speaks no TLS.
    #[error("no TLS with {0}")]
    Tls(String, #[source] io::Error),
    /// The exchange broke off.
    #[error("the exchange broke off")]
    Exchange(#[source] hyper::Error),
    /// There was no answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Slow(Duration),
}

/// Answer of a server.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, as much of it as was read.
    pub body: Bytes,
    /// Whether the body is whole: not cut by its bound or by the time.
    pub is_whole: bool,
}

/// Client; see the module.
#[derive(Debug, Clone)]
pub struct Client {
    /// `None`: it speaks no TLS.
    tls: Option<Arc<ClientConfig>>,
    /// Longest time of one request, the answer included.
    limit: Duration,
    /// Most bytes of a body that are read.
    body_max: usize,
}

impl Client {
    /// Makes a client that trusts the CAs in a PEM file, or else those of the system.
    ///
    /// # Errors
    /// When there are none.
    pub fn new(ca: Option<&Path>, limit: Duration, body_max: usize) -> Result<Self, tls::Error> {
        Ok(Self { tls: Some(tls::client_of_the_web(ca)?), limit, body_max })
    }

    /// Makes a client for addresses with `http` alone, such as those of this machine.
    pub fn without_tls(limit: Duration, body_max: usize) -> Self {
        Self { tls: None, limit, body_max }
    }

    /// Sends a request to the host in its URI, or to these addresses in place of the host's own.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn send(
        &self,
        request: Request<Bytes>,
        at: Option<&[SocketAddr]>,
    ) -> Result<Answer, Error> {
        let until = Instant::now() + self.limit;
        let uri = request.uri().clone();
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(Error::Address(uri.to_string()));
        };
        let tls = match (scheme, &self.tls) {
            ("https", Some(tls)) => Some(Arc::clone(tls)),
            ("http", _) => None,
            _ => return Err(Error::Address(uri.to_string())),
        };
        let request = in_origin_form(request, authority)?;
        let host = authority.host().trim_matches(['[', ']']);
        let port = authority.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let slow = || Error::Slow(self.limit);
        let connected = async {
            let resolved;
            let addresses = match at {
                Some(addresses) => addresses,
                None => {
                    resolved = resolve(host, port).await?;
                    &resolved
                }
            };
            connect(addresses).await
        };
        let tcp = timeout_at(until, connected).await.map_err(|_| slow())??;
        let Some(tls) = tls else { return self.exchange(tcp, request, until).await };
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|_| Error::Address(uri.to_string()))?;
        let shaken = TlsConnector::from(tls).connect(name, tcp);
        let stream = timeout_at(until, shaken).await.map_err(|_| slow())?;
        let stream = stream.map_err(|error| Error::Tls(host.to_owned(), error))?;
        self.exchange(stream, request, until).await
    }

    async fn exchange<S>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
        until: Instant,
    ) -> Result<Answer, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Dropped at the end of the call: then the connection is closed, too.
        let mut connections = JoinSet::new();
        let sent = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            connections.spawn(connection);
            sender.send_request(request).await
        };
        let sent = timeout_at(until, sent).await.map_err(|_| Error::Slow(self.limit))?;
        let (head, body) = sent.map_err(Error::Exchange)?.into_parts();
        let (body, is_whole) = self.read(body, until).await?;
        Ok(Answer { status: head.status, headers: head.headers, body, is_whole })
    }

    /// Reads a body until its end, its bound or the end of the time.
    async fn read(&self, mut body: Incoming, until: Instant) -> Result<(Bytes, bool), Error> {
        let mut read = BytesMut::new();
        loop {
            let Ok(frame) = timeout_at(until, body.frame()).await else {
                return Ok((read.freeze(), false));
            };
            let Some(frame) = frame else { return Ok((read.freeze(), true)) };
            let frame = frame.map_err(Error::Exchange)?;
            let Ok(data) = frame.into_data() else { continue };
            let room = self.body_max - read.len();
            if data.len() > room {
                read.extend_from_slice(&data[..room]);
                return Ok((read.freeze(), false));
            }
            read.extend_from_slice(&data);
        }
    }
}

/// Makes a request of the form that a server takes: path alone, and the host in its header.
fn in_origin_form(
    request: Request<Bytes>,
    authority: &Authority,
) -> Result<Request<Full<Bytes>>, Error> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let path: Uri = path.parse().map_err(|_| Error::Address(path.to_owned()))?;
    if !head.headers.contains_key(header::HOST) {
        let host = HeaderValue::try_from(authority.as_str());
        let host = host.map_err(|_| Error::Address(authority.to_string()))?;
        head.headers.insert(header::HOST, host);
    }
    head.uri = path;
    Ok(Request::from_parts(head, Full::new(body)))
}

/// Returns the addresses of a name.
///
/// # Errors
/// When it has none.
pub async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
    let failed = |source| Error::Resolve { host: host.to_owned(), source };
    let found: Vec<_> = tokio::net::lookup_host((host, port)).await.map_err(failed)?.collect();
    if found.is_empty() {
        return Err(failed(io::Error::other("it has no address")));
    }
    Ok(found)
}

/// Connects to the first address that accepts.
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, Error> {
    let mut last = Error::Address("nowhere".to_owned());
    for address in addresses.iter().take(ADDRESSES_MAX) {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Error::Connect(address.to_string(), error),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    /// Serves one connection with these bytes, and keeps it open; returns the address.
    async fn serve(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("somebody");
            let mut request = [0; 4096];
            let length = stream.read(&mut request).await.expect("a request");
            let text = String::from_utf8_lossy(&request[..length]).into_owned();
            assert!(text.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{text}");
            assert!(text.to_ascii_lowercase().contains("host: box.test\r\n"), "{text}");
            stream.write_all(answer.as_bytes()).await.expect("written");
            tokio::time::sleep(LIMIT * 4).await;
        });
        address
    }

    /// Client that speaks no TLS in these tests: any CA will do.
    fn client(body_max: usize) -> Client {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = dir.path().join("ca.crt");
        std::fs::write(&ca, tls::tests::ca("any").pem()).expect("written");
        Client::new(Some(&ca), LIMIT, body_max).expect("a client")
    }

    async fn get(answer: &'static str, body_max: usize) -> Result<Answer, Error> {
        let address = serve(answer).await;
        let request = Request::get("http://box.test/a?b=c").body(Bytes::new()).expect("a request");
        client(body_max).send(request, Some(&[address])).await
    }

    #[tokio::test]
    async fn answer_is_read_up_to_its_bound_and_to_the_end_of_the_time() {
        let whole = get("HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: 5\r\n\r\nhello", 5).await;
        let whole = whole.expect("an answer");
        assert_eq!(
            (whole.status.as_u16(), &whole.body[..], whole.is_whole),
            (200, &b"hello"[..], true)
        );
        let cut = get("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 4).await.expect("cut");
        assert_eq!((&cut.body[..], cut.is_whole), (&b"hell"[..], false));
        // A stream that never ends.
        let stream = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n";
        let open = get(stream, 64).await.expect("an answer");
        assert_eq!((&open.body[..], open.is_whole), (&b"hi"[..], false));
        let silent = get("", 64).await.expect_err("none");
        assert!(matches!(silent, Error::Slow(_)), "{silent}");
        let other = get("SSH-2.0-x\r\n", 64).await.expect_err("no HTTP");
        assert!(matches!(other, Error::Exchange(_)), "{other}");
    }

    #[tokio::test]
    async fn error_says_how_far_the_request_came() {
        let client = client(64);
        let send = async |uri: &str, at: Option<&[SocketAddr]>| {
            let request = Request::get(uri).body(Bytes::new()).expect("a request");
            client.send(request, at).await.expect_err("no answer")
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let plain = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("somebody");
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("written");
        });
        assert!(matches!(send("https://box.test/", Some(&[address])).await, Error::Tls(..)));
        plain.await.expect("ended");
        assert!(matches!(send("https://box.test/", Some(&[address])).await, Error::Connect(..)));
        // A label is too long: no name server is asked.
        let unresolvable = format!("http://{}.test/", "x".repeat(64));
        assert!(matches!(send(&unresolvable, None).await, Error::Resolve { .. }));
        for uri in ["/a", "ftp://box.test/"] {
            assert!(matches!(send(uri, None).await, Error::Address(_)), "{uri}");
        }
    }
}
