//! The controller's own CA, a second one for the hop between the nodes' Caddys, and a third one for
//! callers. They are separate on purpose: Caddy's key, which a network-facing program reads, and the
//! keys of callers must never open the agents' API. All are files under the data directory; keys have mode
//! 0600. `sign` is for nodes that make their keys themselves, `client` for callers that do, `own` keeps the
//! controller's certificate young.

mod client;
mod issue;
mod own;
mod rotation;
mod sign;

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use daemon::{
    key_files::KeyFiles,
    replace::{Access, replace},
};
use proto::name::NodeName;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use issue::{Authority, Role, Usage};

pub use client::{ClientSigner, SignedClient};
pub use own::{Own, names, renew_own};
pub use rotation::{Rotation, old_name, recover};
pub use sign::{Lives, Signed, Signer};
/// Life of CA certificates and of of all of the ingress hop, which Caddy reads at its start only.
const LONG: Duration = Duration::from_hours(24 * 365 * 10);
/// Life of the certificates of agents that get theirs by hand.
const SHORT: Duration = Duration::from_hours(24 * 365);

/// Name of the CA for callers.
const CLIENT_CA: &str = "client-ca";
/// Files of that CA.
pub const CLIENT_CA_FILES: [&str; 2] = ["client-ca.crt", "client-ca.key"];

/// Result of making or reading certificates.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a CA operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// `init` was not run.
    #[error("there is no CA: run `pve-sandbox-controller init --data-dir {}` first", .0.display())]
    Missing(PathBuf),
    /// A name that cannot be in a certificate.
    #[error("{0:?} is neither a host name nor an address")]
    Name(String),
    /// A certificate cannot be made or parsed.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// A CA's certificate that cannot be read.
    #[error("cannot read the certificate of the CA: {0}")]
    Authority(String),
    /// The time of the CA is over.
    #[error("the CA has ended: make a new one with `pve-sandbox-controller ca rotate`")]
    Ended,
    /// A certificate request that is refused.
    #[error("cannot sign the certificate request: {0}")]
    Request(String),
}

/// The files of the CA under a data directory.
#[derive(Debug, Clone)]
pub struct Files(PathBuf);

impl Files {
    /// Returns the files under this data directory.
    pub fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("ca"))
    }

    /// Returns the path of the CA certificate that agents, controller and clients trust.
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca.crt")
    }

    /// Returns the path of the CA certificate of callers' certificates.
    pub fn client_ca(&self) -> PathBuf {
        self.path(&format!("{CLIENT_CA}.crt"))
    }

    /// Returns the path of the controller's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.0.join("controller.crt")
    }

    /// Returns the path of the controller's key.
    pub fn key(&self) -> PathBuf {
        self.0.join("controller.key")
    }

    /// Returns the controller's certificate and key, which are replaced as one.
    pub fn pair(&self) -> KeyFiles {
        let (certificate, key) = (self.certificate(), self.key());
        KeyFiles { certificate, key, access: Access::PRIVATE }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// Makes the CA for callers where there are the others: an earlier version had none. Another one that is
/// missing, or half of this one, is left as it is: who has it would not trust a new one.
///
/// # Errors
/// When a file cannot be written.
pub fn complete(data_dir: &Path) -> Result<()> {
    let files = Files::new(data_dir);
    let has = |name: &str| files.path(name).exists();
    let part = |end: &str| has(&format!("{CLIENT_CA}.{end}"));
    if has("ca.key") && has("ingress-ca.key") && !part("crt") && !part("key") {
        make_missing(&files)?;
    }
    Ok(())
}

fn make_missing(files: &Files) -> Result<()> {
    let all = [
        ("ca", "pve-sandbox CA"),
        ("ingress-ca", "pve-sandbox ingress CA"),
        (CLIENT_CA, "pve-sandbox client CA"),
    ];
    for (name, common) in all {
        if !files.path(&format!("{name}.key")).exists() {
            let authority = Authority::new(common, LONG)?;
            // The key is written last: its presence means that the CA is complete.
            write(&files.path(&format!("{name}.crt")), &authority.certificate, 0o644)?;
            write(&files.path(&format!("{name}.key")), &authority.key(), 0o600)?;
        }
    }
    Ok(())
}

/// Makes the CAs unless they exist, and renews the controller's certificate. Its names are
/// `localhost`, `names` (host names and addresses that callers use) and the names of the previous
/// certificate. Returns all of them.
///
/// # Errors When a name is malformed, a file cannot be written, or the old certificate cannot be
/// parsed.
pub fn init(data_dir: &Path, names: &[String]) -> Result<(Files, Vec<String>)> {
    recover(data_dir)?;
    let files = Files::new(data_dir);
    let names = make(&files, names)?;
    Ok((files, names))
}

/// Makes what is missing in the directory of these files, and a certificate for the controller.
fn make(files: &Files, names: &[String]) -> Result<Vec<String>> {
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { path, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&files.0).map_err(file(&files.0))?;
    make_missing(files)?;
    let mut all = vec![daemon::peer::CONTROLLER_NAME.to_owned(), "localhost".to_owned()];
    all.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    for name in names_before(&files.certificate())?.iter().chain(names) {
        let known = |known: &String| known.eq_ignore_ascii_case(name);
        if !all.iter().any(known) {
            all.push(name.clone());
        }
    }
    issue_own(files, &all, Lives::default().agent)?;
    Ok(all)
}

/// Issues the controller's certificate. The pair is replaced as one.
fn issue_own(files: &Files, names: &[String], life: Duration) -> Result<()> {
    let uri = Some(daemon::peer::CONTROLLER_URI.to_owned());
    let usage = Usage { common: "pve-sandbox controller", names, uri, life, role: Role::Daemon };
    let leaf = load(files, "ca")?.leaf(&usage)?;
    let pair = files.pair();
    let put = || {
        pair.prepare(&leaf.key)?;
        pair.install(&leaf.certificate)
    };
    put().map_err(|source| Error::File { path: files.certificate(), source })
}

/// Returns the names in the certificate of an earlier `init`, or none without such a certificate.
fn names_before(certificate: &Path) -> Result<Vec<String>> {
    let file = |source| Error::File { path: certificate.to_owned(), source };
    let Some(pem) = read_certificate(certificate)? else { return Ok(Vec::new()) };
    let invalid = |why: String| {
        let why = format!("its names cannot be read ({why}); remove it to begin without them");
        file(io::Error::new(io::ErrorKind::InvalidData, why))
    };
    let der = CertificateDer::from_pem_slice(&pem).map_err(|error| invalid(error.to_string()))?;
    daemon::peer::names(&der).map_err(invalid)
}

fn read_certificate(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(pem) => Ok(Some(pem)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { path: path.to_owned(), source }),
    }
}

