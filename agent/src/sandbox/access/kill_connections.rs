//! Cuts open connections, so that a port is closed at once and for all.
//!
//! Caddy cannot end one connection of many. The kernel can: it destroys the sockets of this node
//! that are connected to an address and port. A request that got its route just before may still
//! connect just after, so `hide` cuts again a little later.

use std::{io, net::SocketAddr, time::Duration};

use crate::sys::sock_diag;

/// Delay from the first cut to the second: the time that Caddy may take to connect to a route.
pub const AGAIN: Duration = Duration::from_secs(6);

/// Destroys this node's TCP connections to an address and port, and returns how many there were.
///
/// # Errors
/// When the kernel lacks CONFIG_INET_DIAG_DESTROY: then open connections stay open until one end
/// closes them.
pub async fn connections(to: SocketAddr) -> io::Result<usize> {
    let cut = tokio::task::spawn_blocking(move || sock_diag::destroy(to));
    cut.await.unwrap_or_else(|ended| Err(ended.into()))
}
