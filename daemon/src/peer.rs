//! Who is at the other end of a connection, by its certificate.

use proto::name::NodeName;
use x509_parser::{extensions::GeneralName, prelude::*};

/// Identity in the URI name of a certificate of our CA, as `spiffe://pve-sandbox/...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// No certificate, or one that names nobody of ours.
    Anonymous,
    /// The controller.
    Controller,
    /// The agent of a node.
    Agent(NodeName),
}

/// URI of the controller's certificate.
pub const CONTROLLER_URI: &str = "spiffe://pve-sandbox/controller";
/// URI of an agent's certificate, before the node's name.
pub const AGENT_URI: &str = "spiffe://pve-sandbox/agent/";

impl Peer {
    /// The identity in a DER certificate whose chain has been verified.
    pub fn of_certificate(der: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Self::Anonymous };
        let Ok(Some(names)) = certificate.subject_alternative_name() else {
            return Self::Anonymous;
        };
        let mut uris =
            names.value.general_names.iter().filter_map(|name| {
                if let GeneralName::URI(uri) = name { Some(*uri) } else { None }
            });
        // Two URIs would be two identities: nobody.
        match (uris.next(), uris.next()) {
            (Some(CONTROLLER_URI), None) => Self::Controller,
            (Some(uri), None) => uri
                .strip_prefix(AGENT_URI)
                .and_then(|node| node.parse().ok())
                .map_or(Self::Anonymous, Self::Agent),
            _ => Self::Anonymous,
        }
    }
}
