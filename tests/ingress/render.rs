use agent::ingress::{
    caddy::{self, Proof},
    settings::{Peers, PlainPath, Settings},
};

use crate::{
    node::{self, need_caddy},
    peers::Pki,
};

/// Checks that Caddy accepts the rendered configuration, with peers and without.
#[test]
fn caddy_accepts_the_rendered_configuration() {
    need_caddy!();
    let pki = Pki::new();
    let plain = |path: std::path::PathBuf| PlainPath::try_from(path.as_path()).expect("plain");
    let alone = Settings {
        domain: "sandbox.localhost".parse().expect("a domain"),
        public: vec![node::at(1, 8480), node::at(2, 8480)],
        route_socket: plain(pki.path().join("route.sock")),
        https: true,
        secure: None,
        frames: true,
        cors: true,
        peers: None,
        access_log: Some(plain(pki.path().join("access.log"))),
        generation: node::generation(),
    };
    let peers = Peers {
        listen: node::at(1, 8481),
        ca: plain(pki.path().join("ca.crt")),
        cert: plain(pki.path().join("node.crt")),
        key: plain(pki.path().join("node.key")),
    };
    for settings in [
        alone.clone(),
        Settings { peers: Some(peers), https: false, frames: false, cors: false, ..alone },
    ] {
        let path = pki.path().join("caddy.json");
        let proof = Proof::ensure(&path).expect("a proof");
        caddy::put(&path, &caddy::text(&settings, &proof), None).expect("written");
        node::validate(&path).expect("valid");
    }
    // Caddy refuses an unknown field: the check is effective.
    let path = pki.path().join("bad.json");
    std::fs::write(&path, r#"{"apps":{"http":{"servers":{"a":{"nosuch":1}}}}}"#).expect("written");
    node::validate(&path).expect_err("invalid");
}

/// Follows pve-sandbox-agent(8): `node-cert`, the files in place, the agent started, then Caddy.
#[test]
fn controller_certificates_and_agent_files_make_a_valid_ingress() {
    need_caddy!();
    let dir = tempfile::tempdir().expect("a directory");
    let (data, tls) = (dir.path().join("data"), dir.path().join("tls"));
    controller::ca::init(&data, &[]).expect("init");
    let node: proto::name::NodeName = "n1".parse().expect("a name");
    controller::ca::node(&data, &node, None, &tls).expect("node-cert");
    let plain = |path: std::path::PathBuf| PlainPath::try_from(path.as_path()).expect("plain");
    let settings = Settings {
        domain: node::DOMAIN.parse().expect("a domain"),
        public: vec![node::at(1, 8480)],
        route_socket: plain(dir.path().join("ingress.sock")),
        https: true,
        secure: None,
        frames: true,
        cors: true,
        peers: Some(Peers {
            listen: node::at(1, 8481),
            ca: plain(tls.join("ingress-ca.crt")),
            cert: plain(tls.join("ingress-node.crt")),
            key: plain(tls.join("ingress-node.key")),
        }),
        access_log: None,
        generation: node::generation(),
    };
    let path = dir.path().join("caddy.json");
    // `check-config` finds no obstacle, and the agent creates what is missing.
    assert_eq!(caddy::obstacles(&settings, &path, None), []);
    let proof = Proof::ensure(&path).expect("a proof");
    caddy::put(&path, &caddy::text(&settings, &proof), None).expect("written");
    node::validate(&path).expect("valid");
}
