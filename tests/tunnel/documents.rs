//! Every command of docs/tunnel.md, in its order, on a node with a journal: as it stands there, but for the places of
//! files and addresses. And what `tunnel test` says of each part of the way.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use agent::{
    commands::{Cli, Command},
    journal::{Intent, Journal as _, Phase, Pools, Record, SqliteJournal},
    tunnel::command::{self, Host},
};
use clap::Parser as _;
use proto::id::{SandboxId, Vmid};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    cloud::{Cloud, TOKEN},
    world::World,
};

/// Answers of the edge and of Caddy for the public port, which a test changes.
type Script = Arc<Mutex<String>>;

const HELLO: &str = "HTTP/1.1 200 OK\r\ncf-ray: 1\r\ncontent-length: 5\r\n\r\nhello";

/// The agent's answer for the guarded port, as it comes through Cloudflare.
const ASKS_FOR_ACCESS: &str = "HTTP/1.1 401 X\r\ncf-ray: 1\r\ncontent-type: application/json\r\n\
    cache-control: no-store\r\nvary: Accept\r\naccess-control-allow-origin: *\r\nwww-authenticate: Sbx-Token\r\n\
    content-length: 31\r\n\r\n{\"code\":401,\"message\":\"a link\"}";
/// Port that is guarded.
const GUARDED: u16 = 8001;

/// A node whose agent has a journal with two sandboxes: 100001 with a public and a guarded port, 100002 with none.
pub(crate) struct Installed {
    pub(crate) world: World,
    pub(crate) cloud: Cloud,
    env: fn(&str) -> Option<String>,
    edge: SocketAddr,
    edge_says: Script,
    caddy_says: Script,
}

impl Installed {
    pub(crate) async fn start() -> Self {
        let (world, cloud) = (World::with_real(), Cloud::start().await);
        for dir in ["pve/nodes/n1/lxc", "net/vmbr1/bridge", "state", "run"] {
            fs::create_dir_all(world.file(dir)).expect("made");
        }
        let write = |name: &str, text: &str| fs::write(world.file(name), text).expect("written");
        write("pve/.members", "{\"nodename\":\"n1\",\"version\":0}");
        write("cloudflare-token", &format!("{TOKEN}\n"));
        let (edge_says, caddy_says): (Script, Script) = (script(HELLO), script(HELLO));
        let caddy = plain(Arc::clone(&caddy_says)).await;
        let path = |name: &str| world.file(name).display().to_string();
        let text = format!(
            "state_dir = \"{}\"\nrun_dir = \"{}\"\n[pve]\nroot = \"{}\"\n[network]\nbridge = \"vmbr1\"\n\
             gateway = \"10.100.1.1\"\npool = \"10.100.1.0/24\"\n[ingress]\npublic = [\"{caddy}\"]\n",
            path("state"),
            path("run"),
            path("pve"),
        );
        write("agent.toml", &text);
        let edge = tls(Arc::clone(&edge_says), &world.file("edge-ca.crt")).await;
        journal(&world.file("state/journal.sqlite")).await;
        Self { world, cloud, env: |_| None, edge, edge_says, caddy_says }
    }

    /// Makes one with variables of the environment.
    pub(crate) async fn with(env: fn(&str) -> Option<String>) -> Self {
        Self { env, ..Self::start().await }
    }

    /// Runs a command line of the docs; returns what it said, and whether all is right.
    pub(crate) async fn run(&self, line: &str) -> (String, anyhow::Result<bool>) {
        let path = |name: &str| self.world.file(name).display().to_string();
        let line = line.replace("/root/cloudflare-token", &path("cloudflare-token"));
        let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mut add = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
        add("--config", path("agent.toml"));
        match line.split_whitespace().nth(2) {
            Some("test") => {
                add("--ca", path("edge-ca.crt"));
                add("--edge", self.edge.to_string());
            }
            Some("setup") => {
                add("--api", self.cloud.base.clone());
                add("--metrics", self.world.metrics.to_string());
            }
            _ => add("--api", self.cloud.base.clone()),
        }
        let cli = Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{line}: {error}"));
        let Command::Tunnel { command } = cli.command else {
            panic!("{line} is no command of the tunnel")
        };
        let host = Host {
            net: self.world.file("net"),
            env: self.env,
            paths: Some(self.world.node.paths().clone()),
        };
        let mut said = String::new();
        let mut say = |line: &str| {
            said.push_str(line);
            said.push('\n');
        };
        let done = command::execute(&command, &host, &mut say).await;
        assert!(!said.contains(TOKEN), "{said}");
        (said, done)
    }

