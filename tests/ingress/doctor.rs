//! `pve-sandbox-agent doctor` beside a real Caddy: what is broken is found, and is gone after its remedy.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use agent::{
    bridge,
    clock::{Clock as _, SystemClock},
    config::Flags,
    doctor::{self, Host},
    hand_edits::{self, HandEdits},
    ingress::{
        caddy,
        settings::{PlainPath, Settings},
    },
};
use daemon::doctor::{Check, State};

use crate::{
    node::{self, DOMAIN, Node, need_caddy},
    own_certificate::{self, Ca},
};

/// Looks at the ingress of a node; returns what is wrong with it.
pub(crate) async fn findings(node: &Node) -> Vec<Check> {
    let config = node.dir.join("agent.toml");
    let paths = bridge::Paths {
        interfaces: node.dir.join("interfaces"),
        interfaces_d: node.dir.join("interfaces.d"),
        etc: node.dir.join("etc"),
        config: config.clone(),
    };
    let (net, caddy) = (node.dir.join("net"), node::caddy().expect("not skipped"));
    let host = Host { net, caddy, bridge: paths, ..Host::of_node(&config) };
    let report = doctor::run(Some(&config), &Flags::default(), &|_| None, &host).await;
    let ours = [
        "configuration",
        "caddy",
        "caddy-config",
        "route-socket",
        "ingress-files",
        "caddy-listeners",
        "web-certificate",
        "hand-edit",
    ];
    let all = report.checks.into_iter().filter(|check| ours.contains(&check.name));
    let all: Vec<_> = all.collect();
    assert!(all.len() >= 4, "{all:?}");
    all.into_iter().filter(|check| check.state != State::Ok).collect()
}

/// Returns the settings that the agent makes of its configuration.
pub(crate) fn settings(node: &Node) -> Settings {
    let socket = node.dir.join("route.sock");
    Settings {
        domain: DOMAIN.parse().expect("a domain"),
        public: vec![node.public],
        route_socket: PlainPath::try_from(socket.as_path()).expect("a plain path"),
        https: true,
        secure: None,
        frames: true,
        cors: true,
        peers: None,
        access_log: None,
        generation: node::generation(),
    }
}

/// Writes the configuration as the agent does.
fn put_back(node: &Node) {
    let config = node.dir.join("caddy.json");
    let proof = caddy::Proof::ensure(&config).expect("a proof");
    caddy::put(&config, &caddy::text(&settings(node), &proof), None).expect("written");
}

/// Writes the agent's configuration, with more settings at its end.
pub(crate) fn configure(node: &Node, more: &str) {
    for dir in ["pve/nodes/n1/lxc", "net/vmbr1/bridge"] {
        fs::create_dir_all(node.dir.join(dir)).expect("made");
    }
    fs::write(node.dir.join("pve/.members"), "{\"nodename\":\"n1\",\"version\":0}")
        .expect("written");
    let path = |file: &str| node.dir.join(file).display().to_string();
    let text = format!(
        "state_dir = \"{}\"\nrun_dir = \"{}\"\n[pve]\nroot = \"{}\"\n[network]\nbridge = \"vmbr1\"\n\
         gateway = \"10.100.1.1\"\npool = \"10.100.1.0/24\"\n[ingress]\ndomain = \"{DOMAIN}\"\n\
         public = [\"{}\"]\ncaddy_config = \"{}\"\nsocket = \"{}\"\n\
         access_log = \"\"\n{more}",
        path("state"),
        path("run"),
        path("pve"),
        node.public,
        path("caddy.json"),
        path("route.sock"),
    );
    fs::write(node.dir.join("agent.toml"), text).expect("written");
}

