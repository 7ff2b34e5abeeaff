//! The client's side of a connection: lazy, with keep-alives, over TLS or over any byte stream.

use std::{io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::{
    flow::{self, Leg},
    sever::Severable,
};

/// Longest wait for TCP and TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence after which a peer is pinged; without an answer the connection is closed.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(5);

fn endpoint(leg: Leg) -> Endpoint {
    // Placeholder: the connector knows the address. The scheme must not be https, which would make
    // tonic add TLS of its own.
    let endpoint = Endpoint::from_static("http://pve-sandbox.internal");
    flow::endpoint(leg, endpoint)
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .keep_alive_while_idle(true)
}

/// Connects to `address` (`host:port`) when first used, and again whenever the connection is lost.
/// `server_name` must be in the peer's certificate.
///
/// # Errors
/// When `server_name` is neither a DNS name nor an IP address.
pub fn tls(
    leg: Leg,
    address: &str,
    server_name: &str,
    config: Arc<ClientConfig>,
) -> io::Result<Channel> {
    tls_checked(leg, address, server_name, config, Arc::new(|_| Ok(CancellationToken::new())))
}

/// Judges the verified certificate (DER) of a peer before anything is sent to it. The connection ends
/// when the token is cancelled.
pub type Check = Arc<dyn Fn(&[u8]) -> io::Result<CancellationToken> + Send + Sync>;

/// Connects as `tls` does, to a peer that also passes a check.
///
/// # Errors
/// When `server_name` is neither a DNS name nor an IP address.
pub fn tls_checked(
    leg: Leg,
    address: &str,
    server_name: &str,
    config: Arc<ClientConfig>,
    check: Check,
) -> io::Result<Channel> {
    let name = ServerName::try_from(server_name.to_owned()).map_err(io::Error::other)?;
    let (address, connector) = (address.to_owned(), TlsConnector::from(config));
    Ok(endpoint(leg).connect_with_connector_lazy(service_fn(move |_| {
        let (address, name, connector) = (address.clone(), name.clone(), connector.clone());
        let check = Arc::clone(&check);
        async move {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            let stream = connector.connect(name, tcp).await?;
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let cut = check(shown.map(AsRef::as_ref).unwrap_or_default())?;
            Ok::<_, io::Error>(TokioIo::new(Severable::new(stream, cut)))
        }
    })))
}

/// Connects over the stream that `dial` returns: an in-memory stream, or a connection that a peer
/// behind NAT has made to us.
pub fn over<D, F, S>(leg: Leg, dial: D) -> Channel
where
    D: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    endpoint(leg).connect_with_connector_lazy(service_fn(move |_| {
        let stream = dial();
        async move { stream.await.map(TokioIo::new) }
    }))
}