/// Writes the files that one node's agent needs into `out`: `ca.crt`, `node.crt`, `node.key` and
/// the same three for the ingress hop.
///
/// # Errors
/// When `init` was not run, or a file cannot be written.
pub fn node(data_dir: &Path, node: &NodeName, address: Option<IpAddr>, out: &Path) -> Result<()> {
    let files = Files::new(data_dir);
    fs::create_dir_all(out).map_err(|source| Error::File { path: out.to_owned(), source })?;

    let agent = load(&files, "ca")?;
    let names = sign::agent_names(node, address);
    let uri = Some(format!("{}{node}", daemon::peer::AGENT_URI));
    let (common, role) = (node.as_str(), Role::Daemon);
    let leaf = agent.leaf(&Usage { common, names: &names, uri, life: SHORT, role })?;
    write(&out.join("ca.crt"), &agent.certificate, 0o644)?;
    write(&out.join("node.crt"), &leaf.certificate, 0o644)?;
    write(&out.join("node.key"), &leaf.key, 0o600)?;

    let ingress = load(&files, "ingress-ca")?;
    let names = sign::ingress_names(node);
    let usage = Usage { common, names: &names, uri: None, life: LONG, role };
    let leaf = ingress.leaf(&usage)?;
    write(&out.join("ingress-ca.crt"), &ingress.certificate, 0o644)?;
    write(&out.join("ingress-node.crt"), &leaf.certificate, 0o644)?;
    write(&out.join("ingress-node.key"), &leaf.key, 0o600)
}

