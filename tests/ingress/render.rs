use agent::ingress::caddy::{self, Peers, PlainPath, Settings};

use crate::{
    node::{self, need_caddy},
    peers::Pki,
};

/// What is rendered, Caddy takes; with peers and without.
#[test]
fn caddy_takes_the_configuration() {
    need_caddy!();
    let pki = Pki::new();
    let plain = |path: std::path::PathBuf| PlainPath::try_from(path.as_path()).expect("plain");
    let alone = Settings {
        domain: "sandbox.localhost".parse().expect("a domain"),
        public: vec![node::at(1, 8480), node::at(2, 8480)],
        route_socket: plain(pki.path().join("route.sock")),
        https: true,
        peers: None,
    };
    let peers = Peers {
        listen: node::at(1, 8481),
        ca: plain(pki.path().join("ca.crt")),
        cert: plain(pki.path().join("node.crt")),
        key: plain(pki.path().join("node.key")),
    };
    for settings in [alone.clone(), Settings { peers: Some(peers), https: false, ..alone }] {
        let path = pki.path().join("caddy.json");
        caddy::write(&settings, &path, None).expect("written");
        node::validate(&path).expect("valid");
    }
    // A field that Caddy does not know would be refused: the check bites.
    let path = pki.path().join("bad.json");
    std::fs::write(&path, r#"{"apps":{"http":{"servers":{"a":{"nosuch":1}}}}}"#).expect("written");
    node::validate(&path).expect_err("invalid");
}
