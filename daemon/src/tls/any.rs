//! A client that accepts every certificate: it looks at what a server shows, and says nothing that is secret.

use std::sync::Arc;

use rustls::{ClientConfig, Error as TlsError, client::danger::ServerCertVerified};

use super::{
    Error, finish,
    own_rule::{OwnRule, Rule, Shown},
    provider, unusable,
};

/// Accepts every certificate whose key the server has.
#[derive(Debug)]
struct Any;

impl Rule for Any {
    fn accept(&self, _: Shown<'_>) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }
}

/// Client configuration, HTTP/1.1, to look at the certificate of a server, whoever has signed it. It proves nothing: use
/// it for `doctor` alone.
///
/// # Errors
/// When the versions of TLS cannot be used.
pub fn client_that_looks() -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(OwnRule(Any)))
        .with_no_client_auth();
    let mut config = Arc::unwrap_or_clone(finish(config));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
