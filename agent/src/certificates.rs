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
    peer::{self, Validity},
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
    /// When a certificate is not valid yet, or not any more, or does not fit its key, or a file cannot be written: what is in use stays.
    pub fn install(&self, agent: &str, ingress: Option<&str>, now_ms: u64) -> io::Result<()> {
        if let Ok(used) = peer::validity(&self.live.certificate()) {
            let mut all = [Some(agent), ingress].into_iter().flatten();
            all.try_for_each(|new| check_times(&used, new, now_ms))?;
        }
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
    validity.is_some_and(|validity| validity.is_due(now_ms))
}

/// Refuses a certificate that is not valid by this node's clock while the one in use is: it was issued while the
/// controller's clock was wrong. Once that is right, nobody accepts it, and the controller cannot reach this node to renew it.
fn check_times(used: &Validity, new: &str, now_ms: u64) -> io::Result<()> {
    let der = CertificateDer::from_pem_slice(new.as_bytes()).map_err(io::Error::other)?;
    let new = peer::validity(&der).map_err(io::Error::other)?;
    let minutes = |ms: u64| ms.div_ceil(60_000);
    let why = if new.not_after_ms <= now_ms && now_ms < used.not_after_ms {
        let ago = minutes(now_ms - new.not_after_ms);
        format!(
            "ended {ago} min ago, so the earlier one stays: the controller's clock is behind, or this node's is ahead"
        )
    // Where the one in use nears its end, it is rather this node's clock that is wrong.
    } else if !new.has_begun(now_ms) && now_ms < used.overdue_ms() {
        let later = minutes(new.not_before_ms - now_ms);
        format!(
            "is not valid before {later} min from now, so the earlier one stays: the controller's clock is ahead, or \
             this node's is behind"
        )
    } else {
        return Ok(());
    };
    let remedy = "`timedatectl` on both machines says which one is not synchronised";
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("the new certificate {why}; {remedy}")))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, time::Duration};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer};

    use super::*;

    const HOUR_MS: u64 = 3_600_000;
    /// Present time.
    const NOW_MS: u64 = 500_000 * HOUR_MS;

    /// A CA, as the controller has one.
    struct Ca(Issuer<'static, KeyPair>);

    impl Ca {
        fn new(path: &Path) -> Self {
            let key = KeyPair::generate().expect("a key");
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let certificate = params.self_signed(&key).expect("signed");
            fs::write(path, certificate.pem()).expect("written");
            Self(Issuer::new(params, key))
        }

        /// Signs a certificate of a day for the key that waits.
        fn sign(&self, files: &KeyFiles, begin_ms: u64) -> String {
            let key = files.waiting().expect("read").expect("a key that waits");
            let key = KeyPair::from_pem(&key).expect("a key");
            let mut params = CertificateParams::new(vec!["n1".to_owned()]).expect("a name");
            let begin = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(begin_ms);
            params.not_before = begin;
            params.not_after = begin + Duration::from_hours(24);
            params.signed_by(&key, &self.0).expect("signed").pem()
        }
    }

    #[test]
    fn certificate_that_is_not_valid_by_our_clock_is_refused_and_the_one_in_use_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| dir.path().join(name);
        let pair = |name: &str| KeyFiles {
            certificate: file(&format!("{name}.crt")),
            key: file(&format!("{name}.key")),
            access: Access::PRIVATE,
        };
        let (own, hop, ca) = (pair("node"), pair("ingress"), file("ca.crt"));
        let signer = Ca::new(&ca);
        for files in [&own, &hop] {
            request(files, "n1", None).expect("a request");
            files.install(&signer.sign(files, NOW_MS - 15 * HOUR_MS)).expect("installed");
        }
        let identity = Identity::load(&own.certificate, &own.key, &ca).expect("an identity");
        let live = LiveIdentity::new(&identity).expect("certificate and key fit");
        let files = (own.clone(), Some(hop.clone()));
        let certificates = Certificates::new("n1".to_owned(), files, ca, live.clone());
        let read = |files: &KeyFiles| fs::read(&files.certificate).expect("there");
        let in_use = || (live.certificate(), read(&own), read(&hop));
        let before = in_use();

        certificates.request(NOW_MS).expect("requests");
        let sign =
            |begins: [u64; 2]| (signer.sign(&own, begins[0]), Some(signer.sign(&hop, begins[1])));
        let (now, tomorrow) = (NOW_MS - HOUR_MS, NOW_MS + 24 * HOUR_MS);
        for begins in [[tomorrow, now], [now, tomorrow]] {
            let (agent, ingress) = sign(begins);
            let refused = certificates.install(&agent, ingress.as_deref(), NOW_MS);
            let why = refused.expect_err("not valid yet").to_string();
            assert!(why.contains("1440 min") && why.contains("timedatectl"), "{why}");
            assert_eq!(in_use(), before, "{begins:?}");
        }
        let ended = NOW_MS - 72 * HOUR_MS;
        for begins in [[ended, now], [now, ended]] {
            let (agent, ingress) = sign(begins);
            let refused = certificates.install(&agent, ingress.as_deref(), NOW_MS);
            let why = refused.expect_err("ended").to_string();
            assert!(why.contains("ended") && why.contains("timedatectl"), "{why}");
            assert_eq!(in_use(), before, "{begins:?}");
        }
        // The keys still wait. With a clock that is behind for good, the node would be lost at the end of the one in use.
        let (agent, ingress) = sign([tomorrow, tomorrow]);
        let later_ms = NOW_MS + 4 * HOUR_MS;
        certificates.install(&agent, ingress.as_deref(), later_ms).expect("installed");
        assert_ne!(live.certificate(), before.0);
    }
}