fn load(files: &Files, name: &str) -> Result<Authority> {
    let read = |path: PathBuf| match fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let data_dir = files.0.parent().unwrap_or(&files.0);
            Err(Error::Missing(data_dir.to_owned()))
        }
        Err(source) => Err(Error::File { path, source }),
    };
    let certificate = read(files.path(&format!("{name}.crt")))?;
    Authority::load(certificate, &read(files.path(&format!("{name}.key")))?)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    replace(path, text.as_bytes(), Access { mode, group: None })
        .map_err(|source| Error::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use daemon::{
        peer::Peer,
        tls::{ClientAuth, Identity},
    };

    use super::*;

    #[test]
    fn node_certificates_are_what_the_daemons_expect() {
        let dir = tempfile::tempdir().expect("tempdir");
        let data = dir.path().join("data");
        let out = dir.path().join("out");
        let n1: NodeName = "n1".parse().expect("name");
        let address = Some("10.99.0.1".parse().expect("address"));
        let missing = node(&data, &n1, address, &out).expect_err("no CA yet");
        assert!(missing.to_string().contains("init"), "{missing}");

        let (files, _) = init(&data, &["api.example.com".into()]).expect("init");
        let before = fs::read_to_string(files.ca()).expect("ca");
        init(&data, &[]).expect("again");
        assert_eq!(fs::read_to_string(files.ca()).expect("ca"), before, "the CA stays");
        node(&data, &n1, address, &out).expect("node");

        for name in ["node.key", "ingress-node.key"] {
            let mode = fs::metadata(out.join(name)).expect("key").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let agent =
            Identity::load(&out.join("node.crt"), &out.join("node.key"), &out.join("ca.crt"));
        daemon::tls::server(&agent.expect("identity"), ClientAuth::Required).expect("server");
        let ours = Identity::load(&files.certificate(), &files.key(), &files.ca());
        daemon::tls::client(&ours.expect("identity")).expect("client");

        let peer = |path: &Path| {
            let pem = fs::read(path).expect("certificate");
            let der = rustls::pki_types::pem::PemObject::from_pem_slice(&pem).expect("pem");
            let der: rustls::pki_types::CertificateDer<'static> = der;
            Peer::of_certificate(&der)
        };
        assert_eq!(peer(&out.join("node.crt")), Peer::Agent(n1));
        assert_eq!(peer(&files.certificate()), Peer::Controller);
        assert_eq!(peer(&out.join("ingress-node.crt")), Peer::Anonymous);
        let ca = fs::read(out.join("ca.crt")).expect("ca");
        assert_ne!(ca, fs::read(out.join("ingress-ca.crt")).expect("ingress ca"));
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Returns the names in the controller's certificate, as a verifying peer reads them.
    fn names_of(files: &Files) -> Vec<String> {
        names_before(&files.certificate()).expect("a certificate")
    }

    #[test]
    fn init_again_renews_the_certificate_and_keeps_its_names() {
        let dir = tempfile::tempdir().expect("tempdir");
        let own = ["controller.pve-sandbox.internal", "localhost", "127.0.0.1", "::1"];
        let given = ["api.example.com".to_owned(), "10.0.0.9".to_owned(), "2001:db8::9".to_owned()];
        let (files, told) = init(dir.path(), &given).expect("init");
        let first = [&own[..], &["api.example.com", "10.0.0.9", "2001:db8::9"]].concat();
        assert_eq!((names_of(&files), told), (owned(&first), owned(&first)));
        let before = fs::read(files.certificate()).expect("certificate");

        // A renewal, without any name.
        init(dir.path(), &[]).expect("again");
        assert_ne!(fs::read(files.certificate()).expect("certificate"), before, "it is renewed");
        assert_eq!(names_of(&files), owned(&first));

        // With a new name, and with a known one in another spelling.
        let more = ["new.example.com".to_owned(), "API.example.com".to_owned()];
        let (_, told) = init(dir.path(), &more).expect("once more");
        let all = [&first[..], &["new.example.com"]].concat();
        assert_eq!((names_of(&files), told), (owned(&all), owned(&all)));
        let ours = Identity::load(&files.certificate(), &files.key(), &files.ca());
        daemon::tls::client(&ours.expect("identity")).expect("certificate and key fit");

        // An invalid name changes nothing.
        let before = fs::read(files.certificate()).expect("certificate");
        init(dir.path(), &["a b".to_owned()]).expect_err("no name");
        assert_eq!(fs::read(files.certificate()).expect("certificate"), before);
    }

    #[test]
    fn init_does_not_drop_names_that_it_cannot_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &["api.example.com".to_owned()]).expect("init");
        for broken in
            ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            fs::write(files.certificate(), broken).expect("written");
            let error = init(dir.path(), &[]).expect_err("not read");
            assert!(
                format!("{:#}", anyhow::Error::from(error)).contains("remove it"),
                "{broken:?}"
            );
            assert_eq!(fs::read_to_string(files.certificate()).expect("there"), broken);
        }
        fs::remove_file(files.certificate()).expect("removed");
        init(dir.path(), &[]).expect("anew");
        assert_eq!(names_of(&files).len(), 4);
    }

    #[test]
    fn only_a_ca_for_callers_that_never_was_is_made_at_a_start() {
        let dir = tempfile::tempdir().expect("tempdir");
        complete(dir.path()).expect("nothing to do");
        assert!(!dir.path().join("ca").exists(), "`init` makes the first one");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let parts = ["ca", "ingress-ca", CLIENT_CA].map(|ca| ["crt", "key"].map(|end| (ca, end)));
        let parts = parts.as_flattened();
        let path = |(name, end): (&str, &str)| files.path(&format!("{name}.{end}"));
        let content = || parts.iter().map(|part| fs::read(path(*part)).ok()).collect::<Vec<_>>();
        complete(dir.path()).expect("complete");
        let all = content();
        complete(dir.path()).expect("complete");
        assert_eq!(content(), all, "what is there stays");

        // Whoever trusts a lost one would not trust a new one.
        for part in parts {
            fs::rename(path(*part), dir.path().join("away")).expect("lost");
            let before = content();
            complete(dir.path()).expect("left as it is");
            assert_eq!(content(), before, "{part:?}");
            fs::rename(dir.path().join("away"), path(*part)).expect("found");
        }

        // An earlier version had none for callers.
        let callers = [(CLIENT_CA, "crt"), (CLIENT_CA, "key")];
        callers.iter().for_each(|part| fs::remove_file(path(*part)).expect("removed"));
        complete(dir.path()).expect("made");
        assert!(callers.iter().all(|part| path(*part).exists()));
        assert_eq!(content()[..4], all[..4], "and no other");
        let mode = fs::metadata(path(callers[1])).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn refuses_a_malformed_node_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        for name in ["a b", "", "ü.example.com", "a\nb"] {
            let error = init(dir.path(), &[name.to_owned()]).expect_err(name);
            assert!(matches!(error, Error::Name(_)), "{error}");
        }
    }
}
