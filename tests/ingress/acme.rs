//! A wildcard certificate that Caddy gets by ACME with the challenge by DNS. The CA is Pebble. The Caddy of
//! `.ci/tools caddy-acme` has the module of a DNS provider, and stands in for that provider, too (tests/ingress/acme).
//! On demand, because of what it installs and builds: `make test-acme`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use agent::ingress::{
    settings::{AcmeDns, Certificate, PlainPath, Secure, Settings},
    switch::Colour,
    systemd::Services as _,
};
use daemon::{doctor::reach, peer};
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};

use crate::{
    blue_green::keeper_with,
    doctor::{configure, findings, settings},
    http::{self, Client, Request},
    node::{DOMAIN, Node, at, caddy, host, ip, need_caddy},
    own_certificate::{self, Ca, dial, trusting},
    program,
    sandbox::Sandbox,
};

/// Token that may change the zone.
const TOKEN: &str = "0123456789-the-token";
/// Last byte of Pebble's address.
const PEBBLE: u8 = 4;
/// Last byte of the address of the DNS provider.
const PROVIDER: u8 = 5;
/// Longest wait. A try of Caddy takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Starts a program with its output in a file.
fn start(command: &mut Command, log: &Path) -> Running {
    let log = fs::File::create(log).expect("a file");
    let errors = log.try_clone().expect("a file");
    let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
    Running(child.expect("it starts"))
}

/// Waits until there is something.
async fn until<T>(what: &str, node: &Node, mut see: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = see().await {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what}: {}", node.log());
        sleep(Duration::from_millis(50)).await;
    }
}

/// Starts Pebble, whose directory has a certificate of this CA.
#[expect(clippy::disallowed_methods, reason = "tests start programs themselves")]
fn pebble(ca: &Ca, dir: &Path) -> Running {
    let (cert, key) = ca.issue(&ip(PEBBLE).to_string());
    fs::write(dir.join("directory.pem"), cert).expect("written");
    fs::write(dir.join("directory.key"), key).expect("written");
    let config = json!({ "pebble": {
        "listenAddress": at(PEBBLE, 14_000).to_string(),
        "managementListenAddress": at(PEBBLE, 15_000).to_string(),
        "certificate": dir.join("directory.pem"),
        "privateKey": dir.join("directory.key"),
        "certificateValidityPeriod": 3600,
    } });
    let path = dir.join("pebble.json");
    fs::write(&path, config.to_string()).expect("written");
    let dns = at(PROVIDER, 8053).to_string();
    let mut command = Command::new("pebble");
    command.arg("-config").arg(path).args(["-dnsserver", &dns]);
    // It tries at once, and each certificate needs a challenge of its own.
    command.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_AUTHZREUSE", "0");
    start(&mut command, &dir.join("pebble.log"))
}

/// Starts the DNS provider.
#[expect(clippy::disallowed_methods, reason = "tests start programs themselves")]
fn provider(dir: &Path) -> Running {
    let (dns, api) = (at(PROVIDER, 8053).to_string(), at(PROVIDER, 8055).to_string());
    let mut command = Command::new(caddy().expect("not skipped"));
    command.args(["dns-standin", "--zone", DOMAIN, "--token", TOKEN, "--dns", &dns, "--api", &api]);
    command.env("HOME", dir);
    start(&mut command, &dir.join("provider.log"))
}

/// Returns how many records of the zone were added so far, and how many are there.
async fn records() -> (u64, u64) {
    let answer = http::get(at(PROVIDER, 8055), "provider", "/").await;
    let counts: Value = serde_json::from_slice(&answer.body).expect("JSON");
    (counts["added"].as_u64().expect("a number"), counts["present"].as_u64().expect("a number"))
}

/// Puts the token where the agent looks for it.
fn put_token(path: &Path, token: &str) {
    fs::write(path, format!("{token}\n")).expect("written");
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("set");
}

/// Adds the certificate to the agent's configuration, and returns the settings that it makes of it.
fn with_acme(node: &Node, token: &Path) -> Settings {
    let (directory, resolver) = (format!("https://{}/dir", at(PEBBLE, 14_000)), at(PROVIDER, 8053));
    let listen = own_certificate::listen();
    let text = format!(
        "[ingress.certificate]\nlisten = [\"{listen}\"]\nacme_dns = {{ provider = \"standin\", \
         email = \"ops@example.com\", token_file = \"{}\", directory = \"{directory}\", \
         resolvers = [\"{resolver}\"] }}\n",
        token.display()
    );
    configure(node, &text);
    let copy = node.dir.join("caddy-dns-token");
    let certificate = Certificate::Acme(AcmeDns {
        provider: "standin".parse().expect("a name"),
        email: "ops@example.com".parse().expect("a text"),
        token_field: "api_token".parse().expect("a name"),
        directory: Some(directory.parse().expect("a text")),
        resolvers: vec![resolver],
        token: token.to_owned(),
        token_copy: PlainPath::try_from(copy.as_path()).expect("a plain path"),
    });
    let secure = Secure { listen: vec![listen], redirect: Vec::new(), certificate };
    Settings { secure: Some(secure), ..settings(node) }
}