    /// Asks `tunnel test` while edge and Caddy answer like this; returns the verdict on the public port.
    async fn verdict(&self, edge: &str, caddy: &str) -> (String, String) {
        *self.edge_says.lock().expect("not poisoned") = edge.to_owned();
        *self.caddy_says.lock().expect("not poisoned") = caddy.to_owned();
        let (said, done) = self.run("pve-sandbox-agent tunnel test 100001 --json").await;
        done.expect("tested");
        let report: Value = serde_json::from_str(&said).expect("JSON");
        let checks = report["checks"].as_array().expect("a list");
        assert_eq!(checks.len(), 2, "each port once: {report}");
        let text = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
        let of = |start: &str| {
            let is_it = |check: &&Value| text(check, "subject").starts_with(start);
            checks.iter().find(is_it).unwrap_or_else(|| panic!("{start}: {report}"))
        };
        of("app https://port-8001-pvelxc-");
        let check = of("web https://port-8000-pvelxc-");
        (text(check, "name"), text(check, "state"))
    }
}

fn script(text: &str) -> Script {
    Arc::new(Mutex::new(text.to_owned()))
}

async fn journal(path: &Path) {
    let vmid = |number: u32| Vmid::try_from(number).expect("in range");
    let pools = Pools {
        vmids: (vmid(100_001), vmid(100_009)),
        addresses: ([10, 100, 1, 2].into(), [10, 100, 1, 9].into()),
        address_quarantine_ms: 0,
    };
    let journal = SqliteJournal::open(path, pools).expect("opens");
    let services = json!({ "web": 8000, "www": 8000 });
    let app = json!({ "visibility": "team", "generation": 1, "names": ["app"] });
    let guarded = json!({ GUARDED.to_string(): app });
    for record in [record(1, &services, &guarded), record(2, &json!({}), &json!({}))] {
        let intent = Intent {
            record,
            lease_address: false,
            taken: Default::default(),
            taken_ips: Default::default(),
        };
        let record = journal.begin(intent, 0).await.expect("begun");
        journal.update(&Record { phase: Phase::Running, ..record }).await.expect("running");
    }
}

/// Returns a record as a file of this version has it: fields of later versions have their defaults.
fn record(number: u8, services: &Value, guarded: &Value) -> Record {
    let id = SandboxId::new(1, &[number; 10]).to_string();
    let record = json!({
        "id": id, "vmid": 100, "template": 9000, "team": "acme", "request_id": format!("r-{number}"),
        "body_digest": "0", "attempt": 1, "phase": "creating", "step": "queued", "snapshot": "base",
        "size": { "cpu_cores": 1, "memory_mib": 512, "disk_gib": 0 }, "network": "dhcp", "ip": null,
        "services": services, "access": { "ports": guarded, "generation": 1 }, "metadata": {},
        "env": {}, "boot": 0, "created_ms": 0,
        "started_ms": 0, "ended_ms": 0, "failure": null, "revision": 0,
    });
    serde_json::from_value(record).expect("a record")
}

/// Answers each request with the script, for the guarded port as the agent does.
async fn say(mut stream: impl tokio::io::AsyncRead + AsyncWrite + Unpin, says: Script) {
    let mut request = [0; 4096];
    let length = stream.read(&mut request).await.unwrap_or_default();
    if length > 0 {
        let request = String::from_utf8_lossy(&request[..length]).to_ascii_lowercase();
        let is_guarded = request.contains(&format!("host: port-{GUARDED}-"));
        let text = match is_guarded {
            true => ASKS_FOR_ACCESS.to_owned(),
            false => says.lock().expect("not poisoned").clone(),
        };
        stream.write_all(text.as_bytes()).await.ok();
        stream.shutdown().await.ok();
    }
}

async fn plain(says: Script) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(say(stream, Arc::clone(&says)));
        }
    });
    address
}

/// Serves with a certificate for the names one label below example.com, as Cloudflare's edge has one.
async fn tls(says: Script, ca: &Path) -> SocketAddr {
    let issued = rcgen::generate_simple_self_signed(vec!["*.example.com".into()]).expect("made");
    fs::write(ca, issued.cert.pem()).expect("written");
    let key = issued.signing_key.serialize_der();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)
        .expect("a certificate");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, says) = (acceptor.clone(), Arc::clone(&says));
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    say(stream, says).await;
                }
            });
        }
    });
    address
}

/// Commands of docs/tunnel.md.
fn commands() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tunnel.md");
    let text = fs::read_to_string(path).expect("the page");
    let lines = text.lines().filter_map(|line| line.strip_prefix("# pve-sandbox-agent "));
    lines.map(|line| format!("pve-sandbox-agent {line}")).collect()
}

