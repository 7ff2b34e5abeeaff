//! Identity of a connection's peer, from its certificate.

use std::{net::IpAddr, time::Duration};

use proto::name::NodeName;
use sha2::{Digest as _, Sha256};
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
    /// A caller with a client certificate.
    Client(Client),
}

/// Identity of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    /// Public id of the token that the certificate stands for.
    pub token: String,
    /// SHA-256 of its public key.
    pub key: [u8; 32],
}

/// Name in the controller's own certificate, whatever other names it has.
pub const CONTROLLER_NAME: &str = "controller.pve-sandbox.internal";
/// URI of the controller's certificate.
pub const CONTROLLER_URI: &str = "spiffe://pve-sandbox/controller";
/// URI of an agent's certificate, without the node's name.
pub const AGENT_URI: &str = "spiffe://pve-sandbox/agent/";

/// URI of a client certificate, without the id of its token.
pub const CLIENT_URI: &str = "spiffe://pve-sandbox/client/";

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

/// Host name in the certificate of a node's agent.
pub fn agent_name(node: &NodeName) -> String {
    format!("{node}.agent.pve-sandbox.internal")
}

/// Number and life of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Validity {
    /// Serial number, lower-case hex without leading zeros.
    pub serial: String,
    /// Begin of its life, milliseconds since 1970.
    pub not_before_ms: u64,
    /// End of its life, milliseconds since 1970.
    pub not_after_ms: u64,
}

/// Backdating of every certificate of our CA: a node's clock may be behind by as much.
pub const BACKDATED: Duration = Duration::from_hours(1);

impl Validity {
    /// Share of its life, from its issue to its end, milliseconds since 1970.
    fn at(&self, share: f64) -> u64 {
        let issued = self.not_before_ms + crate::clock::millis(BACKDATED);
        let life = Duration::from_millis(self.not_after_ms.saturating_sub(issued));
        issued + crate::clock::millis(life.mul_f64(share))
    }

    /// Time at which it is to be renewed, milliseconds since 1970: half of its life.
    pub fn renew_ms(&self) -> u64 {
        self.at(0.5)
    }

    /// Returns true when it is to be renewed: at half of its life, or when it is not valid yet. The latter is one that
    /// was issued while the clock was ahead: nobody accepts it now, and half of its life is far away.
    pub fn is_due(&self, now_ms: u64) -> bool {
        self.renew_ms() <= now_ms || !self.has_begun(now_ms)
    }

    /// Returns true unless it is not valid yet.
    pub fn has_begun(&self, now_ms: u64) -> bool {
        self.not_before_ms <= now_ms
    }

    /// Whole hours until it ends; 0 when it has ended.
    pub fn hours_left(&self, now_ms: u64) -> u64 {
        self.not_after_ms.saturating_sub(now_ms) / 3_600_000
    }

    /// Time from which its renewal is overdue, milliseconds since 1970: three quarters of its life.
    pub fn overdue_ms(&self) -> u64 {
        self.at(0.75)
    }
}

/// Number and life of a DER certificate.
///
/// # Errors
/// When it is no certificate.
pub fn validity(der: &[u8]) -> Result<Validity, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let ms = |time: ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0) * 1000;
    let validity = certificate.validity();
    Ok(Validity {
        serial: certificate.serial.to_str_radix(16),
        not_before_ms: ms(validity.not_before),
        not_after_ms: ms(validity.not_after),
    })
}

fn is_token(id: &str) -> bool {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    id.len() == proto::token::ID_DIGITS && id.bytes().all(hex)
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
            (Some(uri), None) => {
                let agent = || uri.strip_prefix(AGENT_URI)?.parse().ok().map(Self::Agent);
                let client = || {
                    let token = uri.strip_prefix(CLIENT_URI).filter(|id| is_token(id))?;
                    let key = Sha256::digest(&certificate.public_key().subject_public_key.data);
                    Some(Self::Client(Client { token: token.to_owned(), key: key.into() }))
                };
                agent().or_else(client).unwrap_or(Self::Anonymous)
            }
            _ => Self::Anonymous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_is_due_at_half_of_its_life_and_before_it_begins() {
        let hour = crate::clock::millis(BACKDATED);
        let (not_before_ms, not_after_ms) = (100 * hour, 111 * hour);
        let life = Validity { serial: "1".into(), not_before_ms, not_after_ms };
        let due = |hours: u64| life.is_due(hours * hour);
        assert_eq!([1, 99, 100, 105, 106, 200].map(due), [true, true, false, false, true, true]);
    }
}
