//! The node's own keys and certificates. Keys are made here and never leave the node; the controller
//! signs. There are two: of the agent, and of the hop between the nodes' Caddys.

use std::{
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::Arc,
};

use daemon::{
    key_files::KeyFiles,
    peer,
    replace::Access,
    sync::Mutex,
    tls::{Identity, LiveIdentity},
};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tokio::sync::Notify;

/// Largest certificate that is read, bytes.
const BYTES_MAX: u64 = 64 * 1024;

/// Permissions of the ingress key for the group that Caddy runs as.
///
/// # Errors
/// When there is no such group.
pub fn access_of(group: Option<&str>) -> io::Result<Access> {
    let Some(name) = group else { return Ok(Access::PRIVATE) };
    let found = nix::unistd::Group::from_name(name)?;
    let found = found.ok_or_else(|| io::Error::other(format!("there is no group {name}")))?;
    Ok(Access { mode: 0o640, group: Some(found.gid.as_raw()) })
}

/// Makes a key, stores it as the one that waits for a certificate, and returns a request for it, PEM.
/// A key that was made for the same purpose and waits already is used: so a repeated call has the same
/// one. Without a purpose there is always a new key.
///
/// # Errors
/// When the key cannot be made or stored.
pub fn request(files: &KeyFiles, node: &str, purpose: Option<&str>) -> io::Result<String> {
    // The key that waits may be that of the certificate which is installed.
    files.recover()?;
    let waiting = purpose.map(|purpose| files.waiting_for(purpose)).transpose()?.flatten();
    let key = match waiting.and_then(|pem| KeyPair::from_pem(&pem).ok()) {
        Some(key) => key,
        None => {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(io::Error::other)?;
            files.prepare_for(&key.serialize_pem(), purpose.unwrap_or_default())?;
            key
        }
    };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, node);
    let request = params.serialize_request(&key).and_then(|request| request.pem());
    request.map_err(io::Error::other)
}

/// Certificate requests of the node, PEM.
#[derive(Debug)]
pub struct Requests {
    /// Request of the agent.
    pub agent: String,
    /// Request of the ingress hop, when its certificate is to be renewed, too.
    pub ingress: Option<String>,
}

/// Certificates of a running agent.
#[derive(Debug)]
pub struct Certificates {
    node: String,
    agent: KeyFiles,
    /// None where the node has no certificate of the ingress hop.
    ingress: Option<KeyFiles>,
    ca: PathBuf,
    live: LiveIdentity,
    /// Held while files are changed.
    turn: Mutex<()>,
    /// Notified when the certificate of the ingress hop has changed.
    changed: Option<Arc<Notify>>,
}

impl Certificates {
    /// Takes over the files of an agent that serves with `live`.
    pub fn new(
        node: String,
        (agent, ingress): (KeyFiles, Option<KeyFiles>),
        ca: PathBuf,
        live: LiveIdentity,
    ) -> Self {
        Self { node, agent, ingress, ca, live, turn: Mutex::default(), changed: None }
    }

    /// Notifies this of each new certificate of the ingress hop: who gets it has Caddy use the certificate.
    #[must_use]
    pub fn notifying(mut self, changed: Arc<Notify>) -> Self {
        self.changed = Some(changed);
        self
    }

    /// Returns true when somebody has Caddy use a new certificate, so that no operator need restart it.
    pub fn reach_caddy(&self) -> bool {
        self.changed.is_some()
    }

    /// Makes new keys, durably, and returns requests for them. Nothing that is in use changes. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn request(&self, now_ms: u64) -> io::Result<Requests> {
        let _turn = self.turn.lock();
        let _locks = self.locks()?;
        let agent = request(&self.agent, &self.node, None)?;
        let due = self.ingress.as_ref().filter(|files| is_due(files, now_ms));
        let ingress = due.map(|files| request(files, &self.node, None)).transpose()?;
        Ok(Requests { agent, ingress })
    }

    /// Installs certificates for the keys of the last `request`, and serves with the agent's own from
    /// now on. Blocks.
    ///
    /// # Errors
    /// When a certificate does not fit its key, or a file cannot be written: what is in use stays.
    pub fn install(&self, agent: &str, ingress: Option<&str>) -> io::Result<()> {
        let _turn = self.turn.lock();
        let _locks = self.locks()?;
        if let (Some(files), Some(certificate)) = (&self.ingress, ingress) {
            files.install(certificate)?;
            if let Some(changed) = &self.changed {
                changed.notify_one();
            }
        }
        self.agent.install(agent)?;
        let (certificate, key) = (&self.agent.certificate, &self.agent.key);
        let identity = Identity::load(certificate, key, &self.ca).map_err(io::Error::other)?;
        self.live.replace(&identity).map_err(io::Error::other)
    }
}

impl Certificates {
    /// Locks the files against a `join` on this node, which makes keys and installs certificates, too.
    fn locks(&self) -> io::Result<Vec<File>> {
        [Some(&self.agent), self.ingress.as_ref()].into_iter().flatten().map(locked).collect()
    }
}

/// Locks the files of a certificate.
///
/// # Errors
/// When another process changes them.
pub fn locked(files: &KeyFiles) -> io::Result<File> {
    let busy =
        || io::Error::new(io::ErrorKind::ResourceBusy, "another process replaces it just now");
    files.lock()?.ok_or_else(busy)
}

/// Returns true when a certificate is past half of its life. One that is not there, or cannot be read, is
/// somebody else's care.
fn is_due(files: &KeyFiles, now_ms: u64) -> bool {
    let mut pem = Vec::new();
    let read =
        File::open(&files.certificate).and_then(|file| file.take(BYTES_MAX).read_to_end(&mut pem));
    let der = read.ok().and_then(|_| CertificateDer::from_pem_slice(&pem).ok());
    let validity = der.and_then(|der| peer::validity(&der).ok());
    validity.is_some_and(|validity| validity.renew_ms() <= now_ms)
}
