//! Opens connections to agents.

use std::{fmt::Debug, io, sync::Arc};

use daemon::flow::Leg;
use proto::name::NodeName;
use tonic::transport::Channel;

use super::NodeCertificates;

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

    /// Returns what is known of the nodes' certificates, where there are any.
    fn certificates(&self) -> Option<Arc<NodeCertificates>> {
        None
    }
}

/// Mutual TLS over TCP. The agent's certificate must contain the node's name, so that a node cannot
/// answer for another, and must not be revoked.
#[derive(Debug)]
pub struct TlsConnector {
    config: Arc<rustls::ClientConfig>,
    certificates: Arc<NodeCertificates>,
}

impl TlsConnector {
    /// Creates a connector with this identity.
    pub fn new(config: Arc<rustls::ClientConfig>) -> Self {
        Self { config, certificates: Arc::default() }
    }
}

impl Connector for TlsConnector {
    fn channel(&self, node: &NodeName, address: &str, _: Lane) -> io::Result<Channel> {
        let server_name = daemon::peer::agent_name(node);
        let (certificates, node) = (Arc::clone(&self.certificates), node.clone());
        let check = move |der: &[u8]| certificates.check(&node, der);
        let config = self.config.clone();
        daemon::channel::tls_checked(Leg::Agent, address, &server_name, config, Arc::new(check))
    }

    fn certificates(&self) -> Option<Arc<NodeCertificates>> {
        Some(Arc::clone(&self.certificates))
    }
}