#[tokio::test(flavor = "multi_thread")]
async fn wildcard_certificate_is_got_by_acme_and_renewed() {
    if std::env::var_os("PVE_SANDBOX_ACME_TESTS").is_none() {
        eprintln!("not run: it needs PVE_SANDBOX_ACME_TESTS=1 and what `make test-acme` makes");
        return;
    }
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.kill_caddy();
    fs::remove_file(node.dir.join("caddy.log")).expect("removed");
    let file = |name: &str| node.dir.join(name);
    let read = |name: &str| fs::read_to_string(file(name)).expect("text");

    let ca = Ca::new();
    fs::write(file("roots.pem"), ca.pem()).expect("written");
    let _running = [pebble(&ca, &node.dir), provider(&node.dir)];
    for address in [at(PEBBLE, 14_000), at(PEBBLE, 15_000), at(PROVIDER, 8055)] {
        until("nobody listens", &node, async || TcpStream::connect(address).await.ok()).await;
    }
    let (name, tls) = (ip(PEBBLE).to_string(), ca.client("http/1.1"));
    let (stream, _) = reach::connect(at(PEBBLE, 15_000), &name, tls).await.expect("Pebble");
    let root = Client::over(stream).request(&Request::get(&name, "/roots/0")).await;
    let root = root.expect("an answer").text();
    // A new one each time: one that comes again resumes its session, and sees the certificate of then.
    let client = || trusting(&root, "http/1.1");

    // A token that the provider refuses: everything else runs, and the log and `doctor` tell.
    put_token(&file("token"), "another-token");
    let variables = vec![
        ("SSL_CERT_FILE", file("roots.pem").display().to_string()),
        ("DNS_STANDIN_API", format!("http://{}", at(PROVIDER, 8055))),
    ];
    let wanted = with_acme(&node, &file("token"));
    let (keeper, services) = keeper_with(&node, wanted, variables.clone());
    assert!(keeper.look().await);
    assert!(!file("problem").exists(), "{}", read("problem"));
    let why = "403 Forbidden: this token may not change the zone";
    until(why, &node, async || node.log().contains(why).then_some(())).await;
    let found = findings(&node).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].found.contains("Caddy has no certificate for this domain"), "{found:?}");
    let host = host(8000, 100_001);
    dial(&host, client()).await.expect_err("there is no certificate");
    assert_eq!(http::get(node.public, &host, "/").await.status, 200);

    // With the right one, Caddy gets the certificate.
    put_token(&file("token"), TOKEN);
    assert!(keeper.look().await);
    assert_eq!(services.on(), [Colour::Green]);
    let connect = async || dial(&host, client()).await.ok();
    let stream = until("no certificate", &node, connect).await;
    let answer = Client::over(stream).request(&Request::get(&host, "/")).await.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let shown = async || {
        let shown = reach::connect(own_certificate::listen(), &host, client()).await;
        shown.ok().map(|(_, der)| der)
    };
    let first = until("no https", &node, async || shown().await).await;
    assert_eq!(peer::names(&first).expect("names"), [format!("*.{DOMAIN}")]);
    assert_eq!(findings(&node).await, []);
    let (added, present) = records().await;
    assert!(added > 0 && present == 0, "{added} added, {present} left");

    // The token is in its copy alone.
    let mode = fs::metadata(file("caddy-dns-token")).expect("a copy").permissions().mode();
    assert_eq!((read("caddy-dns-token").as_str(), mode & 0o7777), (TOKEN, 0o640));
    assert!(!read("caddy.json").contains(TOKEN) && !node.log().contains(TOKEN));

    // Caddy renews it while it runs. By default it looks every ten minutes, and renews in the last third.
    services.stop(Colour::Green).await.expect("stopped");
    let mut config: Value = serde_json::from_str(&read("caddy.json")).expect("JSON");
    let automation = &mut config["apps"]["tls"]["automation"];
    automation["renew_interval"] = "1s".into();
    automation["policies"][0]["renewal_window_ratio"] = json!(0.999);
    fs::write(file("renewing.json"), config.to_string()).expect("written");
    let ours = variables.iter().map(|(name, value)| (*name, value.as_str()));
    let all: Vec<_> = program::memory().into_iter().chain(ours).collect();
    let program = caddy().expect("not skipped");
    let _renewing = Running(program::run(&program, &file("renewing.json"), &node.dir, &all));
    let other = async || shown().await.filter(|der| *der != first);
    let second = until("not renewed", &node, other).await;
    assert_eq!(peer::names(&second).expect("names"), [format!("*.{DOMAIN}")]);
    assert!(records().await.0 > added, "the challenge was answered again");
}
