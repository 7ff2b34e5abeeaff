//! Nodes whose certificates for the hop between the Caddys are refused, as the controller told. Kept in a file,
//! so that a restart of the agent forgets none.
//!
//! Certificates of the hop live for a year, and Caddy knows no list of revoked ones. So the owner's agent
//! looks at the certificate that came with a peer's route question.

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use daemon::{peer, replace::Access, sync::Mutex};
use proto::name::NodeName;

/// Most nodes that are kept.
pub const NODES_MAX: usize = 4096;
/// Largest file that is read, bytes.
const FILE_MAX: u64 = 1024 * 1024;
/// Longest certificate that is looked at, characters of base64.
const CERTIFICATE_MAX: usize = 16 * 1024;
/// Certificates have whole seconds.
const SECOND: Duration = Duration::from_secs(1);

/// Revoked nodes: each with the time from which on certificates are accepted again because the node has
/// joined anew, milliseconds since 1970; 0 while none is.
type Nodes = BTreeMap<NodeName, u64>;

/// Revoked nodes, in memory and in a file.
#[derive(Debug)]
pub struct Revoked {
    file: PathBuf,
    held: Mutex<Held>,
}

/// List in memory.
#[derive(Debug)]
struct Held {
    nodes: Nodes,
    /// Whether the file has it, too: a list that could not be written is written when it comes again.
    saved: bool,
}

impl Revoked {
    /// Reads the file; without one, no node is revoked.
    ///
    /// # Errors
    /// When the file cannot be read, or has something else in it.
    pub fn load(file: PathBuf) -> io::Result<Self> {
        let nodes = match crate::sys::read::whole(&file, FILE_MAX) {
            Ok(bytes) => from_json(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Nodes::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { file, held: Mutex::new(Held { nodes, saved: true }) })
    }

    /// Takes over the controller's list in place of the one before, durably. Blocks.
    ///
    /// # Errors
    /// When the file cannot be written; the list in memory is the new one then, too.
    pub fn replace(&self, nodes: Nodes) -> io::Result<()> {
        let mut held = self.held.lock();
        if held.saved && held.nodes == nodes {
            return Ok(());
        }
        let named = nodes.iter().map(|(node, from)| (node.as_str(), *from));
        let bytes = serde_json::to_vec(&named.collect::<BTreeMap<_, _>>())?;
        *held = Held { nodes, saved: false };
        daemon::replace::replace(&self.file, &bytes, Access::PRIVATE)?;
        held.saved = true;
        Ok(())
    }

    /// Returns true when a peer's certificate (DER, base64), which its TLS connection has proved, is revoked,
    /// or cannot be judged. Nothing is judged while no node is revoked.
    pub fn refuses(&self, certificate: &[u8]) -> bool {
        let held = self.held.lock();
        !held.nodes.is_empty() && judge(&held.nodes, certificate).unwrap_or(true)
    }
}

fn judge(nodes: &Nodes, certificate: &[u8]) -> Option<bool> {
    if certificate.len() > CERTIFICATE_MAX {
        return None;
    }
    let der = STANDARD.decode(certificate).ok()?;
    let names = peer::names(&der).ok()?;
    let issued = peer::validity(&der).ok()?.not_before_ms + daemon::clock::millis(peer::BACKDATED);
    let is_refused = |from: u64| from == 0 || issued + daemon::clock::millis(SECOND) < from;
    let names = names.iter().filter_map(|name| name.parse::<NodeName>().ok());
    Some(names.filter_map(|name| nodes.get(&name)).any(|from| is_refused(*from)))
}

fn from_json(bytes: &[u8]) -> io::Result<Nodes> {
    let named: BTreeMap<String, u64> = serde_json::from_slice(bytes)?;
    let parsed = named.into_iter().map(|(node, from)| Ok((node.parse()?, from)));
    parsed.collect::<Result<_, proto::id::Invalid>>().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().expect("a name")
    }

    /// Returns a certificate of the hop that was issued at this second.
    fn certificate(name: &str, issued_s: i64) -> Vec<u8> {
        let names = vec![name.to_owned(), "ingress.pve-sandbox.internal".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        let begin = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before =
            begin + Duration::from_secs(u64::try_from(issued_s).expect("later") - 3600);
        params.not_after = params.not_before + Duration::from_secs(365 * 24 * 3600);
        let key = KeyPair::generate().expect("a key");
        STANDARD.encode(params.self_signed(&key).expect("signed").der()).into_bytes()
    }

    #[test]
    fn only_certificates_of_a_revoked_node_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let revoked = Revoked::load(dir.path().join("revoked")).expect("none");
        let (first, second) = (certificate("n1", 1_700_000_000), certificate("n2", 1_700_000_000));
        assert!(!revoked.refuses(&first) && !revoked.refuses(b"nothing"));
        revoked.replace([(node("n1"), 0)].into()).expect("written");
        assert!(revoked.refuses(&first) && !revoked.refuses(&second));
        // What cannot be judged is refused while any node is revoked.
        for bad in [b"".to_vec(), b"nothing".to_vec(), vec![b'A'; CERTIFICATE_MAX + 4]] {
            assert!(revoked.refuses(&bad));
        }
        let again = Revoked::load(dir.path().join("revoked")).expect("kept");
        assert!(again.refuses(&first) && !again.refuses(&second));
        again.replace(Nodes::new()).expect("written");
        assert!(!again.refuses(&first));
    }

    #[test]
    fn list_that_could_not_be_written_is_written_when_it_comes_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("missing/revoked");
        let revoked = Revoked::load(path.clone()).expect("none");
        let first = certificate("n1", 1_700_000_000);
        for _ in 0..2 {
            revoked.replace([(node("n1"), 0)].into()).expect_err("there is no directory");
            assert!(revoked.refuses(&first), "it counts at once all the same");
        }
        std::fs::create_dir(dir.path().join("missing")).expect("made");
        revoked.replace([(node("n1"), 0)].into()).expect("written");
        assert!(Revoked::load(path).expect("kept").refuses(&first));
    }

    #[test]
    fn node_that_joined_again_is_accepted_with_its_new_certificate_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let revoked = Revoked::load(dir.path().join("revoked")).expect("none");
        let joined_s = 1_700_000_000;
        let joined_ms = u64::try_from(joined_s).expect("later") * 1000 + 400;
        revoked.replace([(node("n1"), joined_ms)].into()).expect("written");
        for (issued_s, is_refused) in
            [(joined_s - 10, true), (joined_s - 1, true), (joined_s, false), (joined_s + 10, false)]
        {
            assert_eq!(revoked.refuses(&certificate("n1", issued_s)), is_refused, "{issued_s}");
        }
    }

    #[test]
    fn file_with_something_else_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("revoked");
        for text in ["", "[]", "{\"bad name\":1}"] {
            std::fs::write(&path, text).expect("written");
            Revoked::load(path.clone()).expect_err(text);
        }
    }
}
