//! TLS from PEM files. Between our own daemons, where both ends have certificates, only TLS 1.3;
//! callers may use 1.2. No session resumption: a ticket must not outlive a withdrawn certificate or
//! CA. `live` replaces a certificate while it is in use, `pinned` trusts one CA by its fingerprint,
//! and `any` looks at a certificate.

mod any;
mod live;
mod own_rule;
mod pinned;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, DEFAULT_VERSIONS, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier as _},
    crypto::{CryptoProvider, aws_lc_rs},
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, UnixTime,
    pem::{self, PemObject},
};

pub use any::client_that_looks;
pub use live::LiveIdentity;
pub use pinned::client_that_pins;

/// Error in the key material.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A PEM file is missing or invalid.
    #[error("cannot use {}: {why}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// The parts do not match.
    #[error("the certificates cannot be used: {0}")]
    Unusable(String),
}

/// Certificate with its key, and the CA that issues the peers' certificates.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

/// Certificate that a server requires of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// None: they are callers, who may show a certificate of the callers' CA.
    None,
    /// One of the CA: they are our own daemons.
    Required,
}

/// TLS versions between our own daemons.
const OWN: &[&SupportedProtocolVersion] = &[&TLS13];

impl ClientAuth {
    fn versions(self) -> &'static [&'static SupportedProtocolVersion] {
        match self {
            Self::None => DEFAULT_VERSIONS,
            Self::Required => OWN,
        }
    }
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

    /// Reads as `load` does, and sends the CA's certificates with the own one: so a peer that knows
    /// only a CA's fingerprint can check it.
    ///
    /// # Errors
    /// When one is missing or not PEM.
    pub fn load_with_ca(certificate: &Path, key: &Path, ca: &Path) -> Result<Self, Error> {
        let mut identity = Self::load(certificate, key, ca)?;
        identity.chain.extend(certificates(ca, &read(ca)?)?);
        Ok(identity)
    }
}

/// Returns true when a certificate and a private key, both PEM, belong together.
pub fn fits(certificate: &[u8], key: &[u8]) -> bool {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
    let (Ok(chain), Ok(key)) = (chain, PrivateKeyDer::from_pem_slice(key)) else { return false };
    !chain.is_empty() && CertifiedKey::from_der(chain, key, &provider()).is_ok()
}

/// Checks that a CA has signed a certificate, both PEM, whatever the time is now.
///
/// # Errors
/// With the reason why not.
pub fn signed_by(certificate: &[u8], ca: &[u8]) -> Result<(), String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate)
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    let (leaf, others) = chain.split_first().ok_or("it holds no certificate")?;
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(ca) {
        let root = root.map_err(|error| error.to_string())?;
        roots.add(root).map_err(|error| error.to_string())?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    let verifier = verifier.build().map_err(|error| error.to_string())?;
    // Time and name are checked elsewhere: here a time within its life, and a name that it has.
    let validity = crate::peer::validity(leaf)?;
    let within = validity.not_before_ms.midpoint(validity.not_after_ms);
    let within = UnixTime::since_unix_epoch(Duration::from_millis(within));
    let names = crate::peer::names(leaf)?;
    let name = names.first().ok_or("it has no name")?.to_owned();
    let name = ServerName::try_from(name).map_err(|error| error.to_string())?;
    let verified = verifier.verify_server_cert(leaf, others, &name, &[], within);
    verified.map(drop).map_err(|error| error.to_string())
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

/// Files of CAs that systems have: Debian, Fedora, openSUSE; Alpine, macOS and the BSDs.
const SYSTEM: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Reads the CAs that the system trusts; those that cannot be used are left out, as others do. One file
/// with the reader that is here already takes a millisecond; rustls-native-certs reads a directory
/// besides, three times as long.
fn system_roots() -> Result<Arc<RootCertStore>, Error> {
    // The variable that OpenSSL and others heed.
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let usual = || SYSTEM.iter().map(PathBuf::from).find(|path| path.exists());
    let path = named.or_else(usual).ok_or_else(|| {
        Error::Unusable("the system has no file of CAs: install the package ca-certificates".into())
    })?;
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates(&path, &read(&path)?)?);
    if added == 0 { Err(file(&path, "it holds no CA".into())) } else { Ok(Arc::new(store)) }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Unusable(error.to_string())
}

/// Server configuration, `h2` and `http/1.1`: TLS 1.3 for clients with certificates, also 1.2 for
/// others.
///
/// # Errors
/// When certificate and key do not belong together.
pub fn server(identity: &Identity, clients: ClientAuth) -> Result<Arc<ServerConfig>, Error> {
    LiveIdentity::new(identity)?.server(clients)
}

