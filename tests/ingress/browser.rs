//! Real web applications behind the ingress, looked at by a real browser that has them in a frame of
//! another site: `tests/browser`. On demand, because of what it installs: `make test-browser`.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use agent::{
    ingress::version::Generation,
    sandbox::access::credential::{Credential, Purpose},
};
use proto::{name::Port, visibility::Visibility};
use serde_json::json;
use tokio::{net::TcpStream, time::Instant};

use crate::{
    access::now_s,
    node::{Node, at, caddy, generation, host, id, ip, key, need_caddy},
};

/// Ports of the applications in tests/browser/apps.
const PORTS: [u16; 9] = [3000, 5173, 8001, 8888, 9776, 39378, 39380, 39383, 50051];
/// Applications that are also looked at with a port that only a session opens, and their ports: pages with assets,
/// WebSockets and workers.
const GUARDED: [(&str, u16); 3] = [("terminal", 39383), ("vite", 5173), ("vscode", 39378)];
/// Life of a link, seconds.
const LINK_S: u64 = 600;
/// Vmid of the sandbox.
const VMID: u32 = 100_001;

#[tokio::test(flavor = "multi_thread")]
async fn real_applications_work_in_a_frame_of_another_site() {
    if std::env::var_os("PVE_SANDBOX_BROWSER_TESTS").is_none() {
        eprintln!("not run: it needs PVE_SANDBOX_BROWSER_TESTS=1 and tests/browser/setup.sh");
        return;
    }
    need_caddy!();
    let node = Node::start(1).await;
    node.table.put(VMID, ip(2), agent::ingress::State::Running, &PORTS);
    let parent = at(1, 9000);
    let edge = Edge::start(&node, at(3, 8443), parent).await;
    let mut settings = json!({
        "ip": ip(2).to_string(),
        "edge": edge.address.to_string(),
        "host": host(0, VMID).replace("port-0-", "port-{port}-"),
        "certificate": node.dir.join("edge.crt"),
        "parent": parent.to_string(),
        "without": if generation() == Generation::Fixed { vec![] } else { vec!["grpc"] },
    });
    assert!(look(&node, &settings, &[]).await, "the applications above failed: {}", node.log());

    // The browser keeps a session for a frame of this one site alone.
    node.table.guard(VMID, Visibility::Team, 1);
    let links = GUARDED.map(|(_, port)| (port.to_string(), link(port).into()));
    settings["links"] = serde_json::Value::Object(links.into_iter().collect());
    let guarded = GUARDED.map(|(name, _)| name);
    assert!(look(&node, &settings, &guarded).await, "with a session: {}", node.log());
}

/// Signs a link to a port.
fn link(port: u16) -> String {
    let made = Credential {
        purpose: Purpose::Link,
        port: Port::try_from(u32::from(port)).expect("a port"),
        generation: 1,
        expires_s: now_s() + LINK_S,
        user: None,
    };
    made.sign(&key(VMID), &id(VMID))
}

/// Runs the browser on these applications; on all, if none is named. Returns false when one failed.
async fn look(node: &Node, settings: &serde_json::Value, named: &[&'static str]) -> bool {
    let config = node.dir.join("browser.json");
    std::fs::write(&config, settings.to_string()).expect("writable");
    let named = named.to_vec();
    tokio::task::spawn_blocking(move || run(&config, &named)).await.expect("it ran")
}

#[expect(clippy::disallowed_methods, reason = "tests start the browser themselves")]
fn run(config: &Path, named: &[&str]) -> bool {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("browser");
    let status = Command::new("node")
        .arg("run.mjs")
        .arg(config)
        .args(named)
        .current_dir(folder)
        .status()
        .expect("node is installed");
    status.success()
}

/// A server with TLS in front of the ingress, as a tunnel's edge is, which also serves the page of
/// another site.
#[derive(Debug)]
struct Edge {
    address: std::net::SocketAddr,
    caddy: Child,
}

impl Edge {
    #[expect(clippy::disallowed_methods, reason = "tests start Caddy themselves")]
    async fn start(
        node: &Node,
        address: std::net::SocketAddr,
        parent: std::net::SocketAddr,
    ) -> Self {
        let names = [format!("*.{}", crate::node::DOMAIN), "parent.test".to_owned()];
        let pair = rcgen::generate_simple_self_signed(names).expect("a certificate");
        let file = |name: &str, text: String| {
            let path = node.dir.join(name);
            std::fs::write(&path, text).expect("writable");
            path
        };
        let certificate = file("edge.crt", pair.cert.pem());
        let key = file("edge.key", pair.signing_key.serialize_pem());
        let to = |handler: std::net::SocketAddr| {
            json!({
                "handler": "reverse_proxy",
                "upstreams": [{ "dial": handler.to_string() }],
                "transport": { "protocol": "http", "versions": ["h2c", "1.1"] },
            })
        };
        let config = json!({
            "admin": { "disabled": true },
            "apps": {
                "http": { "servers": { "edge": {
                    "listen": [address.to_string()],
                    "automatic_https": { "disable": true },
                    "tls_connection_policies": [{}],
                    "routes": [
                        { "match": [{ "host": ["parent.test"] }], "terminal": true,
                          "handle": [http1(to(parent))] },
                        { "match": [{ "header": { "Content-Type": ["application/grpc*"] } }],
                          "terminal": true, "handle": [to(node.public)] },
                        { "handle": [http1(to(node.public))] },
                    ],
                } } },
                "tls": { "certificates": { "load_files": [
                    { "certificate": certificate, "key": key },
                ] } },
            },
        });
        let config = file("edge.json", config.to_string());
        let log = std::fs::File::create(node.dir.join("edge.log")).expect("a file");
        let caddy = Command::new(caddy().expect("not skipped"))
            .args([Path::new("run"), Path::new("--config"), &config])
            .env("HOME", &node.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("Caddy starts");
        let deadline = Instant::now() + std::time::Duration::from_secs(30);
        while TcpStream::connect(address).await.is_err() {
            assert!(Instant::now() < deadline, "the edge did not start");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        Self { address, caddy }
    }
}

/// Speaks HTTP/1.1 to the upstream, which WebSockets need.
fn http1(mut handler: serde_json::Value) -> serde_json::Value {
    handler["transport"]["versions"] = json!(["1.1"]);
    handler
}

impl Drop for Edge {
    fn drop(&mut self) {
        drop(self.caddy.kill());
        drop(self.caddy.wait());
    }
}
