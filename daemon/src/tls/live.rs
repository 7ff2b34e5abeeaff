//! A certificate that is replaced while it is in use: new connections use the new one, open ones go
//! on with theirs.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

use super::{ClientAuth, Error, Identity, OWN, finish, provider, unusable};
use crate::sync::Mutex;

/// Certificate and key that are replaced in one step. Clones share them.
#[derive(Debug, Clone)]
pub struct LiveIdentity {
    current: Arc<Current>,
    roots: Arc<RootCertStore>,
    /// CA of the certificates that callers may show.
    callers: Option<Arc<RootCertStore>>,
}

#[derive(Debug)]
struct Current(Mutex<Arc<CertifiedKey>>);

impl Current {
    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.lock())
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Chooses between two certificates of a server by the name that the client asks for.
#[derive(Debug)]
struct ByName {
    own: Arc<Current>,
    /// Name for which `own` is used.
    name: &'static str,
    others: Arc<CertifiedKey>,
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let own = hello.server_name() == Some(self.name);
        Some(if own { self.own.get() } else { Arc::clone(&self.others) })
    }
}

fn certified(identity: &Identity) -> Result<Arc<CertifiedKey>, Error> {
    let (chain, key) = (identity.chain.clone(), identity.key.clone_key());
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new).map_err(unusable)
}

impl LiveIdentity {
    /// Begins with an identity.
    ///
    /// # Errors
    /// When certificate and key do not belong together.
    pub fn new(identity: &Identity) -> Result<Self, Error> {
        let current = Arc::new(Current(Mutex::new(certified(identity)?)));
        Ok(Self { current, roots: Arc::clone(&identity.roots), callers: None })
    }

    /// Lets callers show certificates of the CA in a PEM file, and of no other.
    ///
    /// # Errors
    /// When the file is missing or holds no certificate.
    pub fn with_callers(self, ca: &Path) -> Result<Self, Error> {
        let callers = Some(super::roots(ca, &super::read(ca)?)?);
        Ok(Self { callers, ..self })
    }

    /// Uses another certificate and key from now on. The CAs that are trusted stay as they are.
    ///
    /// # Errors
    /// When certificate and key do not belong together: then nothing changes.
    pub fn replace(&self, identity: &Identity) -> Result<(), Error> {
        let new = certified(identity)?;
        *self.current.0.lock() = new;
        Ok(())
    }

    /// Returns the certificate in use, DER.
    pub fn certificate(&self) -> Vec<u8> {
        self.current.get().cert.first().map(|der| der.to_vec()).unwrap_or_default()
    }

    /// Server configuration as `tls::server` makes it.
    ///
    /// # Errors
    /// When the CAs cannot be used.
    pub fn server(&self, clients: ClientAuth) -> Result<Arc<ServerConfig>, Error> {
        self.serve(clients, Arc::clone(&self.current) as Arc<dyn ResolvesServerCert>)
    }

    /// Server configuration for clients without certificates that has a second certificate: who asks
    /// for `name` sees this one, all others see `others`.
    ///
    /// # Errors
    /// When certificate and key of `others` do not belong together.
    pub fn server_beside(
        &self,
        name: &'static str,
        others: &Identity,
    ) -> Result<Arc<ServerConfig>, Error> {
        let (own, others) = (Arc::clone(&self.current), certified(others)?);
        self.serve(ClientAuth::None, Arc::new(ByName { own, name, others }))
    }

    fn serve(
        &self,
        clients: ClientAuth,
        resolver: Arc<dyn ResolvesServerCert>,
    ) -> Result<Arc<ServerConfig>, Error> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(clients.versions())
            .map_err(unusable)?;
        let of = |roots: &Arc<RootCertStore>| {
            WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        };
        let verifier = match (clients, &self.callers) {
            (ClientAuth::None, None) => None,
            (ClientAuth::None, Some(callers)) => Some(of(callers).allow_unauthenticated()),
            (ClientAuth::Required, _) => Some(of(&self.roots)),
        };
        let builder = match verifier {
            None => builder.with_no_client_auth(),
            Some(verifier) => {
                builder.with_client_cert_verifier(verifier.build().map_err(unusable)?)
            }
        };
        let mut config = builder.with_cert_resolver(resolver);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// Client configuration as `tls::client` makes it.
    ///
    /// # Errors
    /// When the CAs cannot be used.
    pub fn client(&self) -> Result<Arc<ClientConfig>, Error> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(OWN)
            .map_err(unusable)?
            .with_root_certificates(self.roots.clone())
            .with_client_cert_resolver(Arc::clone(&self.current) as Arc<dyn ResolvesClientCert>);
        Ok(finish(config))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::tls::tests::{ca, identity};

    #[tokio::test]
    async fn replaced_certificate_is_used_for_new_connections_and_open_ones_go_on() {
        let ours = ca("ours");
        let uri = "spiffe://pve-sandbox/agent/n1";
        let live = LiveIdentity::new(&identity(&ours, &ours, uri)).expect("identity");
        let client = crate::tls::client(&identity(&ours, &ours, uri)).expect("client");
        let acceptor = TlsAcceptor::from(live.server(ClientAuth::Required).expect("server"));
        let connect = async || {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let name = "test.internal".try_into().expect("a name");
            let connector = TlsConnector::from(client.clone());
            let (near, far) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
            (near.expect("connected"), far.expect("accepted"))
        };
        let shown = |stream: &tokio_rustls::client::TlsStream<tokio::io::DuplexStream>| {
            let chain = stream.get_ref().1.peer_certificates().expect("a certificate");
            chain.first().expect("one").to_vec()
        };
        let (mut near, mut far) = connect().await;
        let before = live.certificate();
        assert_eq!(shown(&near), before);
        live.replace(&identity(&ours, &ours, uri)).expect("replaced");
        assert_ne!(live.certificate(), before);
        let (second, _far) = connect().await;
        assert_eq!(shown(&second), live.certificate());
        far.write_all(b"still here").await.expect("written");
        far.flush().await.expect("flushed");
        let mut text = [0; 10];
        near.read_exact(&mut text).await.expect("read");
        assert_eq!(&text, b"still here");
    }
}
