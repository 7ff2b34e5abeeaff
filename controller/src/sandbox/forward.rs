//! Byte streams to a server inside a sandbox.

use std::sync::Arc;

use proto::{
    Reason,
    name::{Port, Team},
};
use tokio::io::DuplexStream;

use super::{Error, Result, Sandboxes};

/// Server inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardTarget {
    /// TCP port, on a loopback address or on the sandbox's own.
    Tcp(Port),
    /// Unix socket: an absolute path of at most 107 bytes.
    Unix(String),
}

impl Sandboxes {
    /// Connects to a server inside a sandbox. Dropping the stream ends the connection; shutting it down
    /// ends the caller's half alone.
    ///
    /// # Errors
    /// When there is no such sandbox, it does not run, or nothing listens there. A connection that
    /// breaks later ends like one that the server closes.
    pub async fn forward(
        self: &Arc<Self>,
        team: &Team,
        id: &str,
        target: ForwardTarget,
    ) -> Result<DuplexStream> {
        self.on_node(team, id)?;
        Err(Error::new(Reason::ExecFailed, format!("{target:?} cannot be reached yet")))
    }
}