#[track_caller]
fn names(findings: &[Check]) -> Vec<&str> {
    findings.iter().map(|check| check.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_what_is_wrong_with_caddy_until_its_remedy_is_run() {
    need_caddy!();
    let mut node = Node::start(1).await;
    configure(&node, "");
    let config = node.dir.join("caddy.json");

    // The test's node has written it in a form of its own: the agent's start replaces it.
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy-config"], "{found:?}");
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("restart")), "{found:?}");
    put_back(&node);
    node.kill_caddy();
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // The agent is gone: Caddy waits for it.
    node.kill_agent();
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy", "route-socket"], "{found:?}");
    assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
    node.start_agent();
    assert_eq!(findings(&node).await, []);

    // Caddy is gone.
    node.kill_caddy();
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy"], "{found:?}");
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("pve-sandbox-ingress")));
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // A configuration that is newer than the Caddy that runs: that has another proof.
    put_back(&node);
    let later = fs::metadata(&config).and_then(|about| about.modified()).expect("a time");
    let file = fs::File::options().write(true).open(&config).expect("opened");
    file.set_modified(later + Duration::from_secs(30)).expect("set");
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy-config"], "{found:?}");
    assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
    file.set_modified(later).expect("set");
    node.kill_caddy();
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // Another server on its port.
    node.kill_caddy();
    let other = tokio::net::TcpListener::bind(node.public).await.expect("free");
    let serving = tokio::spawn(async move {
        let (stream, _) = other.accept().await.expect("somebody");
        node::greet(stream).await;
    });
    let found = findings(&node).await;
    assert!(
        found[0].remedy.as_deref().is_some_and(|text| text.starts_with("ss -ltnp")),
        "{found:?}"
    );
    serving.await.expect("ended");
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // Another Caddy on its port, which starts without an error.
    let other = node.dir.join("other.json");
    fs::copy(&config, &other).expect("copied");
    let mut stray = node::run_caddy(&other, &node.dir);
    let mut found = Vec::new();
    for _ in 0..500 {
        found = findings(&node).await;
        if !found.is_empty() {
            break;
        }
    }
    assert_eq!(names(&found), ["caddy-listeners"], "{found:?}");
    assert!(found[0].found.contains("other.json"), "{found:?}");
    stray.kill().expect("a child");
    stray.wait().expect("ended");
    assert_eq!(findings(&node).await, []);

    // Somebody has changed it by hand, and the agent has put it back.
    fs::create_dir_all(node.dir.join("run")).expect("made");
    let now_ms = SystemClock::default().now_ms();
    let edits = HandEdits::load(node.dir.join("run").join(hand_edits::FILE), now_ms);
    edits.put_back(&config, now_ms);
    let found = findings(&node).await;
    assert_eq!(names(&found), ["hand-edit"], "{found:?}");
    assert_eq!(found[0].subject, config.display().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_sees_what_is_wrong_with_the_configuration_of_caddy() {
    need_caddy!();
    let mut node = Node::start(1).await;
    configure(&node, "");
    let config = node.dir.join("caddy.json");
    put_back(&node);
    node.kill_caddy();
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // No configuration.
    fs::remove_file(&config).expect("removed");
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy-config"], "{found:?}");
    assert!(found[0].found.starts_with("missing"), "{found:?}");
    assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
    put_back(&node);
    node.kill_caddy();
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // One that Caddy refuses: the agent has left the reason.
    let problem = node.dir.join("run/ingress-problem");
    fs::create_dir_all(node.dir.join("run")).expect("made");
    fs::write(&problem, "Caddy refuses it").expect("written");
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy-config"], "{found:?}");
    assert_eq!(found[0].found, "Caddy refuses it");
    fs::remove_file(&problem).expect("mended");
    assert_eq!(findings(&node).await, []);

    // The agent's configuration has another domain since.
    let file = node.dir.join("agent.toml");
    let text = fs::read_to_string(&file).expect("read");
    fs::write(&file, text.replace(DOMAIN, "other.test")).expect("written");
    let found = findings(&node).await;
    assert_eq!(names(&found), ["caddy", "caddy-config"], "{found:?}");
    assert!(found[0].found.contains("another domain"), "{found:?}");
    assert_eq!(found[0].remedy.as_deref(), Some("systemctl restart pve-sandbox-agent"));
    fs::write(&file, text).expect("written");
    assert_eq!(findings(&node).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_judges_a_certificate_of_ones_own_and_its_listener() {
    need_caddy!();
    let ca = Ca::new();
    let wildcard = ca.issue(&format!("*.{DOMAIN}"));
    let mut secure = None;
    let mut node = Node::shaped(1, None, |settings| {
        let dir = Path::new(settings.route_socket.as_str()).parent().expect("a directory");
        let dir = dir.to_owned();
        own_certificate::put(&dir, &wildcard);
        own_certificate::copy(settings, &dir);
        secure.clone_from(&settings.secure);
    })
    .await;
    let file = |name: &str| node.dir.join(name).display().to_string();
    let (cert, key) = (file("own.crt"), file("own.key"));
    let text = format!(
        "[ingress.certificate]\ncert = \"{cert}\"\nkey = \"{key}\"\nlisten = [\"{}\"]\nredirect = \"{}\"\n",
        own_certificate::listen(),
        node::at(1, 8080)
    );
    configure(&node, &text);
    let config = node.dir.join("caddy.json");
    let proof = caddy::Proof::ensure(&config).expect("a proof");
    let wanted = Settings { secure, ..settings(&node) };
    caddy::put(&config, &caddy::text(&wanted, &proof), None).expect("written");
    node.kill_caddy();
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);

    // One for other hosts.
    let dir = node.dir.clone();
    own_certificate::put(&dir, &ca.issue("*.example.com"));
    let found = findings(&node).await;
    assert_eq!(names(&found), ["web-certificate"], "{found:?}");
    assert!(found[0].found.contains("not for *.sbx.test"), "{found:?}");
    assert!(found[0].remedy.as_deref().is_some_and(|text| text.contains("within a minute")));
    // The key of another one, which everybody can read.
    own_certificate::put(&dir, &wildcard);
    fs::write(&key, ca.issue("*.example.com").1).expect("written");
    fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("set");
    let found = findings(&node).await;
    assert_eq!(names(&found), ["web-certificate", "web-certificate"], "{found:?}");
    assert_eq!(found[0].remedy, Some(format!("chmod 0640 {key}")));
    assert!(found[1].found.contains("not the key of the certificate"), "{found:?}");
    own_certificate::put(&dir, &wildcard);
    assert_eq!(findings(&node).await, []);

    // Something else in the place of Caddy, and then nothing.
    node.kill_caddy();
    let other = tokio::net::TcpListener::bind(own_certificate::listen()).await.expect("free");
    let serving = tokio::spawn(async move {
        let (stream, _) = other.accept().await.expect("somebody");
        node::greet(stream).await;
    });
    let found = findings(&node).await;
    let of_listener = |found: &[Check]| {
        let listener = own_certificate::listen().to_string();
        let check = found.iter().find(|check| check.name == "caddy" && check.subject == listener);
        check.expect("a finding").found.clone()
    };
    assert!(of_listener(&found).contains("no https"), "{found:?}");
    serving.await.expect("ended");
    let found = findings(&node).await;
    assert!(of_listener(&found).contains("nothing listens"), "{found:?}");
    node.start_caddy().await;
    assert_eq!(findings(&node).await, []);
}
