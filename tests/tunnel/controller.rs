//! The controller's API behind the tunnel: a gRPC-Web call passes a connector that follows the rule that `setup`
//! writes, over HTTP/1.1 and a TLS connection that the CA in the rule vouches for.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use agent::tunnel::{settings, setup::Order};
use controller::{
    Controller,
    ca::{self, Own},
};
use daemon::tls::ClientAuth;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    cloud::Cloud,
    served,
    world::{World, host},
};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(20);
/// Most bytes of an answer that are read.
const ANSWER_MAX: u64 = 64 * 1024;
/// Life of the controller's certificate.
const LIFE: Duration = Duration::from_secs(3600);
/// Public name of the controller.
const API: &str = "api.example.com";

/// A controller as its program runs it, with a caller's token.
struct Served {
    address: SocketAddr,
    ca: PathBuf,
    token: String,
    _controller: Controller,
    _dir: tempfile::TempDir,
    _stop: DropGuard,
}

impl Served {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (files, _) = ca::init(dir.path(), &[]).expect("a CA");
        let ca = files.ca();
        let live = Own { files, life: LIFE }.load().expect("identity");
        let (controller, token) = served::controller(&live).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let server = live.server(ClientAuth::None).expect("TLS");
        let incoming = daemon::listen::tls(listener, server, stop.clone());
        tokio::spawn(controller.api().serve(incoming, stop.clone().cancelled_owned()));
        Self { address, ca, token, _controller: controller, _dir: dir, _stop: stop.drop_guard() }
    }
}

/// Rule of a host in cloudflared's configuration.
struct Rule {
    /// Host and port of the origin, which is asked over TLS.
    origin: String,
    ca: PathBuf,
}

impl Rule {
    fn of(config: &str, host: &str) -> Self {
        let rule = config.split_once(&format!("- hostname: \"{host}\"\n"));
        let (_, rule) = rule.unwrap_or_else(|| panic!("{host}: {config}"));
        let value = |key: &str| {
            let found = rule.lines().find_map(|line| line.trim().strip_prefix(key));
            found.unwrap_or_else(|| panic!("{key}: {config}")).trim_matches('"').to_owned()
        };
        let service = value("service: ");
        let origin = service.strip_prefix("https://").expect("TLS").to_owned();
        Self { origin, ca: value("caPool: ").into() }
    }
}

/// Passes connections on by a rule. As cloudflared does, it speaks HTTP/1.1 with the origin, and wants a certificate
/// for the host of the rule's service.
async fn connector(rule: Rule) -> SocketAddr {
    let tls = daemon::tls::client_of_the_web(Some(&rule.ca)).expect("a CA");
    let tls = tokio_rustls::TlsConnector::from(tls);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut edge, _)) = listener.accept().await {
            let origin = TcpStream::connect(&rule.origin).await.expect("the origin listens");
            let (name, _) = rule.origin.rsplit_once(':').expect("host and port");
            let name = ServerName::try_from(name.to_owned()).expect("a name");
            let mut origin = tls.connect(name, origin).await.expect("the CA vouches for it");
            copy_bidirectional(&mut edge, &mut origin).await.ok();
        }
    });
    address
}

/// Calls the API by gRPC-Web, as a browser does through the edge; returns the whole answer.
async fn call(connector: SocketAddr, token: Option<&str>) -> String {
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    // One message without a field: no flags, and a length of 0.
    let request = format!(
        "POST /sandbox.v1.OperatorService/ListNodes HTTP/1.1\r\nhost: {API}\r\n{token}\
         content-type: application/grpc-web+proto\r\nx-grpc-web: 1\r\ncf-ray: 1\r\nx-forwarded-proto: https\r\n\
         content-length: 5\r\nconnection: close\r\n\r\n\0\0\0\0\0"
    );
    let exchange = async {
        let mut stream = TcpStream::connect(connector).await.expect("the connector listens");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        // Not each server ends TLS in order after the last byte.
        stream.take(ANSWER_MAX).read_to_end(&mut answer).await.ok();
        String::from_utf8_lossy(&answer).into_owned()
    };
    timeout(LIMIT, exchange).await.expect("an answer in time")
}

#[tokio::test]
async fn grpc_web_call_passes_a_connector_that_follows_the_rendered_rule() {
    let (served, cloud) = (Served::start().await, Cloud::start().await);
    let mut world = World::new();
    world.origin.ca.clone_from(&served.ca);
    let controller = settings::Controller {
        host: host(API),
        address: served.address.to_string().parse().expect("an address"),
    };
    let order = Order { controller: Some(controller), start: false, ..world.order() };
    world.setup(&cloud, &order).await.1.expect("set up");
    let config = fs::read_to_string(world.node.paths().config()).expect("read");
    let connector = connector(Rule::of(&config, API)).await;

    let answer = call(connector, Some(&served.token)).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let trailer = answer.contains("application/grpc-web+proto") && answer.contains("grpc-status:0");
    assert!(trailer, "{answer}");
    // Whoever comes through the tunnel needs a token, too.
    let answer = call(connector, None).await;
    assert!(answer.replace(": ", ":").contains("grpc-status:16"), "{answer}");
}
