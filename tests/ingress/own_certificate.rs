//! Https by Caddy itself, with a wildcard certificate of a CA of the test's own.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use agent::{
    clock::{Clock as _, SystemClock},
    ingress::{
        Owner, own_certificate,
        render::PEER_NAME,
        settings::{AcmeDns, Certificate, CertificateFiles, PlainPath, Secure, Settings},
        switch::Colour,
        systemd::Services,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

use crate::{
    blue_green::{keeper, load, more},
    http::{Client, Head, Request, get},
    http2,
    node::{DOMAIN, Node, at, host, need_caddy, settings},
    peers::Pki,
    sandbox::Sandbox,
    websocket,
};

/// CA that has signed the wildcard certificate.
pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("signed"))
    }

    /// Makes a certificate and its key, PEM.
    pub(crate) fn issue(&self, name: &str) -> (String, String) {
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    /// Returns the settings of a client that trusts this CA and speaks this protocol.
    pub(crate) fn client(&self, protocol: &str) -> Arc<ClientConfig> {
        trusting(&self.pem(), protocol)
    }

    /// Returns its certificate, PEM.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }
}

/// Returns the settings of a client that trusts a CA (PEM) and speaks this protocol.
pub(crate) fn trusting(ca: &str, protocol: &str) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(ca.as_bytes()).expect("a certificate");
    roots.add(root).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    Arc::new(config)
}

/// Address of the listener of the first node.
pub(crate) fn listen() -> SocketAddr {
    at(1, 8443)
}

/// Puts a certificate and its key where the agent looks for them.
pub(crate) fn put(dir: &Path, (cert, key): &(String, String)) {
    use std::os::unix::fs::PermissionsExt;

    std::fs::write(dir.join("own.crt"), cert).expect("written");
    let path = dir.join("own.key");
    std::fs::write(&path, key).expect("written");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("set");
}

/// Adds the listener to settings, with the certificate in a directory.
pub(crate) fn with_certificate(settings: &mut Settings, dir: &Path) -> CertificateFiles {
    let copy = dir.join("caddy-certificate.pem");
    let files = CertificateFiles {
        cert: dir.join("own.crt"),
        key: dir.join("own.key"),
        copy: PlainPath::try_from(copy.as_path()).expect("a plain path"),
    };
    settings.secure = Some(Secure {
        listen: vec![listen()],
        redirect: vec![at(1, 8080)],
        certificate: Certificate::Files(files.clone()),
    });
    files
}

/// Starts a node with a certificate of this CA.
pub(crate) async fn start(ca: &Ca, dir: &Path, pki: Option<&Path>) -> Node {
    put(dir, &ca.issue(&format!("*.{DOMAIN}")));
    Node::shaped(1, pki, |settings| copy(settings, dir)).await
}

/// Adds the listener to settings, and makes Caddy's copy of the certificate, as the agent does.
pub(crate) fn copy(settings: &mut Settings, dir: &Path) {
    let files = with_certificate(settings, dir);
    let now_ms = SystemClock::default().now_ms();
    let copied = own_certificate::refresh(&files, &settings.domain, None, now_ms);
    assert_eq!(copied, Ok(true));
}

pub(crate) async fn dial(
    host: &str,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(config).connect(name, TcpStream::connect(listen()).await?).await
}

/// Sends one request by https, HTTP/1.1.
async fn once(ca: &Ca, request: &Request<'_>) -> io::Result<crate::http::Response> {
    let name = request.host.split(':').next().unwrap_or_default();
    Client::over(dial(name, ca.client("http/1.1")).await?).request(request).await
}

/// Checks what a sandbox was told of its client: Caddy's words alone.
#[track_caller]
fn assert_clean(got: &Head, host: &str, hops: usize) {
    for (name, value) in &got.headers {
        assert!(!value.contains("forged") && !value.contains("203.0.113.9"), "{name}: {got:?}");
    }
    assert!(!got.any("cf-") && !got.any("forwarded") && !got.any("x-sbx"), "{got:?}");
    assert_eq!(got.get("x-forwarded-proto"), Some("https"), "{got:?}");
    assert_eq!(got.get("x-forwarded-host"), Some(host), "{got:?}");
    let chain: Vec<_> = got.get("x-forwarded-for").expect("a chain").split(", ").collect();
    assert_eq!((chain.len(), chain[0]), (hops, "127.0.0.1"), "{got:?}");
    assert!(got.get("x-request-id").is_some_and(|id| id.len() == 36), "{got:?}");
    assert_eq!(got.headers.iter().filter(|(n, _)| n.to_lowercase().starts_with("x-f")).count(), 3);
}

