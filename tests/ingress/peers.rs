use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use agent::ingress::{Owner, State, render::PEER_NAME};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    ALL_VERSIONS, ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    http::{Client, Request, get, once},
    node::{Node, at, host, host_by_id, ip, need_caddy},
    sandbox::Sandbox,
    websocket,
};

/// Second of the issue of certificates, unless a test says another.
const EARLY_S: u64 = 1_700_000_000;

/// A CA with one node's certificate, as files.
#[derive(Debug)]
pub(crate) struct Pki {
    dir: tempfile::TempDir,
    ca: String,
    issuer: Arc<Issuer<'static, KeyPair>>,
}

impl Pki {
    /// Creates the CA and the certificate.
    pub(crate) fn new() -> Self {
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let ca_key = KeyPair::generate().expect("a key");
        let ca_cert = ca.self_signed(&ca_key).expect("signed");
        Self::issued(&ca_cert.pem(), Arc::new(Issuer::new(ca, ca_key)), "n1", EARLY_S)
    }

    /// Creates another certificate of the same CA, for a node of this name, issued at this second.
    pub(crate) fn issue(&self, name: &str, issued_s: u64) -> Self {
        Self::issued(&self.ca, Arc::clone(&self.issuer), name, issued_s)
    }

    fn issued(ca: &str, issuer: Arc<Issuer<'static, KeyPair>>, name: &str, issued_s: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let names = vec![name.to_owned(), PEER_NAME.to_owned()];
        let mut node = CertificateParams::new(names).expect("names");
        // As the controller does: an hour for clocks that are behind.
        node.not_before = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(issued_s - 3600);
        node.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let node_key = KeyPair::generate().expect("a key");
        let node_cert = node.signed_by(&node_key, &issuer).expect("signed");
        for (name, pem) in [
            ("ca.crt", ca.to_owned()),
            ("node.crt", node_cert.pem()),
            ("node.key", node_key.serialize_pem()),
        ] {
            std::fs::write(dir.path().join(name), pem).expect("written");
        }
        Self { dir, ca: ca.to_owned(), issuer }
    }

    /// Returns the directory of the files.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    fn der(&self, name: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.path().join(name)).expect("a certificate")
    }
}

