//! A client that knows nothing of a server but the fingerprint of its CA: for the first contact of a
//! node that joins.

use std::sync::Arc;

use rustls::{
    CertificateError, ClientConfig, Error as TlsError, RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{ServerCertVerified, ServerCertVerifier as _},
    },
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};

use super::{
    Error, OWN, finish,
    own_rule::{OwnRule, Rule, Shown},
    provider, unusable,
};

/// Verifies a server by the CA that it sends, if that has the right fingerprint.
#[derive(Debug)]
struct Pinned {
    sha256: [u8; 32],
}

impl Pinned {
    /// Returns the usual verifier, which trusts the pinned CA alone.
    fn usual(&self, sent: &[CertificateDer<'_>]) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let is_pinned = |ca: &&CertificateDer<'_>| Sha256::digest(ca)[..] == self.sha256;
        let ca = sent.iter().find(is_pinned).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| TlsError::General(error.to_string()))
    }
}

fn unknown() -> TlsError {
    TlsError::InvalidCertificate(CertificateError::UnknownIssuer)
}

impl Rule for Pinned {
    fn accept(&self, shown: Shown<'_>) -> Result<ServerCertVerified, TlsError> {
        let Shown { end_entity, intermediates, server_name, ocsp_response, now } = shown;
        let usual = self.usual(intermediates)?;
        usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }
}

/// Client configuration without a certificate; trusts the CA with this SHA-256 of its certificate
/// (DER), which the server must send. TLS 1.3.
///
/// # Errors
/// When TLS cannot be used at all.
pub fn client_that_pins(sha256: [u8; 32]) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(OWN)
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(OwnRule(Pinned { sha256 })))
        .with_no_client_auth();
    Ok(finish(config))
}

#[cfg(test)]
mod tests {
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::tls::{
        ClientAuth, LiveIdentity,
        tests::{Ca, ca, identity},
    };

    fn print(ca: &Ca) -> [u8; 32] {
        Sha256::digest(ca.der()).into()
    }

    /// Whether a client that pins `pin` accepts a server of `issuer` under a name.
    async fn accepts(issuer: &Ca, sent: &Ca, pin: [u8; 32], name: &str) -> bool {
        let mut own = identity(issuer, issuer, "spiffe://pve-sandbox/controller");
        own.chain.push(sent.der().clone());
        let server = LiveIdentity::new(&own).expect("identity").server(ClientAuth::None);
        let (near, far) = tokio::io::duplex(64 * 1024);
        let client = client_that_pins(pin).expect("client");
        let name = name.to_owned().try_into().expect("a name");
        let connector = TlsConnector::from(client);
        let acceptor = TlsAcceptor::from(server.expect("server"));
        let (near, _far) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
        near.is_ok()
    }

    #[tokio::test]
    async fn only_a_server_of_the_pinned_ca_is_accepted() {
        let (ours, foreign) = (ca("ours"), ca("foreign"));
        assert!(accepts(&ours, &ours, print(&ours), "test.internal").await);
        assert!(!accepts(&ours, &ours, print(&foreign), "test.internal").await, "another pin");
        assert!(!accepts(&ours, &ours, print(&ours), "other.internal").await, "another name");
        // Somebody in between has our CA's certificate, which is no secret, and no key of it.
        assert!(!accepts(&foreign, &ours, print(&ours), "test.internal").await);
    }
}
