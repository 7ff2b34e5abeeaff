//! Identity of a connection's peer, from its certificate.

use std::net::IpAddr;

use proto::name::NodeName;
use x509_parser::{extensions::GeneralName, prelude::*};

/// Identity in the URI name of a certificate of our CA, as `spiffe://pve-sandbox/...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// No certificate, or one without an identity of ours.
    Anonymous,
    /// The controller.
    Controller,
    /// The agent of a node.
    Agent(NodeName),
}

/// URI of the controller's certificate.
pub const CONTROLLER_URI: &str = "spiffe://pve-sandbox/controller";
/// URI of an agent's certificate, without the node's name.
pub const AGENT_URI: &str = "spiffe://pve-sandbox/agent/";

/// Host names and addresses in a DER certificate, by which clients may reach its holder.
///
/// # Errors
/// When it is no certificate.
pub fn names(der: &[u8]) -> Result<Vec<String>, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let address = |bytes: &[u8]| {
        let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
    };
    let text = |name: &GeneralName<'_>| {
        if let GeneralName::DNSName(name) = name {
            return Some((*name).to_owned());
        }
        let GeneralName::IPAddress(bytes) = name else { return None };
        address(bytes).map(|address| address.to_string())
    };
    let names = names.map(|names| names.value.general_names.iter().filter_map(text).collect());
    Ok(names.unwrap_or_default())
}

impl Peer {
    /// Identity in a DER certificate whose chain has been verified.
    pub fn of_certificate(der: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Self::Anonymous };
        let Ok(Some(names)) = certificate.subject_alternative_name() else {
            return Self::Anonymous;
        };
        let mut uris =
            names.value.general_names.iter().filter_map(|name| {
                if let GeneralName::URI(uri) = name { Some(*uri) } else { None }
            });
        // Two URIs would be two identities, so neither counts.
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
