//! Cuts open connections, so that a port is closed at once and for all.
//!
//! Caddy cannot end one connection of many. The kernel can: it destroys the sockets of this node
//! that are connected to an address and port. A request that got its route just before may still
//! connect just after, so `hide` cuts again a little later.

use std::{io, net::SocketAddr, time::Duration};

use crate::sys::sock_diag;

/// Delay from the first cut to the second. A request that got its route just before may take 8.5 s to connect:
/// 3.5 s for the probe of the port, 2 s in which Caddy tries again (`try_duration`), and 3 s for the last try
/// (`dial_timeout`). The rest is for a busy host.
pub const AGAIN: Duration = Duration::from_secs(10);

/// Destroys this node's TCP connections to an address and port, and returns how many there were.
///
/// # Errors
/// When the kernel lacks CONFIG_INET_DIAG_DESTROY: then open connections stay open until one end
/// closes them.
pub async fn connections(to: SocketAddr) -> io::Result<usize> {
    let cut = tokio::task::spawn_blocking(move || sock_diag::destroy(to));
    cut.await.unwrap_or_else(|ended| Err(ended.into()))
}
