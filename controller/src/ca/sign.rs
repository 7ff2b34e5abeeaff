//! Signs certificates for keys that nodes have made.

use std::{net::IpAddr, path::Path, time::Duration};

use daemon::peer::{self, Validity};
use proto::name::NodeName;
use rcgen::Certificate;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};

use super::{
    Error, Files, Result,
    issue::{Authority, Role, Usage},
    load,
};

/// Lives of what a node gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lives {
    /// Life of the agent's certificate.
    pub agent: Duration,
    /// Life of the ingress hop's, which Caddy reads at its start only.
    pub ingress: Duration,
}

impl Default for Lives {
    fn default() -> Self {
        Self { agent: Duration::from_hours(7 * 24), ingress: Duration::from_hours(365 * 24) }
    }
}

/// A certificate that was issued for somebody else's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Certificate, PEM.
    pub pem: String,
    /// Its number and life.
    pub validity: Validity,
    /// Public key that it is for.
    pub key: Vec<u8>,
}

/// Both CAs, ready to sign.
pub struct Signer {
    agents: Authority,
    ingress: Authority,
    lives: Lives,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("lives", &self.lives).finish_non_exhaustive()
    }
}

pub(super) fn agent_names(node: &NodeName, address: Option<IpAddr>) -> Vec<String> {
    let mut names = vec![peer::agent_name(node), "agent.pve-sandbox.internal".to_owned()];
    names.extend(address.map(|address| address.to_string()));
    names
}

pub(super) fn ingress_names(node: &NodeName) -> [String; 2] {
    [node.to_string(), "ingress.pve-sandbox.internal".to_owned()]
}

fn signed((certificate, key): (Certificate, Vec<u8>)) -> Result<Signed> {
    let validity = peer::validity(certificate.der()).map_err(Error::Request)?;
    Ok(Signed { pem: certificate.pem(), validity, key })
}

impl Signer {
    /// Reads both CAs under a data directory.
    ///
    /// # Errors
    /// When one is not there or cannot be read.
    pub fn load(data_dir: &Path, lives: Lives) -> Result<Self> {
        let files = Files::new(data_dir);
        let (agents, ingress) = (load(&files, "ca")?, load(&files, "ingress-ca")?);
        Ok(Self { agents, ingress, lives })
    }

    /// Returns the lives of what it signs.
    pub fn lives(&self) -> Lives {
        self.lives
    }

    /// Signs the agent's certificate.
    ///
    /// # Errors
    /// When the request is refused.
    pub fn agent(&self, node: &NodeName, request: &str) -> Result<Signed> {
        // No address: callers who trust this CA reach the controller by one, and a node chooses its own.
        let names = agent_names(node, None);
        let uri = Some(format!("{}{node}", peer::AGENT_URI));
        let (life, role) = (self.lives.agent, Role::Daemon);
        let usage = Usage { common: node.as_str(), names: &names, uri, life, role };
        signed(self.agents.sign(&usage, request)?)
    }

    /// Signs the certificate of the hop between the nodes' Caddys.
    ///
    /// # Errors
    /// When the request is refused.
    pub fn ingress(&self, node: &NodeName, request: &str) -> Result<Signed> {
        let names = ingress_names(node);
        let (common, life) = (node.as_str(), self.lives.ingress);
        let usage = Usage { common, names: &names, uri: None, life, role: Role::Daemon };
        signed(self.ingress.sign(&usage, request)?)
    }

    /// Returns the CA of the controller and the agents, PEM.
    pub fn ca(&self) -> &str {
        &self.agents.certificate
    }

    /// Returns the CA of the ingress hop, PEM.
    pub fn ingress_ca(&self) -> &str {
        &self.ingress.certificate
    }

    /// Returns the SHA-256 of the CA's certificate (DER), by which a node that joins knows it.
    pub fn fingerprint(&self) -> [u8; 32] {
        let der = CertificateDer::from_pem_slice(self.ca().as_bytes());
        Sha256::digest(der.as_deref().unwrap_or_default()).into()
    }
}

#[cfg(test)]
mod tests {
    use daemon::peer::Peer;
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, SanType};

    use super::*;
    use crate::ca::init;

    /// Returns a request with names that nobody should get.
    fn request(key: &KeyPair) -> String {
        let mut params = CertificateParams::new(vec!["evil.example.com".into()]).expect("params");
        let uri = daemon::peer::CONTROLLER_URI.try_into().expect("ascii");
        params.subject_alt_names.push(SanType::URI(uri));
        params.serialize_request(key).expect("request").pem().expect("PEM")
    }

    #[test]
    fn request_gets_the_names_of_its_node_and_no_others() {
        let dir = tempfile::tempdir().expect("tempdir");
        init(dir.path(), &[]).expect("init");
        let signer = Signer::load(dir.path(), Lives::default()).expect("signer");
        let n1: NodeName = "n1".parse().expect("name");
        let key = KeyPair::generate().expect("key");
        let one = signer.agent(&n1, &request(&key)).expect("signed");
        let der = CertificateDer::from_pem_slice(one.pem.as_bytes()).expect("PEM");
        assert_eq!(Peer::of_certificate(&der), Peer::Agent(n1.clone()));
        let names = ["n1.agent.pve-sandbox.internal", "agent.pve-sandbox.internal"];
        assert_eq!(daemon::peer::names(&der).expect("names"), names);
        assert!(daemon::tls::fits(one.pem.as_bytes(), key.serialize_pem().as_bytes()));
        let days = (one.validity.not_after_ms - one.validity.not_before_ms) / 3_600_000;
        assert_eq!(days, 7 * 24 + 1);
        let again = signer.agent(&n1, &request(&key)).expect("signed");
        assert_ne!(again.validity.serial, one.validity.serial);
        let hop = signer.ingress(&n1, &request(&key)).expect("signed");
        let der = CertificateDer::from_pem_slice(hop.pem.as_bytes()).expect("PEM");
        assert_eq!(Peer::of_certificate(&der), Peer::Anonymous);
    }

    #[test]
    fn request_with_another_kind_of_key_or_a_broken_signature_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        init(dir.path(), &[]).expect("init");
        let signer = Signer::load(dir.path(), Lives::default()).expect("signer");
        let n1: NodeName = "n1".parse().expect("name");
        let other = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("key");
        let good = request(&KeyPair::generate().expect("key"));
        let middle = good.len() / 2;
        let swapped = if good.as_bytes()[middle] == b'A' { "B" } else { "A" };
        let broken = format!("{}{swapped}{}", &good[..middle], &good[middle + 1..]);
        for bad in [request(&other), broken, String::new(), "x".repeat(4000)] {
            let error = signer.agent(&n1, &bad).expect_err("refused");
            assert!(matches!(error, Error::Request(_)), "{error}");
        }
    }
}