/// Starts two nodes that know each other.
pub(crate) async fn two(pki: &Pki) -> (Node, Node) {
    let first = Node::start_with(1, Some(pki.path()), |_| {}).await;
    let second = Node::start_with(2, Some(pki.path()), |_| {}).await;
    (first, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_serves_every_sandbox() {
    need_caddy!();
    let pki = Pki::new();
    let (edge, owner) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    owner.table.put(100_002, ip(10), State::Gone, &[8000]);
    owner.table.put(100_004, ip(10), State::Stopped, &[8000]);
    for number in 100_001..=100_004 {
        edge.table.elsewhere(number, Owner::Peer(owner.peer));
    }

    let host_name = host(8000, 100_001);
    let request = Request::get(&host_name, "/x?y=z").with("X-Sbx-Kind", "local");
    let body: Vec<u8> = (0..1_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    for round in 0..3 {
        let answer = once(edge.public, &request).await.expect("an answer");
        assert_eq!(answer.status, 200, "{round}: {} {}", answer.text(), edge.log());
        assert!(!answer.head.any("x-sbx"), "{:?}", answer.head);
        // Later Caddys say nothing of themselves here but `Via`.
        let servers = answer.head.all("server");
        assert!(servers == ["Caddy"] || servers.is_empty(), "{:?}", answer.head);
        let got = sandbox.last().head;
        assert_eq!(got.line, "GET /x?y=z HTTP/1.1");
        assert_eq!(got.get("x-forwarded-host"), Some(host_name.as_str()));
        assert_eq!(got.get("host"), Some("localhost:8000"));
        assert!(!got.any("x-sbx"), "{got:?}");
        // The chain has the client, then the edge.
        let chain = got.get("x-forwarded-for").expect("a chain").split(", ").count();
        assert_eq!(chain, 2, "{got:?}");
        let post = Request { method: "POST", body: &body, ..Request::get(&host_name, "/up") };
        assert_eq!(once(edge.public, &post).await.expect("an answer").status, 200);
        assert!(sandbox.last().body == body);
    }
    // A client's chain is continued over the hop.
    let request = Request::get(&host_name, "/").with("X-Forwarded-For", "203.0.113.9");
    once(edge.public, &request).await.expect("an answer");
    let got = sandbox.last().head;
    assert!(got.get("x-forwarded-for").is_some_and(|c| c.starts_with("203.0.113.9, ")), "{got:?}");

    let mut socket = websocket::open(edge.public, &host_name).await.expect("open");
    websocket::echo(&mut socket, Message::text("over two nodes")).await;

    // The client gets the owner's answer.
    for (number, port, status, words) in [
        (100_001, 22, 403, "not exposed"),
        (100_002, 8000, 410, "deleted"),
        (100_003, 8000, 404, "no such sandbox"),
        (100_004, 8000, 503, "stopped"),
    ] {
        let answer = get(edge.public, &host(port, number), "/").await;
        assert_eq!(answer.status, status, "{number}: {}", answer.text());
        assert!(answer.text().contains(words), "{number}: {}", answer.text());
    }
    // An id is known only to the owner: this edge's table has none.
    assert_eq!(get(owner.public, &host_by_id(8000, 100_001), "/").await.status, 200);
    assert_eq!(get(edge.public, &host_by_id(8000, 100_001), "/").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn request_takes_at_most_one_hop() {
    need_caddy!();
    let pki = Pki::new();
    let (first, second) = two(&pki).await;
    first.table.elsewhere(100_001, Owner::Peer(second.peer));
    second.table.elsewhere(100_001, Owner::Peer(first.peer));
    for node in [&first, &second] {
        let answer = get(node.public, &host(8000, 100_001), "/").await;
        assert_eq!(answer.status, 421, "{}", answer.text());
    }
    // A missing peer is an error at once, not a wait.
    first.table.elsewhere(100_002, Owner::Peer(at(9, 8481)));
    let answer = get(first.public, &host(8000, 100_002), "/").await;
    assert_eq!(answer.status, 502);
    assert_eq!(answer.text(), "the node of this sandbox did not answer (502)\n");
}

/// The owner refuses a revoked node at once, also after a restart of its agent, whatever a client claims, and
/// on connections that are open; and it accepts the node's new certificate once the node has joined again.
#[tokio::test(flavor = "multi_thread")]
async fn revoked_node_is_refused_by_the_owner_until_it_joins_again() {
    need_caddy!();
    let pki = Pki::new();
    let edge = Node::start_with(1, Some(pki.path()), |_| {}).await;
    let joined = pki.issue("n1", EARLY_S + 1000);
    let edge_again = Node::start_with(3, Some(joined.path()), |_| {}).await;
    let mut owner = Node::start_with(2, Some(pki.issue("n2", EARLY_S).path()), |_| {}).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    owner.put(100_001, sandbox.address);
    for edge in [&edge, &edge_again] {
        edge.table.elsewhere(100_001, Owner::Peer(owner.peer));
    }
    let host = host(8000, 100_001);
    let mut client = Client::connect(edge.public).await.expect("connected");
    let request = Request::get(&host, "/");
    assert_eq!(client.request(&request).await.expect("an answer").status, 200);

    // Another node's revocation changes nothing.
    owner.revoke("n9", 0);
    assert_eq!(client.request(&request).await.expect("an answer").status, 200);
    owner.revoke("n1", 0);
    let served = sandbox.got().len();
    let refused = client.request(&request).await.expect("an answer");
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert!(refused.text().contains("revoked"), "{}", refused.text());
    let forged = Request::get(&host, "/").with("X-Sbx-Peer-Certificate", "AAAA");
    assert_eq!(once(edge.public, &forged).await.expect("an answer").status, 403);
    owner.kill_agent();
    owner.start_agent();
    assert_eq!(client.request(&request).await.expect("an answer").status, 403);
    assert_eq!(get(edge_again.public, &host, "/").await.status, 403);
    assert_eq!(sandbox.got().len(), served);

    owner.revoke("n1", (EARLY_S + 900) * 1000);
    assert_eq!(client.request(&request).await.expect("an answer").status, 403);
    assert_eq!(get(edge_again.public, &host, "/").await.status, 200);
    // Its own clients reach the owner as before.
    assert_eq!(get(owner.public, &host, "/").await.status, 200);
}

async fn handshake(
    address: SocketAddr,
    trusted: &Pki,
    own: Option<&Pki>,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.der("ca.crt")).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("versions")
        .with_root_certificates(roots);
    let config = match own {
        None => config.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::from_pem_file(own.path().join("node.key")).expect("a key");
            config.with_client_auth_cert(vec![own.der("node.crt")], key).expect("a certificate")
        }
    };
    let name = ServerName::try_from(PEER_NAME).expect("a name");
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn only_peers_reach_the_peer_port() {
    need_caddy!();
    let (pki, foreign) = (Pki::new(), Pki::new());
    let (node, _other) = two(&pki).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let request = Request::get(&host, "/");

    let stream = handshake(node.peer, &pki, Some(&pki), ALL_VERSIONS).await.expect("a peer");
    let answer = Client::over(stream).request(&request).await.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let served = sandbox.got().len();

    for own in [None, Some(&foreign)] {
        // With TLS 1.3 the refusal may come only with the first read.
        if let Ok(stream) = handshake(node.peer, &pki, own, ALL_VERSIONS).await {
            Client::over(stream).request(&request).await.expect_err("refused");
        }
    }
    let plain = once(node.peer, &request).await;
    assert!(plain.is_err() || plain.is_ok_and(|answer| answer.status == 400));
    assert_eq!(sandbox.got().len(), served);
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_speak_only_tls_1_3() {
    need_caddy!();
    let pki = Pki::new();
    let (node, _other) = two(&pki).await;
    handshake(node.peer, &pki, Some(&pki), &[&TLS13]).await.expect("a peer");
    handshake(node.peer, &pki, Some(&pki), &[&TLS12]).await.expect_err("refused");
}
