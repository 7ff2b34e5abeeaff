//! Settings that a node gets when it joins. What the operator has written stays, comments included.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use daemon::text;
use proto::sandbox::v1::JoinResponse;
use toml_edit::{DocumentMut, Item, Value, value};

use crate::config::{File, PEER_PORT, edit};

/// Comment behind `ingress.peer` by which another join knows that it may set it anew. Without it the operator has set it.
const NOTE: &str = "# set by join";

/// Addresses of this node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    /// Address where the other nodes reach this one.
    pub(super) ip: IpAddr,
    /// Listen address of the agent, where the default does not do.
    pub(super) listen: Option<SocketAddr>,
}

/// Completes the configuration; returns what was done, for people. `pool_given`: the operator has named the pool just
/// now, so it replaces the one in the file.
///
/// # Errors
/// When the file cannot be read or written.
pub(super) fn complete(
    path: &Path,
    config: &File,
    answer: &JoinResponse,
    Own { ip, listen }: Own,
    pool_given: bool,
) -> io::Result<Vec<String>> {
    let mut wanted: Vec<(&str, &str, Item)> = Vec::new();
    wanted.extend(listen.map(|listen| (edit::TOP, "listen", value(listen.to_string()))));
    if config.network.pool.is_none() || pool_given {
        wanted.push(("network", "pool", value(answer.pool.as_str())));
    }
    if config.ingress.domain.is_none() && !answer.domain.is_empty() {
        wanted.push(("ingress", "domain", value(answer.domain.as_str())));
        if !answer.https {
            wanted.push(("ingress", "https", value(false)));
        }
    }
    let has_domain = config.ingress.domain.is_some() || !answer.domain.is_empty();
    if has_domain && !ip.is_loopback() {
        let port = match config.ingress.peer {
            None => Some(PEER_PORT),
            // The node has another address than at an earlier join.
            Some(before) => (before.ip() != ip && is_noted(path)?).then_some(before.port()),
        };
        wanted.extend(port.map(|port| ("ingress", "peer", noted(SocketAddr::new(ip, port)))));
    }
    edit::set(path, wanted)
}

/// Returns an address with the note.
fn noted(peer: SocketAddr) -> Item {
    Item::Value(Value::from(peer.to_string()).decorated(" ", format!(" {NOTE}")))
}

/// Returns true when `ingress.peer` of a file has the note.
fn is_noted(path: &Path) -> io::Result<bool> {
    let text = text::read_if_there(path)?.unwrap_or_default();
    let document: DocumentMut = text.parse().map_err(io::Error::other)?;
    let peer = document.get("ingress").and_then(|ingress| ingress.get("peer")?.as_value());
    let behind = peer.and_then(|peer| peer.decor().suffix()?.as_str());
    Ok(behind.is_some_and(|text| text.trim() == NOTE))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Addresses of a node whose agent listens where it does by default.
    fn own(ip: &str) -> Own {
        Own { ip: ip.parse().expect("address"), listen: None }
    }

    #[test]
    fn missing_settings_are_added_and_the_operators_own_stay() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.toml");
        let mine = "# mine\n#listen = \"x\"\n\n[network]\n# a comment\nbridge = \"vmbr1\" # why\n";
        fs::write(&path, mine).expect("written");
        let answer = JoinResponse {
            pool: "10.100.3.0/24".into(),
            domain: "sandbox.test".into(),
            https: true,
            ..JoinResponse::default()
        };
        let complete = |given| {
            let config: File = daemon::config::load(&path).expect("valid");
            super::complete(&path, &config, &answer, own("10.0.0.3"), given).expect("completed")
        };
        assert_eq!(complete(false).len(), 3);
        let after = fs::read_to_string(&path).expect("read");
        for kept in mine.lines() {
            assert!(after.contains(kept), "{kept} in {after}");
        }
        let config: File = daemon::config::load(&path).expect("valid");
        assert_eq!(config.network.pool.expect("a pool").to_string(), "10.100.3.0-10.100.3.255");
        assert_eq!(config.ingress.peer.expect("a peer").to_string(), "10.0.0.3:8481");
        // A second time nothing is missing.
        assert!(complete(false).is_empty());
        assert_eq!(fs::read_to_string(&path).expect("read"), after);
        assert_eq!(complete(true).len(), 1, "a pool that is named now replaces the other");
    }

    /// Completes a file with this text, of a node that the others reach at this address; returns the text after it.
    fn completed(text: &str, ip: &str) -> String {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.toml");
        fs::write(&path, text).expect("written");
        let config: File = daemon::config::load(&path).expect("valid");
        let pool = "10.100.3.0/24".into();
        let answer =
            JoinResponse { pool, domain: "sandbox.test".into(), https: true, ..Default::default() };
        complete(&path, &config, &answer, own(ip), false).expect("completed");
        fs::read_to_string(&path).expect("read")
    }

    #[test]
    fn peer_is_set_also_where_the_operator_has_named_the_domain() {
        let after = completed("[ingress]\ndomain = \"mine.test\"\n", "10.0.0.3");
        assert!(after.contains("domain = \"mine.test\"\n"), "{after}");
        assert!(after.contains("peer = \"10.0.0.3:8481\" # set by join\n"), "{after}");
        let after = completed("[ingress]\ndomain = \"mine.test\"\n", "127.0.0.1");
        assert!(!after.contains("peer"), "no other node reaches that: {after}");
    }

    #[test]
    fn peer_of_an_earlier_join_follows_the_node_and_one_of_the_operators_stays() {
        let before = completed("", "10.0.0.3");
        assert_eq!(completed(&before, "10.0.0.3"), before);
        let moved = before.replace("10.0.0.3:8481", "10.0.0.4:8481");
        assert_eq!(completed(&before, "10.0.0.4"), moved, "nothing else changes");
        let port = before.replace(":8481", ":9000");
        assert_eq!(completed(&port, "10.0.0.4"), moved.replace(":8481", ":9000"));
        let mine = before.replace(NOTE, "# mine");
        assert_eq!(completed(&mine, "10.0.0.4"), mine);
    }

    #[test]
    fn packaged_configuration_can_be_completed() {
        let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/agent.toml");
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.toml");
        fs::copy(packaged, &path).expect("copied");
        let config: File = daemon::config::load(&path).expect("valid");
        let answer = JoinResponse { pool: "10.100.3.0/24".into(), ..JoinResponse::default() };
        let listen = "[::]:7445".parse().ok();
        complete(&path, &config, &answer, Own { listen, ..own("2001:db8::3") }, false)
            .expect("completed");
        let config: File = daemon::config::load(&path).expect("valid");
        assert!(config.network.pool.is_some() && config.ingress.domain.is_none());
        assert_eq!(config.listen, listen, "above the first table");
    }
}
