//! Requests in forms that nobody would send by mistake, made by a seeded generator.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use agent::ingress::Owner;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    http::get,
    node::{DOMAIN, Node, at, host, host_by_id, need_caddy},
    peers::{Pki, two},
    sandbox::Sandbox,
};

/// Requests of each corpus.
const REQUESTS: usize = 1200;
/// Requests of each corpus over two nodes.
const HOP_REQUESTS: usize = 400;
/// Requests at once.
const AT_ONCE: usize = 48;
const SEED: u64 = 0x5eed_0029;

/// Generator of numbers (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % u64::try_from(end).expect("small")).expect("small")
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

/// Sends bytes on a connection of their own; returns the beginning of all that comes back. The answer to
/// an unfinished request never comes: `patience` ends the wait.
async fn send(
    node: &Node,
    permits: &Arc<Semaphore>,
    (bytes, patience): (Vec<u8>, Duration),
) -> impl Future<Output = String> + use<> {
    let permit = Arc::clone(permits).acquire_owned().await.expect("open");
    let public = node.public;
    async move {
        let _permit = permit;
        let mut stream = TcpStream::connect(public).await.expect("connected");
        // Caddy may close it early.
        drop(stream.write_all(&bytes).await);
        let mut answer = Vec::new();
        let mut read = stream.take(16 * 1024);
        drop(timeout(patience, read.read_to_end(&mut answer)).await);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// Changes a host name in one to three places.
fn mutate(chance: &mut Chance, host: &str) -> Vec<u8> {
    const PIECES: &[&str] = &[
        "",
        ".",
        "..",
        "-",
        "--",
        "0",
        "00",
        "9",
        "vm-",
        "port-",
        "_",
        "%2e",
        "%00",
        "@",
        ":80",
        ":0",
        ":99999",
        "/",
        "\\",
        "#",
        "?",
        " ",
        "\t",
        "\u{e9}",
        "\u{ff0e}",
        "\u{430}",
        "x",
        "A",
        "evil.test",
        ",",
        ";",
        "'",
        "\"",
        "[::1]",
        "127.0.0.1",
        "localhost",
        "{http.request.host}",
        "{env.HOME}",
        "*",
        "$",
        "|",
    ];
    let mut bytes = host.as_bytes().to_vec();
    for _ in 0..=chance.below(3) {
        let at = chance.below(bytes.len() + 1);
        match chance.below(6) {
            0 => drop(bytes.splice(at..at, chance.of(PIECES).bytes()).collect::<Vec<_>>()),
            1 if at < bytes.len() => {
                bytes[at] = u8::try_from(0x20 + chance.below(0x5f)).expect("ASCII")
            }
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => bytes.truncate(at.max(1)),
            4 => drop(bytes.splice(0..0, chance.of(PIECES).bytes()).collect::<Vec<_>>()),
            _ => bytes.extend(chance.of(PIECES).bytes()),
        }
    }
    bytes.retain(|byte| !matches!(byte, b'\r' | b'\n'));
    bytes
}

/// Only the names of a sandbox reach it, in any case and with any port behind.
#[tokio::test(flavor = "multi_thread")]
async fn mutated_hosts_reach_a_sandbox_only_by_its_own_name() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.table.name(100_001, "box--red", Some(8000));
    let reached = send_mutated_hosts(&node, &sandbox, REQUESTS).await;
    assert!(reached < REQUESTS / 4, "most are changed: {reached}");
}

/// The same over the connections that two nodes share.
#[tokio::test(flavor = "multi_thread")]
async fn mutated_hosts_over_a_hop_reach_a_sandbox_only_by_its_own_name() {
    need_caddy!();
    let pki = Pki::new();
    let hop = Hop::start(&pki).await;
    hop.owner.table.name(100_001, "box--red", Some(8000));
    hop.edge.table.told("box--red", 100_001);
    let honest = Honest::start(hop.edge.public);
    let reached = send_mutated_hosts(&hop.edge, &hop.alpha, HOP_REQUESTS).await;
    honest.end().await;
    assert!(reached < HOP_REQUESTS / 2, "most are changed: {reached}");
}

/// Two nodes: sandbox 100001 and its neighbour are on the second one.
#[derive(Debug)]
struct Hop {
    edge: Node,
    owner: Node,
    alpha: Sandbox,
    _neighbour: Sandbox,
}

/// Number of the neighbour.
const NEIGHBOUR: u32 = 100_002;

impl Hop {
    async fn start(pki: &Pki) -> Self {
        let (edge, owner) = two(pki).await;
        let alpha = Sandbox::start(at(10, 8000), "alpha").await;
        let neighbour = Sandbox::start(at(11, 8000), "neighbour").await;
        for (number, sandbox) in [(100_001, &alpha), (NEIGHBOUR, &neighbour)] {
            owner.put(number, sandbox.address);
            edge.table.elsewhere(number, Owner::Peer(owner.peer));
        }
        Self { edge, owner, alpha, _neighbour: neighbour }
    }
}

/// Clients of the neighbour. What they get is the answer to what they asked, whatever else is sent over the
/// connections between the nodes.
#[derive(Debug)]
struct Honest {
    stop: CancellationToken,
    clients: JoinSet<usize>,
}

impl Honest {
    fn start(public: SocketAddr) -> Self {
        let (stop, mut clients) = (CancellationToken::new(), JoinSet::new());
        for client in 0..4 {
            clients.spawn(ask_neighbour(public, client, stop.clone()));
        }
        Self { stop, clients }
    }

    /// Ends them. Each was answered, and none wrongly.
    async fn end(self) {
        self.stop.cancel();
        for answered in self.clients.join_all().await {
            assert!(answered > 0, "a client got no answer");
        }
    }
}

/// Asks for the neighbour until `stop`; returns the number of answers.
async fn ask_neighbour(public: SocketAddr, client: usize, stop: CancellationToken) -> usize {
    let (host, mut answered) = (host(8000, NEIGHBOUR), 0);
    while !stop.is_cancelled() {
        let path = format!("/honest/{client}/{answered}");
        let answer = get(public, &host, &path).await;
        let expected = format!("neighbour got GET {path} HTTP/1.1 ");
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(answer.text().starts_with(&expected), "{path}: {}", answer.text());
        answered += 1;
    }
    answered
}

/// Sends requests with mutated hosts; returns the number of those that reached the sandbox, which have its own.
async fn send_mutated_hosts(node: &Node, sandbox: &Sandbox, requests: usize) -> usize {
    let by_name = |label: &str| format!("{label}.{DOMAIN}");
    let names = [
        host(8000, 100_001),
        host_by_id(8000, 100_001),
        by_name("port-8000-box--red"),
        by_name("8000-box--red"),
        by_name("box--red"),
    ];
    let good: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let is_good = |host: &[u8]| {
        let host = String::from_utf8_lossy(host).to_ascii_lowercase();
        let host = host.trim_matches([' ', '\t']);
        let bare = host.split_once(':').map_or(host, |(name, _)| name);
        good.contains(bare)
    };
    let mut chance = Chance(SEED);
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut all = JoinSet::new();
    for _ in 0..requests {
        let name = &names[chance.below(names.len())];
        let mutated = mutate(&mut chance, name);
        let request =
            [b"GET /m HTTP/1.1\r\nHost: ", &mutated[..], b"\r\nConnection: close\r\n\r\n"].concat();
        let answer = send(node, &permits, (request, Duration::from_secs(20))).await;
        all.spawn(async move { (mutated, answer.await) });
    }
    let mut reached = 0;
    while let Some(done) = all.join_next().await {
        let (host, answer) = done.expect("no panic");
        let is_served = answer.contains("alpha got");
        assert!(!is_served || is_good(&host), "{:?}: {answer}", String::from_utf8_lossy(&host));
        assert!(!answer.is_empty(), "no answer to {:?}", String::from_utf8_lossy(&host));
        reached += usize::from(is_served);
    }
    assert_eq!(sandbox.got().len(), reached);
    // Caddy and the agent are as they were.
    assert_eq!(get(node.public, &names[0], "/").await.status, 200);
    reached
}

/// Number of the sandbox that smuggled requests are for. Where a client asks, nobody has it.
const NOT_THERE: u32 = 999_999;

/// Builds a request whose end is in doubt, with a second one inside of its body, for a sandbox that is not
/// there: who takes that one for a request of its own has been deceived.
fn smuggle(chance: &mut Chance, outer: &str) -> Vec<u8> {
    const LENGTHS: &[&str] = &[
        "",
        "Content-Length: 0\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 5, 0\r\n",
        "Content-Length: 0\r\nContent-Length: 5\r\n",
        "Content-Length : 5\r\n",
        " Content-Length: 5\r\n",
        "Content-Length: -1\r\n",
        "Content_Length: 5\r\n",
        "Content-Length:\r\n 5\r\n",
        "Content-Length: 99999999999999999999\r\n",
    ];
    const CODINGS: &[&str] = &[
        "",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding:\tchunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer_Encoding: chunked\r\n",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        "X: x\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding\r\n: chunked\r\n",
        "transfer-encoding: Chunked\r\n",
        "Transfer-Encoding: \u{b}chunked\r\n",
        "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTrailer: Host\r\n",
    ];
    const STARTS: &[&str] = &[
        "0\r\n\r\n",
        "5\r\nabcde\r\n0\r\n\r\n",
        "5;x=\n\r\nabcde\r\n0\r\n\r\n",
        "abcde",
        "0\n\n",
        "00000005\r\nabcde\r\n0\r\nHost: x\r\n\r\n",
        "",
    ];
    const VERSIONS: &[&str] =
        &["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.1 ", "http/1.1"];
    const METHODS: &[&str] = &["POST", "GET", "PUT", "OPTIONS", "PRI", "POST "];
    let (length, coding) = (chance.of(LENGTHS), chance.of(CODINGS));
    let both = if chance.below(2) == 0 {
        format!("{length}{coding}")
    } else {
        format!("{coding}{length}")
    };
    let (method, version, start) = (chance.of(METHODS), chance.of(VERSIONS), chance.of(STARTS));
    let inner = format!(
        "GET /smuggled HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
        host(8000, NOT_THERE)
    );
    format!("{method} /outer {version}\r\nHost: {outer}\r\n{both}\r\n{start}{inner}").into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn smuggled_requests_never_reach_a_sandbox() {
    need_caddy!();
    let node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let served = send_smuggled(&node, &sandbox, REQUESTS).await;
    assert!(served > 50, "some are plain requests: {served}");
}

/// The same over the connections that two nodes share: nothing in a body is a request to the second node.
#[tokio::test(flavor = "multi_thread")]
async fn requests_smuggled_over_a_hop_never_reach_a_sandbox() {
    need_caddy!();
    let pki = Pki::new();
    let hop = Hop::start(&pki).await;
    // Only the owner knows it, so a request for it can only have come out of another one.
    let trap = Sandbox::start(at(12, 8000), "trap").await;
    hop.owner.put(NOT_THERE, trap.address);
    let honest = Honest::start(hop.edge.public);
    let served = send_smuggled(&hop.edge, &hop.alpha, HOP_REQUESTS).await;
    honest.end().await;
    assert!(trap.got().is_empty(), "{:?}", trap.got());
    assert!(served > 5, "some are plain requests: {served}");
}

/// Sends requests that smuggle another one; returns the number of those that the sandbox answered.
async fn send_smuggled(node: &Node, sandbox: &Sandbox, requests: usize) -> usize {
    let host = host(8000, 100_001);
    let mut chance = Chance(SEED + 1);
    let permits = Arc::new(Semaphore::new(2 * AT_ONCE));
    let mut all = JoinSet::new();
    for _ in 0..requests {
        let request = smuggle(&mut chance, &host);
        let answer = send(node, &permits, (request.clone(), Duration::from_millis(400))).await;
        all.spawn(async move { (request, answer.await) });
    }
    let mut served = 0;
    while let Some(done) = all.join_next().await {
        let (_, answer) = done.expect("no panic");
        served += usize::from(answer.contains("alpha got"));
    }
    // Each request that the sandbox got is one that Caddy asked the agent about.
    let got = sandbox.got();
    for one in &got {
        assert!(one.head.line.contains(" /outer "), "{:?}", one.head);
        let framed = one.head.all("content-length").len() + one.head.all("transfer-encoding").len();
        assert!(framed <= 1, "its end is in doubt: {:?}", one.head);
    }
    assert_eq!(sandbox.questions(), 0);
    assert_eq!(get(node.public, &host, "/outer ok").await.status, 400);
    served
}