#[tokio::test]
async fn every_command_of_the_page_does_what_the_page_says() {
    let node = Installed::start().await;
    let commands = commands();
    assert!(commands.len() >= 9, "the page was misread: {commands:?}");
    for line in &commands {
        node.cloud.calls();
        let (said, done) = node.run(line).await;
        let is_right = done.unwrap_or_else(|error| panic!("{line}: {error:#}\n{said}"));
        assert!(is_right, "{line}: {said}");
        if line.contains("--dry-run") {
            assert_eq!(node.cloud.writes(), [""; 0], "{line}");
        }
        if line.contains(" test ") {
            // Without the breaks of the lines.
            let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words.contains("the sandbox answers (200)"), "{said}");
            assert!(words.contains("it asks for access, as a `team` port should (401)"), "{said}");
        }
    }
    // All of it is gone by the last one, and the operator's file has the domain.
    assert_eq!((node.cloud.records(), node.cloud.state().tunnels.len()), (vec![], 0));
    assert!(!node.world.node.paths().dir.exists());
    let config = fs::read_to_string(node.world.file("agent.toml")).expect("read");
    assert!(config.contains("domain = \"example.com\""), "{config}");
}

#[tokio::test]
async fn test_of_a_sandbox_says_where_its_requests_end() {
    let node = Installed::start().await;
    node.run(
        "pve-sandbox-agent tunnel setup --domain example.com --token-file /root/cloudflare-token",
    )
    .await
    .1
    .expect("set up");
    let page = |status: &str, body: &str| {
        format!("HTTP/1.1 {status} X\r\ncf-ray: 1\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let refusal = |status: &str, body: &str| {
        let head = "content-type: text/plain; charset=utf-8\r\ncache-control: no-store\r\naccess-control-allow-origin: *";
        format!(
            "HTTP/1.1 {status} X\r\ncf-ray: 1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    for (edge, place, state) in [
        (HELLO.to_owned(), "sandbox", "ok"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nparked".to_owned(), "dns", "failed"),
        (page("530", "error code: 1016"), "dns", "failed"),
        (page("530", "error code: 1033"), "edge", "failed"),
        ("nonsense\r\n\r\n".to_owned(), "edge", "failed"),
        (
            page("502", "Unable to reach the origin service. The service may be down"),
            "cloudflared",
            "failed",
        ),
        (page("404", ""), "cloudflared", "failed"),
        (refusal("404", "this host is no sandbox\n"), "caddy", "failed"),
        (refusal("403", "port 8000 of this sandbox is not exposed\n"), "caddy", "failed"),
        (refusal("502", "nothing listens on port 8000 in the sandbox\n"), "sandbox", "failed"),
        (page("500", "my own"), "sandbox", "warning"),
    ] {
        assert_eq!(
            node.verdict(&edge, HELLO).await,
            (place.to_owned(), state.to_owned()),
            "{edge}"
        );
    }
    // A certificate that is not for the name: one label deeper.
    let config = node.world.file("agent.toml");
    let text = fs::read_to_string(&config).expect("read").replace("example.com", "a.example.com");
    fs::write(&config, text).expect("written");
    assert_eq!(node.verdict(HELLO, HELLO).await, ("edge".to_owned(), "failed".to_owned()));
    let error = async |id: u32| {
        let (_, done) = node.run(&format!("pve-sandbox-agent tunnel test {id}")).await;
        done.expect_err("nothing to test").to_string()
    };
    let told = error(100_002).await;
    assert!(told.contains("no open port") && told.contains(" PORT --name NAME"), "{told}");
    let told = error(100_003).await;
    assert!(told.contains("no sandbox 100003"), "{told}");
}

#[tokio::test]
async fn contradiction_of_domains_and_a_missing_token_are_told() {
    let node = Installed::start().await;
    let told = async |line: &str| format!("{:#}", node.run(line).await.1.expect_err(line));
    let text = told("pve-sandbox-agent tunnel setup --token-file /root/cloudflare-token").await;
    assert!(text.contains("give --domain"), "{text}");
    let text = told("pve-sandbox-agent tunnel setup --domain example.com").await;
    assert!(text.contains("--token-file FILE") && text.contains("CF_API_TOKEN"), "{text}");
    let forbidden = "pve-sandbox-agent tunnel setup --domain example.com --token-file /root/cloudflare-token \
                     --controller-host api.example.com --controller-address 127.0.0.1";
    for (port, what) in [("8006", "PVE's API"), ("85", "PVE's daemon"), ("7445", "the agent's")] {
        let text = told(&format!("{forbidden}:{port}")).await;
        assert!(text.contains(what), "{text}");
    }
    node.run(
        "pve-sandbox-agent tunnel setup --domain example.com --token-file /root/cloudflare-token",
    )
    .await
    .1
    .expect("set up");
    let text = told(
        "pve-sandbox-agent tunnel setup --domain example.org --token-file /root/cloudflare-token",
    )
    .await;
    assert!(text.contains("is example.com, and not example.org"), "{text}");
}
