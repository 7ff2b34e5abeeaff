//! TLS from PEM files. No session resumption: a peer whose certificate or CA was withdrawn must not
//! live on in a ticket.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// The key material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file is missing or is not what it must be.
    #[error("cannot use {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The parts do not fit together.
    #[error("the certificates cannot be used: {0}")]
    Unusable(String),
}

/// A certificate with its key, and the CA that others must be of.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

/// What a server asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// Nothing.
    None,
    /// A certificate of the CA, if there is one.
    Optional,
    /// A certificate of the CA.
    Required,
}

impl Identity {
    /// Reads three PEM files: certificate (with its chain), key, CA.
    ///
    /// # Errors
    /// When one is missing or not PEM.
    pub fn load(certificate: &Path, key: &Path, ca: &Path) -> Result<Self, Error> {
        Ok(Self {
            chain: certificates(certificate, &read(certificate)?)?,
            key: PrivateKeyDer::from_pem_slice(&read(key)?)
                .map_err(|error| file(key, error.to_string()))?,
            roots: roots(ca, &read(ca)?)?,
        })
    }
}

fn file(path: &Path, why: String) -> Error {
    Error::File { path: path.to_owned(), why }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| file(path, error.to_string()))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| file(path, error.to_string()))?;
    if chain.is_empty() { Err(file(path, "it holds no certificate".into())) } else { Ok(chain) }
}

fn roots(path: &Path, pem: &[u8]) -> Result<Arc<RootCertStore>, Error> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        store.add(certificate).map_err(|error| file(path, error.to_string()))?;
    }
    Ok(Arc::new(store))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Unusable(error.to_string())
}

/// A server's side: TLS 1.2 and 1.3, `h2` and `http/1.1`.
///
/// # Errors
/// When certificate and key do not belong together.
pub fn server(identity: &Identity, clients: ClientAuth) -> Result<Arc<ServerConfig>, Error> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots.clone(), provider());
    let builder = match clients {
        ClientAuth::None => builder.with_no_client_auth(),
        ClientAuth::Optional => builder
            .with_client_cert_verifier(verifier.allow_unauthenticated().build().map_err(unusable)?),
        ClientAuth::Required => {
            builder.with_client_cert_verifier(verifier.build().map_err(unusable)?)
        }
    };
    let mut config = builder
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(unusable)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A client's side with a certificate of its own.
///
/// # Errors
/// When certificate and key do not belong together.
pub fn client(identity: &Identity) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(identity.roots.clone())
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(unusable)?;
    Ok(finish(config))
}

/// A client's side that shows no certificate and trusts the CA in a PEM file.
///
/// # Errors
/// When the file is missing or holds no certificate.
pub fn client_with_roots(ca: &Path) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots(ca, &read(ca)?)?)
        .with_no_client_auth();
    Ok(finish(config))
}

fn finish(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}
