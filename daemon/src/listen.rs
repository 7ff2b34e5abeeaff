//! A TLS listener for tonic. Handshakes run concurrently, with limits on their number and time.
//! Peers that stall delay no others: when there is no room for another handshake, the oldest of the
//! network with the most is aborted.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::AbortHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::peer::Peer;

/// Concurrent handshakes at most.
const HANDSHAKES_MAX: usize = 256;
/// Accepted connections that wait for the server at most.
const ACCEPTED_MAX: usize = 64;
const HANDSHAKE_S: u64 = 5;

/// An accepted connection with the identity of its peer.
#[derive(Debug)]
pub struct Conn {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    address: SocketAddr,
}

impl Conn {
    /// Identity of the peer.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

/// Data for handlers in `request.extensions()`, beside the `Peer` itself.
#[derive(Debug, Clone)]
pub struct ConnInfo {
    /// Identity of the peer.
    pub peer: Peer,
    /// Address of the peer.
    pub address: SocketAddr,
}

impl Connected for Conn {
    type ConnectInfo = ConnInfo;

    fn connect_info(&self) -> ConnInfo {
        ConnInfo { peer: self.peer.clone(), address: self.address }
    }
}

/// Accepts connections until `stop`; the stream then ends.
pub fn tls(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Conn>> {
    let (accepted, stream) = mpsc::channel(ACCEPTED_MAX);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let mut handshakes = Handshakes::default();
        loop {
            let (tcp, address) = tokio::select! {
                () = stop.cancelled() => return,
                connection = listener.accept() => match connection {
                    Ok(connection) => connection,
                    Err(error) => {
                        // Most likely out of file descriptors: other connections must close first.
                        tracing::warn!(%error, "could not accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            handshakes.make_room();
            let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
            let task = tokio::spawn(async move {
                let limit = Duration::from_secs(HANDSHAKE_S);
                match tokio::time::timeout(limit, handshake(acceptor, tcp, address)).await {
                    Ok(Ok(conn)) => {
                        // The receiver is gone only when the server is.
                        drop(accepted.send(Ok(conn)).await);
                    }
                    Ok(Err(error)) => tracing::debug!(%address, %error, "handshake failed"),
                    Err(_) => tracing::debug!(%address, "handshake took too long"),
                }
            });
            handshakes.0.push_back((network(address.ip()), task.abort_handle()));
        }
    });
    ReceiverStream::new(stream)
}

/// Handshakes under way, oldest first, with the network of each.
#[derive(Debug, Default)]
struct Handshakes(VecDeque<(IpAddr, AbortHandle)>);

impl Handshakes {
    fn make_room(&mut self) {
        self.0.retain(|(_, task)| !task.is_finished());
        if self.0.len() < HANDSHAKES_MAX {
            return;
        }
        let mut counts = HashMap::<IpAddr, usize>::new();
        for (network, _) in &self.0 {
            *counts.entry(*network).or_default() += 1;
        }
        let most = counts.values().max().copied();
        let of_most = |network: &IpAddr| counts.get(network).copied() == most;
        let oldest = self.0.iter().position(|(network, _)| of_most(network));
        if let Some((network, task)) = oldest.and_then(|at| self.0.remove(at)) {
            tracing::debug!(%network, "aborted a handshake to make room for another");
            task.abort();
        }
    }
}

/// Range of addresses that one peer can easily have: an address of IPv4, or a /64 of IPv6.
pub fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => v6
            .to_ipv4_mapped()
            .map_or_else(|| IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)), IpAddr::V4),
    }
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    use super::*;
    use crate::tls::{
        self as keys, ClientAuth, Identity,
        tests::{ca, identity},
    };

    /// Identity that a server which requires certificates derives from this client.
    async fn peer_of(server: &Identity, client: &Identity) -> Option<Peer> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let stop = CancellationToken::new();
        // Stalls on purpose: the connection behind it must not wait.
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
            // Closes only after the client has read.
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
    async fn peer_is_identified_by_its_certificate_and_a_foreign_one_is_refused() {
        let (ours, foreign) = (ca("ours"), ca("foreign"));
        let server = identity(&ours, &ours, "spiffe://pve-sandbox/agent/n1");
        for (uri, expected) in [
            ("spiffe://pve-sandbox/controller", Peer::Controller),
            ("spiffe://pve-sandbox/agent/n2", Peer::Agent("n2".parse().expect("name"))),
            ("spiffe://pve-sandbox/agent/n2/../n1", Peer::Anonymous),
            ("spiffe://elsewhere/controller", Peer::Anonymous),
            ("spiffe://pve-sandbox/client/0123456789AB", Peer::Anonymous),
            ("spiffe://pve-sandbox/client/", Peer::Anonymous),
        ] {
            let client = identity(&ours, &ours, uri);
            assert_eq!(peer_of(&server, &client).await, Some(expected), "{uri}");
        }
        let intruder = identity(&foreign, &ours, "spiffe://pve-sandbox/controller");
        assert_eq!(peer_of(&server, &intruder).await, None);
    }

    #[tokio::test]
    async fn stalled_handshakes_do_not_delay_other_peers() {
        let ours = ca("ours");
        let server = identity(&ours, &ours, "spiffe://pve-sandbox/agent/n1");
        let config = keys::server(&server, ClientAuth::Required).expect("server");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let stop = CancellationToken::new();
        let mut accepted = tls(listener, config, stop.clone());
        let mut stalled = Vec::new();
        let mut begun = [0x16, 3, 1, 2, 0];
        for n in 0..2 * HANDSHAKES_MAX {
            let mut tcp = TcpStream::connect(address).await.expect("connect");
            // Half of them have begun a hello, the others send nothing.
            if n % 2 == 0 {
                begun[4] = u8::try_from(n % 256).expect("a byte");
                tcp.write_all(&begun).await.expect("written");
            }
            stalled.push(tcp);
        }
        let client = identity(&ours, &ours, "spiffe://pve-sandbox/controller");
        let connector =
            tokio_rustls::TlsConnector::from(keys::client(&client).expect("client config"));
        let tcp = TcpStream::connect(address).await.expect("connect");
        let name = "test.internal".try_into().expect("name");
        // Less than the stalled handshakes, which would take a multiple of their deadline.
        let limit = Duration::from_secs(HANDSHAKE_S);
        let (client, conn) = tokio::time::timeout(limit, async {
            tokio::join!(connector.connect(name, tcp), accepted.next())
        })
        .await
        .expect("in time");
        client.expect("a handshake");
        assert_eq!(conn.expect("one").expect("accepted").peer, Peer::Controller);
        stop.cancel();
    }

    #[test]
    fn addresses_of_one_network_count_as_one_peer() {
        let network = |text: &str| network(text.parse().expect("an address")).to_string();
        assert_eq!(network("192.0.2.1"), "192.0.2.1");
        assert_eq!(network("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