fn forged(host: &str) -> Request<'_> {
    let mut request = Request::get(host, "/x?y=z");
    for name in [
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Forwarded-Host",
        "X-Forwarded-Port",
        "X-Forwarded-Server",
        "x_forwarded_for",
        "Forwarded",
        "Cf-Connecting-Ip",
        "CF-Ray",
        "cf_ipcountry",
        "X-Request-Id",
        "X-Sbx-Kind",
        "X-Sbx-Upstream",
    ] {
        request = request.with(name, "forged").with(name, "203.0.113.9");
    }
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn sandbox_is_reached_by_https_and_told_the_truth_about_its_client() {
    need_caddy!();
    let (ca, dir, pki) = (Ca::new(), tempfile::tempdir().expect("a directory"), Pki::new());
    let node = start(&ca, dir.path(), Some(pki.path())).await;
    let owner = Node::start_with(2, Some(pki.path()), |_| {}).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    owner.put(100_002, sandbox.address);
    node.table.elsewhere(100_002, Owner::Peer(owner.peer));

    // On this node, and on another one; with a port, as browsers say it.
    for (number, hops) in [(100_001, 1), (100_002, 2)] {
        let host = format!("{}:8443", host(8000, number));
        let answer = once(&ca, &forged(&host)).await.expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_clean(&sandbox.last().head, &host, hops);
        let declared = forged(&host).with("Connection", "close, X-Forwarded-For, X-Forwarded-Host");
        assert_eq!(once(&ca, &declared).await.expect("an answer").status, 200);
        assert_clean(&sandbox.last().head, &host, hops);
    }

    // The same verdicts.
    let host = host(8000, 100_001);
    for (name, status) in [
        (host.as_str(), 200),
        ("port-22-vm-100001.sbx.test", 403),
        ("port-80-vm-100009.sbx.test", 404),
    ] {
        let answer = once(&ca, &Request::get(name, "/")).await.expect("an answer");
        assert_eq!(answer.status, status, "{name}: {}", answer.text());
    }
    let stream = dial(&host, ca.client("http/1.1")).await.expect("a connection");
    let foreign = Request::get("example.com", "/");
    let answer = Client::over(stream).request(&foreign).await.expect("an answer");
    assert_eq!((answer.status, answer.text().as_str()), (404, "this host is no sandbox\n"));

    // A WebSocket.
    let stream = dial(&host, ca.client("http/1.1")).await.expect("a connection");
    let request = format!("wss://{host}/ws").into_client_request().expect("a request");
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.expect("open");
    websocket::echo(&mut socket, Message::text("by https")).await;
    assert_clean(&sandbox.last().head, &host, 1);

    // The listener of a tunnel is there, too, and trusts it.
    let request = Request::get(&host, "/").with("X-Forwarded-For", "203.0.113.9");
    assert_eq!(crate::http::once(node.public, &request).await.expect("an answer").status, 200);
    let chain = sandbox.last().head.get("x-forwarded-for").map(str::to_owned);
    assert!(chain.is_some_and(|chain| chain.starts_with("203.0.113.9, ")));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_of_the_hop_is_never_shown_to_clients() {
    need_caddy!();
    let (ca, dir, pki) = (Ca::new(), tempfile::tempdir().expect("a directory"), Pki::new());
    let _node = start(&ca, dir.path(), Some(pki.path())).await;
    let config = daemon::tls::client_that_looks().expect("a client");
    let shown = |name: &'static str| {
        let config = Arc::clone(&config);
        async move { daemon::doctor::reach::connect(listen(), name, config).await }
    };
    let own = CertificateDer::from_pem_file(dir.path().join("own.crt")).expect("a certificate");
    let (_, der) = shown("port-1-vm-100001.sbx.test").await.expect("a connection");
    assert_eq!(der, own.to_vec());
    if let Ok((_, der)) = shown(PEER_NAME).await {
        assert_eq!(der, own.to_vec());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_is_spoken_and_http_3_is_not() {
    need_caddy!();
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let node = start(&ca, dir.path(), None).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let stream = dial(&host, ca.client("h2")).await.expect("a connection");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let answer = http2::Request::get(&host, "/x").send(stream).await.expect("an answer");
    assert_eq!(answer.status, 0x88, "{}", answer.body);
    assert!(answer.body.starts_with("alpha got GET /x "), "{}", answer.body);
    assert_clean(&sandbox.last().head, &host, 1);
    let answer = once(&ca, &Request::get(&host, "/")).await.expect("an answer");
    assert_eq!(answer.head.get("alt-svc"), None, "{:?}", answer.head);
    tokio::net::UdpSocket::bind(listen()).await.expect("nobody listens by UDP");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_sent_on_for_hosts_of_sandboxes_alone() {
    need_caddy!();
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let _node = start(&ca, dir.path(), None).await;
    let host = host(8000, 100_001);
    let answer = get(at(1, 8080), &host, "/a//b?c={env.HOME}").await;
    assert_eq!(answer.status, 308);
    let location = format!("https://{host}:8443/a//b?c={{env.HOME}}");
    assert_eq!(answer.head.get("location"), Some(location.as_str()));
    assert_eq!(answer.head.get("cache-control"), Some("no-store"));
    for other in ["example.com", "port-8000-vm-100001.sbx.test.example.com", DOMAIN] {
        let answer = get(at(1, 8080), other, "/").await;
        assert_eq!((answer.status, answer.head.get("location")), (404, None), "{other}");
    }
    // Targets without a path would make another host of ours.
    for target in ["x:@evil.example/", "x:.evil.example/", "*"] {
        let answer = get(at(1, 8080), &host, target).await;
        assert_eq!((answer.status, answer.head.get("location")), (404, None), "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_is_renewed_under_load_and_a_bad_one_leaves_the_one_before() {
    need_caddy!();
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let name = format!("*.{DOMAIN}");
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.kill_caddy();
    std::fs::remove_file(node.dir.join("caddy.log")).expect("removed");
    let mut wanted = settings(&node.dir, 1, None);
    with_certificate(&mut wanted, dir.path());
    put(dir.path(), &ca.issue(&name));
    let (keeper, services) = keeper(&node, wanted);
    let keeper = keeper.served_by(Arc::clone(&services) as Arc<dyn Services>);
    assert!(keeper.look().await);
    assert_eq!(services.on(), [Colour::Blue]);

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let config = ca.client("http/1.1");
    let connect = move || {
        let config = Arc::clone(&config);
        async move { dial(&host(8000, 100_001), config).await.map(Client::over) }
    };
    let clients = load(connect, &stop, &done);
    more(&done, 100).await;
    let shown = || async {
        let config = daemon::tls::client_that_looks().expect("a client");
        let host = host(8000, 100_001);
        let found = daemon::doctor::reach::connect(listen(), &host, config).await;
        found.expect("a connection").1
    };
    let der = |cert: &str| CertificateDer::from_pem_slice(cert.as_bytes()).expect("a certificate");
    for round in 1..=2 {
        let next = ca.issue(&name);
        // Its key comes later, as when files are replaced one after the other.
        let before = shown().await;
        std::fs::write(dir.path().join("own.crt"), &next.0).expect("written");
        assert!(keeper.look().await);
        let problem = std::fs::read_to_string(node.dir.join("problem")).expect("told");
        assert!(problem.contains("own.key"), "{problem}");
        assert_eq!(services.started.load(Ordering::Relaxed), round);
        assert_eq!(shown().await, before);
        put(dir.path(), &next);
        assert!(keeper.look().await);
        assert_eq!(services.started.load(Ordering::Relaxed), round + 1);
        assert_eq!(services.on().len(), 1);
        assert_eq!(shown().await, der(&next.0).to_vec());
        assert!(!node.dir.join("problem").exists());
        more(&done, 100).await;
    }
    // One that does not cover the sandboxes.
    let before = shown().await;
    put(dir.path(), &ca.issue("*.example.com"));
    assert!(keeper.look().await);
    assert_eq!(shown().await, before);
    more(&done, 50).await;
    stop.store(true, Ordering::Relaxed);
    let bad = clients.join_all().await.concat();
    eprintln!("{} answered", done.load(Ordering::Relaxed));
    assert!(bad.is_empty(), "{} failed: {:?}", bad.len(), &bad[..bad.len().min(5)]);
}

/// No package that tests can get has a Caddy with the module of a provider.
#[test]
fn caddy_understands_all_of_acme_but_the_module_of_the_provider() {
    need_caddy!();
    let dir = tempfile::tempdir().expect("a directory");
    let mut wanted = settings(dir.path(), 1, None);
    wanted.access_log = None;
    let acme = AcmeDns {
        provider: "cloudflare".parse().expect("a name"),
        email: "ops@example.com".parse().expect("a text"),
        token_field: "api_token".parse().expect("a name"),
        directory: Some("https://acme.example.com/directory".parse().expect("a text")),
        resolvers: vec![at(1, 53)],
        token: "/nonexistent".into(),
        token_copy: "/nonexistent".parse().expect("a path"),
    };
    let certificate = Certificate::Acme(acme);
    wanted.secure = Some(Secure { listen: vec![listen()], redirect: Vec::new(), certificate });
    let config = dir.path().join("caddy.json");
    let text = agent::ingress::caddy::show(&wanted);
    std::fs::write(&config, &text).expect("written");
    let why = crate::node::validate(&config).expect_err("Debian's Caddy has none");
    assert!(why.contains("unknown module: dns.providers.cloudflare"), "{why}");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let issuer = &mut json["apps"]["tls"]["automation"]["policies"][0]["issuers"][0];
    let challenges = issuer["challenges"].as_object_mut().expect("challenges");
    challenges.remove("dns").expect("the provider");
    std::fs::write(&config, json.to_string()).expect("written");
    crate::node::validate(&config).expect("valid");
}

/// Starts Caddy as another user in a network of its own, with these capabilities; returns how it began to run, or
/// ended.
#[expect(clippy::disallowed_methods, reason = "tests start Caddy themselves")]
fn start_confined(config: &Path, capabilities: &str) -> String {
    let script = "ip link set lo up; exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \
                  --bounding-set=$1 --inh-caps=$1 --ambient-caps=$1 timeout 20 $2 run --config $3";
    let mut child = std::process::Command::new("unshare")
        .args(["--net", "sh", "-c", script, "sh", capabilities])
        .arg(crate::node::caddy().expect("not skipped"))
        .arg(config)
        .env("HOME", "/nonexistent")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("unshare");
    let mut told = String::new();
    let log = io::BufReader::new(child.stderr.take().expect("a pipe"));
    for line in io::BufRead::lines(log) {
        told.push_str(&line.expect("text"));
        told.push('\n');
        if told.contains("serving initial configuration") {
            break;
        }
    }
    // `timeout` passes it on; killed, it would leave Caddy behind. It may have ended already.
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, Signal::SIGTERM).ok();
    child.wait().expect("ended");
    told
}

/// The drop-in gives one capability, and nothing else is needed for the usual ports.
#[test]
fn caddy_listens_on_port_443_with_one_capability_and_not_without() {
    use std::os::unix::fs::PermissionsExt;

    need_caddy!();
    assert!(nix::unistd::geteuid().is_root(), "it becomes another user");
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    put(dir.path(), &ca.issue(&format!("*.{DOMAIN}")));
    let mut wanted = settings(dir.path(), 1, None);
    wanted.access_log = None;
    let files = with_certificate(&mut wanted, dir.path());
    let secure = wanted.secure.as_mut().expect("a listener");
    secure.listen = vec![SocketAddr::from(([127, 0, 0, 1], 443))];
    secure.redirect = vec![SocketAddr::from(([127, 0, 0, 1], 80))];
    assert!(secure.has_low_port());
    let both = ["own.key", "own.crt"].map(|name| dir.path().join(name));
    let both = both.map(|path| std::fs::read_to_string(path).expect("read"));
    std::fs::write(files.copy.as_str(), both.concat()).expect("written");
    let config = dir.path().join("caddy.json");
    std::fs::write(&config, agent::ingress::caddy::show(&wanted)).expect("written");
    for (path, mode) in [(dir.path(), 0o755), (Path::new(files.copy.as_str()), 0o644)] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("set");
    }
    let with = start_confined(&config, "-all,+net_bind_service");
    assert!(with.contains("serving initial configuration"), "{with}");
    let without = start_confined(&config, "-all");
    assert!(without.contains("permission denied") && !without.contains("serving"), "{without}");
}
