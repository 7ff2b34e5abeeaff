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

use self::issue::{Authority, Role, Usage};
use crate::clock::{Clock, SystemClock};

pub use client::{ClientSigner, SignedClient};
pub use own::{Own, names, renew_own};
pub use rotation::{Rotation, keeps_client_ca, old_name};
pub use sign::{Lives, Signed, Signer};
/// Life of CA certificates and of all certificates of the ingress hop, which Caddy reads only at its start.
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
    /// Half of a CA is not there, or its halves do not belong together. A new one in its place would be trusted by
    /// nobody who has the old one, so only an operator makes it.
    #[error("{} {why}: restore it from a backup; without one: {remedy}", path.display())]
    Broken {
        /// Path of the file.
        path: PathBuf,
        /// Flaw of the file.
        why: String,
        /// Commands that make a new CA.
        remedy: String,
    },
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

    /// Returns certificate and key of a CA, which are written as one.
    fn pair_of(&self, ca: &str) -> KeyFiles {
        let [certificate, key] = ["crt", "key"].map(|end| self.path(&format!("{ca}.{end}")));
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

/// CAs with their common names, in the order in which they are made.
const ALL: [(&str, &str); 3] = [
    ("ca", "pve-sandbox CA"),
    ("ingress-ca", "pve-sandbox ingress CA"),
    (CLIENT_CA, "pve-sandbox client CA"),
];

fn make_missing(files: &Files) -> Result<()> {
    for (name, common) in missing(files)? {
        let authority = Authority::new(common, LONG)?;
        put(&files.pair_of(name), &authority.key(), &authority.certificate)?;
    }
    Ok(())
}

/// Writes a key and its certificate, as one.
fn put(pair: &KeyFiles, key: &str, certificate: &str) -> Result<()> {
    let put = pair.prepare(key).and_then(|()| pair.install(certificate));
    put.map_err(|source| Error::File { path: pair.certificate.clone(), source })
}

/// Finishes or undoes a rotation that a crash has interrupted, unless it is under way; and finishes CAs that were
/// written to their certificates.
///
/// # Errors
/// When a file cannot be renamed or removed.
pub fn recover(data_dir: &Path) -> Result<()> {
    rotation::recover(data_dir)?;
    let files = Files::new(data_dir);
    for (name, _) in ALL {
        let pair = files.pair_of(name);
        pair.recover().map_err(|source| Error::File { path: pair.key.clone(), source })?;
    }
    Ok(())
}

/// Returns the CAs that are to be made, with their common names.
///
/// # Errors
/// When one of the others is broken.
fn missing(files: &Files) -> Result<Vec<(&'static str, &'static str)>> {
    let mut missing = Vec::new();
    for (name, common) in ALL {
        if find(files, name)?.is_none() {
            missing.push((name, common));
        }
    }
    Ok(missing)
}

/// Checks the CAs, and returns the names of the files that `init` would make.
///
/// # Errors
/// When a CA is broken.
pub fn lacks(data_dir: &Path) -> Result<Vec<String>> {
    let files = Files::new(data_dir);
    let cas = missing(&files)?.into_iter();
    let cas = cas.flat_map(|(name, _)| [format!("{name}.crt"), format!("{name}.key")]);
    let own = [("controller.crt", files.certificate()), ("controller.key", files.key())];
    let own = own.into_iter().filter(|(_, path)| !path.exists());
    Ok(cas.chain(own.map(|(name, _)| name.to_owned())).collect())
}

/// Checks that a name can be in a certificate.
///
/// # Errors
/// When it is neither a host name nor an address.
pub fn check_name(name: &str) -> Result<()> {
    issue::san(name).map(drop)
}

/// Makes the CAs unless they exist, and renews the controller's certificate. Its names are
/// `localhost`, `names` (host names and addresses that callers use) and the names of the previous
/// certificate. Returns all of them.
///
/// # Errors
/// When a name is malformed, a file cannot be written, a CA is broken, or the old certificate cannot be parsed.
pub fn init(data_dir: &Path, names: &[String]) -> Result<(Files, Vec<String>)> {
    names.iter().try_for_each(|name| check_name(name))?;
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
    issue_own(files, &all, Lives::default().agent, &SystemClock)?;
    Ok(all)
}

/// Issues the controller's certificate. The pair is replaced as one.
fn issue_own(files: &Files, names: &[String], life: Duration, clock: &dyn Clock) -> Result<()> {
    // The key that waits may be that of the certificate which is installed.
    let pair = files.pair();
    pair.recover().map_err(|source| Error::File { path: pair.key.clone(), source })?;
    let uri = Some(daemon::peer::CONTROLLER_URI.to_owned());
    let usage = Usage { common: "pve-sandbox controller", names, uri, life, role: Role::Daemon };
    let leaf = load(files, "ca")?.leaf_by(clock, &usage)?;
    put(&pair, &leaf.key, &leaf.certificate)
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

/// Reads a CA.
///
/// # Errors
/// When there is none, it is broken, or a file cannot be read.
fn load(files: &Files, name: &str) -> Result<Authority> {
    let data_dir = files.0.parent().unwrap_or(&files.0);
    find(files, name)?.ok_or_else(|| Error::Missing(data_dir.to_owned()))
}

/// Reads a CA; `None` where it was never made. Without the controller's certificate, which `init` makes last, an
/// `init` has not ended. The CA of callers came with a later version.
///
/// # Errors
/// When it is broken, or a file cannot be read.
fn find(files: &Files, name: &str) -> Result<Option<Authority>> {
    let pair = files.pair_of(name);
    let (crt, key) = (&pair.certificate, &pair.key);
    let broken = |path: &Path, why: &str| {
        let (path, why) = (path.to_owned(), why.to_owned());
        Error::Broken { path, why, remedy: remedy(files, name) }
    };
    let read = |path: &Path| {
        daemon::text::read_if_there(path).map_err(|source| {
            let is_text = source.kind() != io::ErrorKind::InvalidData;
            let path = path.to_owned();
            if is_text { Error::File { path, source } } else { broken(&path, "holds no text") }
        })
    };
    let was_made = files.certificate().exists();
    let fits =
        |certificate: &str, key: &str| daemon::tls::fits(certificate.as_bytes(), key.as_bytes());
    let (certificate, mut text) = (read(crt)?, read(key)?);
    if let (Some(certificate), None) = (&certificate, &text) {
        // After a crash the key waits under its other name until `recover`.
        let unread = |source| Error::File { path: key.clone(), source };
        text = pair.waiting().map_err(unread)?.filter(|key| fits(certificate, key));
    }
    match (certificate, text) {
        (None, None) if !was_made || name == CLIENT_CA => Ok(None),
        // Earlier versions wrote the key last.
        (Some(_), None) if !was_made => Ok(None),
        (None, _) => Err(broken(crt, "is not there")),
        (Some(_), None) => Err(broken(key, "is not there")),
        (Some(certificate), Some(text)) => {
            if !fits(&certificate, &text) {
                return Err(broken(key, &format!("is not the key of {}", crt.display())));
            }
            Authority::load(certificate, &text).map(Some)
        }
    }
}

/// Returns the commands that make a new CA in the place of a broken one, after words on what that costs.
fn remedy(files: &Files, name: &str) -> String {
    if name != CLIENT_CA {
        return "`pve-sandbox-controller ca rotate` makes new CAs, and all nodes join again"
            .to_owned();
    }
    let [crt, key] = CLIENT_CA_FILES.map(|name| files.path(name).display().to_string());
    let data_dir = files.0.parent().unwrap_or(&files.0).display();
    format!(
        "`rm -f {crt} {key}; pve-sandbox-controller init --data-dir {data_dir}` makes a new CA, and callers need \
         new client certificates"
    )
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
    fn init_makes_no_ca_in_the_place_of_half_of_one() {
        let whole = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(whole.path(), &[]).expect("init");
        for (ca, _) in ALL {
            for (lost, replaced) in [("crt", false), ("key", false), ("key", true), ("crt", true)] {
                let path = files.path(&format!("{ca}.{lost}"));
                let kept = fs::read(&path).expect("there");
                match replaced {
                    true => {
                        fs::write(&path, fs::read(files.key()).expect("a key")).expect("written")
                    }
                    false => fs::remove_file(&path).expect("removed"),
                }
                let content = || {
                    let all = fs::read_dir(&files.0).expect("listed").map(|entry| {
                        let path = entry.expect("read").path();
                        (path.clone(), fs::read(path).expect("read"))
                    });
                    all.collect::<std::collections::BTreeMap<_, _>>()
                };
                let before = content();
                let error = init(whole.path(), &[]).expect_err("broken");
                let told = format!("{error}");
                assert!(matches!(error, Error::Broken { .. }), "{told}");
                assert!(told.contains(&format!("{ca}.")), "{told}");
                assert_eq!(told.contains("ca rotate"), ca != CLIENT_CA, "{told}");
                lacks(whole.path()).expect_err("broken");
                assert_eq!(content(), before, "{ca} {lost}: nothing is written");
                fs::write(&path, kept).expect("restored");
                init(whole.path(), &[]).expect("whole again");
            }
        }
    }

    #[test]
    fn interrupted_init_can_be_repeated() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        // In the order in which they are written.
        let all = ALL.map(|(ca, _)| ["crt", "key"].map(|end| format!("{ca}.{end}")));
        for kept in 0..=all.as_flattened().len() {
            for path in [files.certificate(), files.key()] {
                fs::remove_file(path).expect("removed");
            }
            for name in &all.as_flattened()[kept..] {
                fs::remove_file(files.path(name)).expect("removed");
            }
            assert!(lacks(dir.path()).expect("whole").contains(&"controller.crt".to_owned()));
            init(dir.path(), &[]).expect("again");
            assert_eq!(lacks(dir.path()).expect("whole"), [""; 0]);
        }
    }

    #[test]
    fn interrupted_making_of_the_ca_for_callers_is_finished_or_repeated() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (files, _) = init(dir.path(), &[]).expect("init");
        let (pair, next) = (files.pair_of(CLIENT_CA), files.path("client-ca.key.next"));
        let mend: [fn(&Path) -> Result<()>; 2] = [
            // As a start does, and as `init` does.
            |data| recover(data).and_then(|()| complete(data)),
            |data| init(data, &[]).map(drop),
        ];
        for mend in mend {
            // Killed behind the certificate: nothing is lost, and nothing is refused meanwhile.
            let key = fs::read(&pair.key).expect("there");
            fs::rename(&pair.key, &next).expect("it waits");
            assert_eq!(lacks(dir.path()).expect("whole"), [""; 0]);
            ClientSigner::load(dir.path()).expect("usable");
            mend(dir.path()).expect("finished");
            assert_eq!(fs::read(&pair.key).expect("there"), key);
            assert!(!next.exists());
            // Killed before the certificate: the key was never used.
            fs::rename(&pair.key, &next).expect("it waits");
            fs::remove_file(&pair.certificate).expect("removed");
            assert_eq!(lacks(dir.path()).expect("never made"), CLIENT_CA_FILES);
            mend(dir.path()).expect("made");
            ClientSigner::load(dir.path()).expect("usable");
            assert!(!next.exists());
        }
        // Another key that waits is none of this certificate.
        fs::rename(&pair.key, dir.path().join("away")).expect("lost");
        fs::copy(files.key(), &next).expect("copied");
        lacks(dir.path()).expect_err("broken");
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
