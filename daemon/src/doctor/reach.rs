//! Looks at a machine from the outside: what listens at an address, and whether the clock is synchronised.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    time::{error::Elapsed, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::Check;
use crate::systemctl;

/// Longest wait for a peer on this machine, and for a program.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Program that knows whether the clock is synchronised.
pub const TIMEDATECTL: &str = "/usr/bin/timedatectl";

/// Answer of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listener {
    /// A server that the client configuration accepts; its certificate (DER).
    Accepted(Vec<u8>),
    /// Nobody listens there.
    Nobody,
    /// Something listens, and it is not what was expected.
    Other(String),
}

/// Address of this machine for an address that is listened to: `0.0.0.0` is no address to connect to.
pub fn local(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, listen.port())
}

/// Connects with TLS and hangs up.
pub async fn listener(address: SocketAddr, name: &str, tls: Arc<ClientConfig>) -> Listener {
    match connect(address, name, tls).await {
        Ok((_, shown)) => Listener::Accepted(shown),
        Err(found) => found,
    }
}

/// Connects with TLS. Returns the connection, and the certificate that the server has shown (DER).
///
/// # Errors
/// Says what is there instead.
pub async fn connect(
    address: SocketAddr,
    name: &str,
    tls: Arc<ClientConfig>,
) -> Result<(TlsStream<TcpStream>, Vec<u8>), Listener> {
    let late = |_: Elapsed| io::Error::from(io::ErrorKind::TimedOut);
    let tcp = timeout(PATIENCE, TcpStream::connect(address)).await;
    let tcp = tcp.map_err(late).and_then(|connected| connected).map_err(|_| Listener::Nobody)?;
    let name = ServerName::try_from(name.to_owned());
    let name = name.map_err(|error| Listener::Other(error.to_string()))?;
    let shaken = timeout(PATIENCE, TlsConnector::from(tls).connect(name, tcp)).await;
    let shaken = shaken.map_err(late).and_then(|shaken| shaken);
    let stream = shaken.map_err(|error| Listener::Other(error.to_string()))?;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let shown = shown.map(|der| der.to_vec()).unwrap_or_default();
    Ok((stream, shown))
}

/// Asks `timedatectl` whether the clock is synchronised; `None` where it does not know.
pub async fn is_synchronised(timedatectl: &Path) -> Option<bool> {
    let words = ["show", "--property=NTPSynchronized", "--value"];
    let ran = systemctl::ask(timedatectl, &words, PATIENCE).await.ok()?;
    match ran.stdout.trim() {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

/// Judges the clock. Pure.
pub fn clock(synchronised: Option<bool>) -> Check {
    let remedy = "timedatectl set-ntp true || systemctl enable --now chrony";
    match synchronised {
        Some(true) => Check::ok("clock", "NTP", "synchronised"),
        Some(false) => Check::warning(
            "clock",
            "NTP",
            "not synchronised: certificates and lifetimes depend on the clock",
            remedy,
        ),
        None => Check::warning("clock", "NTP", "timedatectl gives no answer", "timedatectl status"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{doctor::State, tls::client_that_pins};

    #[test]
    fn clock_without_synchronisation_is_a_warning() {
        assert_eq!(clock(Some(true)).state, State::Ok);
        for unsure in [Some(false), None] {
            let check = clock(unsure);
            assert_eq!(check.state, State::Warning);
            assert!(check.remedy.is_some_and(|remedy| remedy.starts_with("timedatectl")));
        }
    }

    #[tokio::test]
    async fn closed_port_and_a_foreign_server_are_told_apart() {
        let tls = || client_that_pins([0; 32]).expect("client");
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("bound");
        let server = tokio::spawn(async move {
            let (mut stream, _) = socket.accept().await.expect("somebody");
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"SSH-2.0-x\r\n").await.expect("sent");
        });
        let found = listener(address, "n1.test", tls()).await;
        assert!(matches!(found, Listener::Other(_)), "{found:?}");
        server.await.expect("ended");
        assert_eq!(listener(address, "n1.test", tls()).await, Listener::Nobody);
        let any = |text: &str| local(text.parse().expect("an address")).to_string();
        assert_eq!((any("0.0.0.0:1"), any("[::]:1")), ("127.0.0.1:1".into(), "[::1]:1".into()));
        assert_eq!(any("10.0.0.1:1"), "10.0.0.1:1");
    }
}
