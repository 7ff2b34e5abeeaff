//! Signs the certificates of callers, for keys that they have made. A CA of their own signs them: no agent,
//! no node and no client of the controller trusts it, and the controller trusts no other for callers.

use std::{path::Path, time::Duration};

use daemon::peer::{self, Peer};

use super::{
    CLIENT_CA, Error, Files, LONG, Result,
    issue::{Authority, Role, Usage},
    load,
};

/// Longest certificate request, bytes.
const REQUEST_MAX: usize = 8192;

/// CA of callers, ready to sign.
pub struct ClientSigner(Authority);

impl std::fmt::Debug for ClientSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientSigner").finish_non_exhaustive()
    }
}

/// Certificate of a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedClient {
    /// Certificate, PEM.
    pub pem: String,
    /// SHA-256 of the public key that it is for.
    pub key: [u8; 32],
}

impl ClientSigner {
    /// Reads the CA under a data directory.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn load(data_dir: &Path) -> Result<Self> {
        load(&Files::new(data_dir), CLIENT_CA).map(Self)
    }

    /// Signs the certificate of a token, for the key of a request (PEM). `life`: that of the token;
    /// `None`: it never ends, and the certificate lives for 10 years.
    ///
    /// # Errors
    /// When the request is refused.
    pub fn sign(&self, token: &str, life: Option<Duration>, request: &str) -> Result<SignedClient> {
        if request.len() > REQUEST_MAX {
            return Err(Error::Request(format!("it has more than {REQUEST_MAX} bytes")));
        }
        let usage = Usage {
            common: token,
            names: &[],
            uri: Some(format!("{}{token}", peer::CLIENT_URI)),
            life: life.map_or(LONG, |life| life.min(LONG)),
            role: Role::Caller,
        };
        let (certificate, _) = self.0.sign(&usage, request)?;
        match Peer::of_certificate(certificate.der()) {
            Peer::Client(client) if client.token == token => {
                Ok(SignedClient { pem: certificate.pem(), key: client.key })
            }
            Peer::Client(_) | Peer::Agent(_) | Peer::Controller | Peer::Anonymous => {
                Err(Error::Request("the certificate would name another token".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384};
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    use super::*;
    use crate::ca::{complete, init};

    fn request(key: &KeyPair) -> String {
        let mut params = CertificateParams::new(vec!["evil.example.com".into()]).expect("params");
        let uri = peer::CONTROLLER_URI.try_into().expect("ascii");
        params.subject_alt_names.push(rcgen::SanType::URI(uri));
        params.serialize_request(key).expect("request").pem().expect("PEM")
    }

    #[test]
    fn certificate_of_a_caller_names_its_token_alone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let signer = ClientSigner::load(dir.path()).expect("signer");
        let (id, key) = ("0123456789ab", KeyPair::generate().expect("key"));
        let hour = Some(Duration::from_hours(1));
        let signed = signer.sign(id, hour, &request(&key)).expect("signed");
        let der = CertificateDer::from_pem_slice(signed.pem.as_bytes()).expect("PEM");
        let client = peer::Client { token: id.into(), key: signed.key };
        assert_eq!(Peer::of_certificate(&der), Peer::Client(client));
        assert_eq!(peer::names(&der).expect("names"), Vec::<String>::new());
        let validity = peer::validity(&der).expect("validity");
        assert_eq!(validity.not_after_ms - validity.not_before_ms, 2 * 3_600_000);
        assert!(daemon::tls::fits(signed.pem.as_bytes(), key.serialize_pem().as_bytes()));
        // The CA of the daemons has not signed it, and so no daemon takes it.
        let ca = std::fs::read(files.ca()).expect("the CA");
        assert_ne!(ca, std::fs::read(files.client_ca()).expect("the callers' CA"));
        let other = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("key");
        for bad in [request(&other), String::new(), "x".repeat(9000)] {
            let error = signer.sign(id, hour, &bad).expect_err("refused");
            assert!(matches!(error, Error::Request(_)), "{error}");
        }
    }

    #[test]
    fn ca_of_an_earlier_version_is_completed_and_stays() {
        let dir = tempfile::tempdir().expect("tempdir");
        complete(dir.path()).expect("nothing to do");
        ClientSigner::load(dir.path()).expect_err("no CA yet");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let ca = std::fs::read(files.ca()).expect("the CA");
        std::fs::remove_file(files.client_ca()).expect("removed");
        std::fs::remove_file(files.path("client-ca.key")).expect("removed");
        complete(dir.path()).expect("made");
        ClientSigner::load(dir.path()).expect("signer");
        assert_eq!(std::fs::read(files.ca()).expect("the CA"), ca);
    }
}