/// Client configuration with a certificate, for our own daemons: TLS 1.3.
///
/// # Errors
/// When certificate and key do not belong together.
pub fn client(identity: &Identity) -> Result<Arc<ClientConfig>, Error> {
    LiveIdentity::new(identity)?.client()
}

/// Client configuration without a certificate; trusts the CA in a PEM file.
///
/// # Errors
/// When the file is missing or holds no certificate.
pub fn client_with_roots(ca: &Path) -> Result<Arc<ClientConfig>, Error> {
    client_that_trusts(roots(ca, &read(ca)?)?)
}

/// Client configuration without a certificate; trusts the CAs of the system, for servers whose certificate
/// is a public one.
///
/// # Errors
/// When the system has none.
pub fn client_with_system_roots() -> Result<Arc<ClientConfig>, Error> {
    client_that_trusts(system_roots()?)
}

/// Client configuration for HTTP/1.1 servers of the web; trusts the CAs in a PEM file, or else those of the
/// system.
///
/// # Errors
/// When there are none.
pub fn client_of_the_web(ca: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let roots = match ca {
        Some(ca) => roots(ca, &read(ca)?)?,
        None => system_roots()?,
    };
    let mut config = Arc::unwrap_or_clone(client_that_trusts(roots)?);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Client configuration with the certificate of a caller, in one PEM file with its key; trusts the CA in
/// another file, or else those of the system.
///
/// # Errors
/// When a file is missing, or certificate and key do not belong together.
pub fn client_with_certificate(own: &Path, ca: Option<&Path>) -> Result<Arc<ClientConfig>, Error> {
    let roots = match ca {
        Some(ca) => roots(ca, &read(ca)?)?,
        None => system_roots()?,
    };
    let pem = read(own)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        let is_missing = matches!(error, pem::Error::NoItemsFound);
        file(own, if is_missing { "it has no private key".to_owned() } else { error.to_string() })
    })?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates(own, &pem)?, key)
        .map_err(|error| file(own, error.to_string()))?;
    Ok(finish(config))
}

fn client_that_trusts(roots: Arc<RootCertStore>) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(finish(config))
}

fn finish(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    };
    use rustls::{ProtocolVersion, version::TLS12};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;

    pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

    pub(crate) fn ca(name: &str) -> Ca {
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("ca")
    }

    /// Creates a leaf of `issuer` with a URI, in files, trusting `trusted`.
    pub(crate) fn identity(issuer: &Ca, trusted: &Ca, uri: &str) -> Identity {
        let dir = tempfile::tempdir().expect("tempdir");
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec!["test.internal".into()]).expect("params");
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ascii")));
        let leaf = params.signed_by(&key, issuer).expect("leaf");
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("crt"), leaf.pem()).expect("write");
        std::fs::write(path("key"), key.serialize_pem()).expect("write");
        std::fs::write(path("ca"), trusted.pem()).expect("write");
        Identity::load(&path("crt"), &path("key"), &path("ca")).expect("identity")
    }

    fn client_of(
        identity: &Identity,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(identity.roots.clone())
            .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key());
        finish(config.expect("a certificate"))
    }

    fn server_of(
        identity: &Identity,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ServerConfig> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(identity.chain.clone(), identity.key.clone_key());
        Arc::new(config.expect("a certificate"))
    }

    async fn agreed(
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
    ) -> Option<ProtocolVersion> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = "test.internal".try_into().expect("a name");
        let connect = TlsConnector::from(client).connect(name, near);
        let (client, server) = tokio::join!(connect, TlsAcceptor::from(server).accept(far));
        client.ok()?;
        server.ok()?.get_ref().1.protocol_version()
    }

    #[tokio::test]
    async fn daemons_speak_only_tls_1_3_and_callers_may_use_1_2() {
        let ours = ca("ours");
        let one = identity(&ours, &ours, "spiffe://pve-sandbox/controller");
        let (new, old) = (Some(ProtocolVersion::TLSv1_3), Some(ProtocolVersion::TLSv1_2));
        let agent = server(&one, ClientAuth::Required).expect("server");
        assert_eq!(agreed(agent.clone(), client(&one).expect("client")).await, new);
        assert_eq!(agreed(agent.clone(), client_of(&one, &[&TLS13])).await, new);
        assert_eq!(agreed(agent, client_of(&one, &[&TLS12])).await, None);
        let (old_end, both) = (server_of(&one, &[&TLS12]), server_of(&one, &[&TLS12, &TLS13]));
        assert_eq!(agreed(old_end, client(&one).expect("client")).await, None);
        assert_eq!(agreed(both, client(&one).expect("client")).await, new);

        let api = server(&one, ClientAuth::None).expect("server");
        assert_eq!(agreed(api.clone(), client_of(&one, &[&TLS12])).await, old);
        assert_eq!(agreed(api, client_of(&one, &[&TLS12, &TLS13])).await, new);
    }
}
