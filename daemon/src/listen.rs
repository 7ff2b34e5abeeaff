//! A TLS listener for tonic. Handshakes run beside each other, few at a time and not for long, so
//! that a peer that stalls holds up nobody.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::peer::Peer;

const HANDSHAKES_MAX: usize = 64;
const HANDSHAKE_S: u64 = 5;

/// An accepted connection with the identity of its peer.
#[derive(Debug)]
pub struct Conn {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    address: SocketAddr,
}

/// What a handler finds in `request.extensions()`, beside the `Peer` itself.
#[derive(Debug, Clone)]
pub struct ConnInfo {
    /// Who it is.
    pub peer: Peer,
    /// Where it comes from.
    pub address: SocketAddr,
}

impl Connected for Conn {
    type ConnectInfo = ConnInfo;

    fn connect_info(&self) -> ConnInfo {
        ConnInfo { peer: self.peer.clone(), address: self.address }
    }
}

/// Accepts until `stop`; the stream then ends.
pub fn tls(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Conn>> {
    let (accepted, stream) = mpsc::channel(HANDSHAKES_MAX);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let (tcp, address) = tokio::select! {
                () = stop.cancelled() => return,
                connection = listener.accept() => match connection {
                    Ok(connection) => connection,
                    Err(error) => {
                        // Out of file descriptors, most likely: others must close some first.
                        tracing::warn!(%error, "could not accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
            let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
            tokio::spawn(async move {
                let limit = Duration::from_secs(HANDSHAKE_S);
                match tokio::time::timeout(limit, handshake(acceptor, tcp, address)).await {
                    Ok(Ok(conn)) => {
                        // The receiver is gone only when the server is.
                        drop(accepted.send(Ok(conn)).await);
                    }
                    Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
                    Err(_) => tracing::debug!(%address, "handshake took too long"),
                }
                drop(permit);
            });
        }
    });
    ReceiverStream::new(stream)
}

async fn handshake(acceptor: TlsAcceptor, tcp: TcpStream, address: SocketAddr) -> io::Result<Conn> {
    tcp.set_nodelay(true)?;
    let stream = acceptor.accept(tcp).await?;
    let certificates = stream.get_ref().1.peer_certificates();
    let peer = certificates
        .and_then(<[_]>::first)
        .map_or(Peer::Anonymous, |certificate| Peer::of_certificate(certificate));
    Ok(Conn { stream, peer, address })
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    use super::*;
    use crate::tls::{self as keys, ClientAuth, Identity};

    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca(name: &str) -> Ca {
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("ca")
    }

    /// A leaf of `issuer` with a URI, in files, trusting `trusted`.
    fn identity(issuer: &Ca, trusted: &Ca, uri: &str) -> Identity {
        let dir = tempfile::tempdir().expect("tempdir");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec!["test.internal".into()]).expect("params");
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ascii")));
        let leaf = params.signed_by(&key, issuer).expect("leaf");
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("crt"), leaf.pem()).expect("write");
        std::fs::write(path("key"), key.serialize_pem()).expect("write");
        std::fs::write(path("ca"), trusted.pem()).expect("write");
        Identity::load(&path("crt"), &path("key"), &path("ca")).expect("identity")
    }

    /// What a server that requires certificates makes of this client.
    async fn peer_of(server: &Identity, client: &Identity) -> Option<Peer> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let stop = CancellationToken::new();
        // Stalls on purpose: it must not hold up the one behind it.
        let stalled = TcpStream::connect(address).await.expect("connect");
        let config = keys::server(server, ClientAuth::Required).expect("server");
        let mut accepted = tls(listener, config, stop.clone());
        let connector =
            tokio_rustls::TlsConnector::from(keys::client(client).expect("client config"));
        let tcp = TcpStream::connect(address).await.expect("connect");
        let name = "test.internal".try_into().expect("name");
        let ping = async {
            let mut stream = connector.connect(name, tcp).await?;
            stream.write_all(b"x").await?;
            stream.read_u8().await
        };
        let serve = async {
            let mut conn = accepted.next().await?.ok()?;
            conn.write_u8(1).await.ok()?;
            conn.flush().await.ok()?;
            let peer = conn.connect_info().peer;
            // The client must have read before the connection goes.
            drop(conn.read_u8().await);
            Some(peer)
        };
        let both = async {
            tokio::select! {
                biased;
                (_, peer) = async { tokio::join!(ping, serve) } => peer,
                () = tokio::time::sleep(Duration::from_secs(3)) => None,
            }
        };
        let peer = both.await;
        drop(stalled);
        stop.cancel();
        peer
    }

    #[tokio::test]
    async fn a_peer_is_known_by_its_certificate_and_a_foreign_one_is_refused() {
        let (ours, foreign) = (ca("ours"), ca("foreign"));
        let server = identity(&ours, &ours, "spiffe://pve-sandbox/agent/n1");
        for (uri, expected) in [
            ("spiffe://pve-sandbox/controller", Peer::Controller),
            ("spiffe://pve-sandbox/agent/n2", Peer::Agent("n2".parse().expect("name"))),
            ("spiffe://pve-sandbox/agent/n2/../n1", Peer::Anonymous),
            ("spiffe://elsewhere/controller", Peer::Anonymous),
        ] {
            let client = identity(&ours, &ours, uri);
            assert_eq!(peer_of(&server, &client).await, Some(expected), "{uri}");
        }
        let intruder = identity(&foreign, &ours, "spiffe://pve-sandbox/controller");
        assert_eq!(peer_of(&server, &intruder).await, None);
    }
}
