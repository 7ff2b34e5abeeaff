//! SSH server: a way into sandboxes that needs no server, no key and no network in them. A login is a key of
//! a team and the name of one of its sandboxes; everything else goes the way of commands and forwards.
//!
//! ```text
//!  client -> transport (bounds) -> russh -> connection (one login) -> command -> sandbox/exec
//!                                                                  -> forward -> sandbox/forward
//!                                            <- channels of ours   <- reverse <-
//! ```
//! Invariants: all refusals of a login are alike, in text and time; of what one client
//! sends, and of what it does not read, a bounded part is kept; the end of a key ends its connections within a second.

mod arrivals;
mod capacity;
mod channels;
mod command;
mod connection;
mod forward;
pub mod host_key;
mod inputs;
mod login;
mod protocol;
mod record;
mod reverse;
mod session;
mod transport;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use proto::sandbox::v1::SshServer;
use russh::keys::PrivateKey;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::{Access, ssh_keys},
    audit::Audit,
    rpc::Permits,
    sandbox::Sandboxes,
};

use arrivals::Arrivals;
use capacity::Capacity;
use connection::Connection;
use transport::{Gate, Transport};

#[cfg(test)]
pub(crate) use channels::KEPT_MAX;

/// Time from the connection to the login.
const LOGIN: Duration = Duration::from_secs(30);
/// Pause after a failed accept, most likely for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Address that clients are told, and bounds.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Host name for clients; empty: that of the API.
    pub host: String,
    /// Port for clients.
    pub port: u16,
    /// Most connections of all teams that are logged in.
    pub connections_max: usize,
}

/// Services that all connections use.
#[derive(Debug)]
struct Shared {
    sandboxes: Arc<Sandboxes>,
    access: Arc<Access>,
    audit: Audit,
    permits: Permits,
    capacity: Capacity,
    stop: CancellationToken,
}

/// The server. Clones serve together.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
    config: Arc<russh::server::Config>,
    arrivals: Arrivals,
    tasks: TaskTracker,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

/// Services of the controller that a server works with.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) sandboxes: Arc<Sandboxes>,
    pub(crate) access: Arc<Access>,
    pub(crate) audit: Audit,
    pub(crate) permits: Permits,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// Describes the server for clients.
pub(crate) fn announcement(key: &PrivateKey, settings: &Settings) -> SshServer {
    SshServer {
        host: settings.host.clone(),
        port: settings.port.into(),
        host_key: ssh_keys::canonical(key.public_key()).unwrap_or_default(),
    }
}

impl Server {
    pub(crate) fn new(key: PrivateKey, settings: &Settings, services: Services) -> Self {
        let Services { sandboxes, access, audit, permits, tasks, stop } = services;
        let capacity = Capacity::new(settings.connections_max);
        Self {
            shared: Arc::new(Shared { sandboxes, access, audit, permits, capacity, stop }),
            config: Arc::new(protocol::config(key)),
            arrivals: Arrivals::default(),
            tasks,
        }
    }

    /// Accepts connections until the controller stops.
    pub async fn serve(self, listener: TcpListener) {
        let stop = self.shared.stop.clone();
        while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((stream, peer)) => {
                    // Without it a terminal is slower, and works.
                    drop(stream.set_nodelay(true));
                    self.tasks.spawn(self.clone().serve_one(stream, peer));
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept an SSH connection");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Serves one connection to its end.
    pub async fn serve_one<S>(self, stream: S, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let deadline = Instant::now() + LOGIN;
        let arrival = self.arrivals.arrive(peer.ip());
        let gate = Arc::<Gate>::default();
        let known = CancellationToken::new();
        let handler = Connection::new(self.shared.clone(), peer, (gate.clone(), known.clone()));
        let transport = Transport::new(stream, gate.clone());
        let started = russh::server::run_stream(self.config.clone(), transport, handler);
        let session = tokio::select! {
            started = timeout_at(deadline, started) => started,
            () = arrival.pushed_out() => return,
            () = self.shared.stop.cancelled() => return,
        };
        let Ok(Ok(mut session)) = session else { return };
        let ended = tokio::select! {
            ended = &mut session => Some(ended),
            () = known.cancelled() => None,
            () = arrival.pushed_out() => {
                gate.shut();
                None
            }
            () = sleep_until(deadline) => {
                gate.shut();
                None
            }
            () = self.shared.stop.cancelled() => {
                gate.shut();
                None
            }
        };
        // The place of those that are not known yet is free again.
        drop(arrival);
        let ended = match ended {
            Some(ended) => ended,
            None => session.await,
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "SSH connection ended");
        }
    }
}
