//! Opens connections to agents.

use std::{fmt::Debug, io, sync::Arc};

use daemon::flow::Leg;
use proto::name::NodeName;
use tonic::transport::Channel;

/// Kind of calls with connections of its own, so that none waits for calls of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Unary calls. One connection per node.
    Control,
    /// Watch of the agent. One connection per node.
    Watch,
    /// Commands and files, whose readers may stall. Up to 16 connections per node.
    Bulk,
}

/// Opens channels to agents: TLS over TCP in a daemon, in-memory streams in a simulation, or a
/// connection that an agent behind NAT has opened.
pub trait Connector: Send + Sync + Debug {
    /// Returns a lazy channel over a connection of its own. It connects when used, and reconnects
    /// when the connection is lost.
    ///
    /// # Errors
    /// When the address can never work.
    fn channel(&self, node: &NodeName, address: &str, lane: Lane) -> io::Result<Channel>;
}

/// Mutual TLS over TCP. The agent's certificate must contain the node's name, so that a node cannot
/// answer for another.
#[derive(Debug)]
pub struct TlsConnector(pub Arc<rustls::ClientConfig>);

impl Connector for TlsConnector {
    fn channel(&self, node: &NodeName, address: &str, _: Lane) -> io::Result<Channel> {
        let server_name = format!("{node}.agent.pve-sandbox.internal");
        daemon::channel::tls(Leg::Agent, address, &server_name, self.0.clone())
    }
}
