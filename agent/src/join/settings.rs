//! Settings that a node gets when it joins. What the operator has written stays, comments included.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use proto::sandbox::v1::JoinResponse;
use toml_edit::{Item, value};

use crate::config::{File, PEER_PORT, edit};

/// Completes the configuration; returns what was done, for people. `pool_given`: the operator has named
/// the pool just now, so it replaces the one in the file.
///
/// # Errors
/// When the file cannot be read or written.
pub(super) fn complete(
    path: &Path,
    config: &File,
    answer: &JoinResponse,
    ip: IpAddr,
    pool_given: bool,
) -> io::Result<Vec<String>> {
    let mut wanted: Vec<(&str, &str, Item)> = Vec::new();
    if config.network.pool.is_none() || pool_given {
        wanted.push(("network", "pool", value(answer.pool.as_str())));
    }
    if config.ingress.domain.is_none() && !answer.domain.is_empty() {
        wanted.push(("ingress", "domain", value(answer.domain.as_str())));
        if !answer.https {
            wanted.push(("ingress", "https", value(false)));
        }
        if config.ingress.peer.is_none() && !ip.is_loopback() {
            let peer = SocketAddr::new(ip, PEER_PORT).to_string();
            wanted.push(("ingress", "peer", value(peer)));
        }
    }
    edit::set(path, wanted)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

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
            let ip = "10.0.0.3".parse().expect("address");
            super::complete(&path, &config, &answer, ip, given).expect("completed")
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

    #[test]
    fn packaged_configuration_can_be_completed() {
        let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/agent.toml");
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.toml");
        fs::copy(packaged, &path).expect("copied");
        let config: File = daemon::config::load(&path).expect("valid");
        let answer = JoinResponse { pool: "10.100.3.0/24".into(), ..JoinResponse::default() };
        let ip = "10.0.0.3".parse().expect("address");
        complete(&path, &config, &answer, ip, false).expect("completed");
        let config: File = daemon::config::load(&path).expect("valid");
        assert!(config.network.pool.is_some() && config.ingress.domain.is_none());
    }
}
