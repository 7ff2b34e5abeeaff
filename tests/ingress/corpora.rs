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
    http2,
    node::{DOMAIN, Node, at, host, host_by_id, need_caddy},
    own_certificate::{self, Ca},
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
        Self::between(edge, owner).await
    }

    async fn between(edge: Node, owner: Node) -> Self {
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

/// Host names of the sandbox.
fn names() -> [String; 5] {
    let by_name = |label: &str| format!("{label}.{DOMAIN}");
    [
        host(8000, 100_001),
        host_by_id(8000, 100_001),
        by_name("port-8000-box--red"),
        by_name("8000-box--red"),
        by_name("box--red"),
    ]
}

/// Returns whether a host is one of the sandbox's names, in any case and with any port behind.
fn is_good(host: &[u8]) -> bool {
    let host = String::from_utf8_lossy(host).to_ascii_lowercase();
    let host = host.trim_matches([' ', '\t']);
    let bare = host.split_once(':').map_or(host, |(name, _)| name);
    names().iter().any(|name| name == bare)
}

/// Sends requests with mutated hosts; returns the number of those that reached the sandbox, which have its own.
async fn send_mutated_hosts(node: &Node, sandbox: &Sandbox, requests: usize) -> usize {
    let names = names();
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

/// Number of the sandbox that smuggled requests are for. No client asks for it.
const NOT_THERE: u32 = 999_999;

/// Returns a whole request, to be put where none belongs.
fn smuggled() -> String {
    let host = host(8000, NOT_THERE);
    format!("GET /smuggled HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

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
    const METHODS: &[&str] = &["POST", "GET", "PUT", "OPTIONS", "PRI", "POST ", "CONNECT"];
    let (length, coding) = (chance.of(LENGTHS), chance.of(CODINGS));
    let both = if chance.below(2) == 0 {
        format!("{length}{coding}")
    } else {
        format!("{coding}{length}")
    };
    let (method, version, start) = (chance.of(METHODS), chance.of(VERSIONS), chance.of(STARTS));
    let inner = smuggled();
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

/// Sends a request by HTTP/2, on a connection of its own. `None`: it was refused without an answer.
fn send_by_http_2(
    ca: &Ca,
    permits: &Arc<Semaphore>,
    request: http2::Request,
) -> impl Future<Output = (http2::Request, Option<http2::Answer>)> + use<> {
    let (config, permits) = (ca.client("h2"), Arc::clone(permits));
    async move {
        let _permit = permits.acquire_owned().await.expect("open");
        let stream = own_certificate::dial(&host(8000, 100_001), config).await;
        let answer = request.send(stream.expect("a connection")).await;
        (request, answer)
    }
}

fn is_served(answer: Option<&http2::Answer>) -> bool {
    answer.is_some_and(|answer| answer.body.starts_with("alpha got"))
}

/// Host that a request is for: the authority, and the field `host` only where there is none.
fn meant(request: &http2::Request) -> &str {
    let authority = request.value(":authority").filter(|authority| !authority.is_empty());
    authority.or_else(|| request.value("host")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_authorities_by_http_2_reach_a_sandbox_only_by_its_own_name() {
    need_caddy!();
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let node = own_certificate::start(&ca, dir.path(), None).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.table.name(100_001, "box--red", Some(8000));
    let (names, mut chance) = (names(), Chance(SEED + 2));
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut all = JoinSet::new();
    for name in &names {
        all.spawn(send_by_http_2(&ca, &permits, http2::Request::get(name, "/m")));
    }
    for _ in 0..REQUESTS {
        let name = &names[chance.below(names.len())];
        let mutated = mutate(&mut chance, name);
        let mutated = String::from_utf8_lossy(&mutated).into_owned();
        let own = &names[chance.below(names.len())];
        let mut request = http2::Request::get(&mutated, "/m");
        match chance.below(5) {
            0 => {
                request.remove(":authority");
                request.add("host", mutated);
            }
            1 => {
                request.set(":authority", "");
                request.add("host", mutated);
            }
            2 => request.add("host", own),
            3 => {
                request.set(":authority", own);
                request.add("host", mutated);
            }
            _ => {}
        }
        all.spawn(send_by_http_2(&ca, &permits, request));
    }
    let mut reached = 0;
    while let Some(done) = all.join_next().await {
        let (request, answer) = done.expect("no panic");
        if is_served(answer.as_ref()) {
            assert!(is_good(meant(&request).as_bytes()), "{request:?}: {answer:?}");
            reached += 1;
        }
    }
    assert_eq!(sandbox.got().len(), reached);
    assert!((names.len()..REQUESTS / 2).contains(&reached), "most are changed: {reached}");
}

/// Field by which a request is known again.
const NUMBER: &str = "x-number";

/// Changes of a request that no library makes, and those of them that are allowed.
const ODDITIES: &[fn(&mut http2::Request)] = &[
    |_| {},
    // Which host?
    |request| request.add("host", host(8000, NOT_THERE)),
    |request| request.add_first("host", host(8000, NOT_THERE)),
    |request| request.add("Host", host(8000, NOT_THERE)),
    |request| request.add("host:", host(8000, NOT_THERE)),
    |request| request.add(":authority", host(8000, NOT_THERE)),
    |request| request.add_first(":authority", host(8000, NOT_THERE)),
    |request| request.add("x-forwarded-host", host(8000, NOT_THERE)),
    |request| {
        let own = request.value(":authority").unwrap_or_default().to_owned();
        request.remove(":authority");
        request.add("host", own);
    },
    |request| {
        let own = request.value(":authority").unwrap_or_default().to_owned();
        request.set(":authority", "");
        request.add("host", own);
        request.add("host", host(8000, NOT_THERE));
    },
    |request| {
        let both = format!("{}, {}", host(8000, 100_001), host(8000, NOT_THERE));
        request.set(":authority", both);
    },
    |request| {
        let both = format!("{}\r\nHost: {}", host(8000, 100_001), host(8000, NOT_THERE));
        request.set(":authority", both);
    },
    // Pseudo-headers.
    |request| request.add(":path", "/smuggled"),
    |request| request.add(":method", "POST"),
    |request| request.add_first(":status", "200"),
    |request| request.add_first(":smuggled", "x"),
    |request| request.remove(":method"),
    |request| request.remove(":scheme"),
    |request| request.remove(":path"),
    |request| request.set(":scheme", "http"),
    |request| request.set(":scheme", format!("https://{}/smuggled?", host(8000, NOT_THERE))),
    |request| request.set(":path", ""),
    |request| request.set(":path", "*"),
    |request| request.set(":path", "smuggled"),
    |request| request.set(":path", format!("//{}/x", host(8000, NOT_THERE))),
    |request| request.set(":path", format!("https://{}/x", host(8000, NOT_THERE))),
    |request| request.set(":path", format!("x:https://{}/x", host(8000, NOT_THERE))),
    |request| request.set(":path", "/outer HTTP/1.1"),
    |request| request.set(":path", "/outer#fragment"),
    |request| request.set(":path", format!("/ HTTP/1.1\r\n\r\n{}", smuggled())),
    |request| request.set(":method", format!("{}GET", smuggled())),
    |request| request.set(":method", "GET /smuggled"),
    |request| request.set(":method", "get"),
    |request| request.set(":method", ""),
    // CONNECT: its body has no length by HTTP/1.1.
    |request| {
        request.set(":method", "CONNECT");
        request.remove(":scheme");
        request.remove(":path");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "CONNECT");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "CONNECT");
        request.add_first(":protocol", "websocket");
        request.body = Some(smuggled());
    },
    // Where does the body end?
    |request| {
        request.set(":method", "POST");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "POST");
        request.add("transfer-encoding", "chunked");
        request.body = Some(format!("0\r\n\r\n{}", smuggled()));
    },
    |request| {
        request.add("content-length", "0");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "POST");
        request.add("content-length", "5");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "POST");
        request.add("content-length", "500");
        request.body = Some(smuggled());
    },
    |request| {
        request.set(":method", "POST");
        request.add("content-length", "500");
    },
    |request| request.add("content-length", "+5"),
    |request| request.add("content-length", "-1"),
    |request| request.add("content-length", "5, 0"),
    |request| request.add("content_length", "5"),
    |request| request.add("transfer_encoding", "chunked"),
    |request| request.add("transfer-encoding ", "chunked"),
    |request| request.add("Transfer-Encoding", "chunked"),
    |request| request.body = Some("abcde".to_owned()),
    |request| {
        request.add("expect", "100-continue");
        request.body = Some("abcde".to_owned());
    },
    // Fields of a connection, and of ours.
    |request| request.add("connection", "close, x-number"),
    |request| request.add("upgrade", "h2c"),
    |request| request.add("keep-alive", "timeout=5"),
    |request| request.add("proxy-connection", "keep-alive"),
    |request| request.add("te", "trailers"),
    |request| request.add("te", "trailers, chunked"),
    |request| request.add("x-sbx-upstream", "127.0.0.1:1"),
    |request| request.add("X-Sbx-Kind", "local"),
    |request| request.add("x_sbx_user", "forged"),
    // Line ends in fields.
    |request| request.add("x-a", format!("b\r\n\r\n{}", smuggled())),
    |request| request.add("x-a", "b\nhost: x"),
    |request| request.add("x-a", "b\0c"),
    |request| request.add(&format!("x-a: b\r\n\r\n{}x", smuggled()), "b"),
    |request| request.add("x a", "b"),
    |request| request.add("", "b"),
    // Fields after the body.
    |request| request.trailers.push(("x-sbx-user".to_owned(), "forged".to_owned())),
    |request| request.trailers.push((":path".to_owned(), "/smuggled".to_owned())),
    |request| request.trailers.push(("host".to_owned(), host(8000, NOT_THERE))),
    |request| request.trailers.push(("content-length".to_owned(), "5".to_owned())),
];

/// Sends requests by HTTP/2, each with an oddity or two. What the sandbox gets is one of them, and what the trap gets is
/// one that two oddities together have made a request for it.
async fn send_odd(ca: &Ca, sandbox: &Sandbox, trap: &Sandbox, requests: usize) {
    let (own, mut chance) = (host(8000, 100_001), Chance(SEED + 3));
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut all = JoinSet::new();
    for number in 0..requests {
        let mut request = http2::Request::get(&own, "/outer");
        if let Some(alone) = ODDITIES.get(number) {
            alone(&mut request);
        } else {
            for _ in 0..2 {
                ODDITIES[chance.below(ODDITIES.len())](&mut request);
            }
        }
        request.add(NUMBER, number.to_string());
        all.spawn(send_by_http_2(ca, &permits, request));
    }
    let (mut served, mut for_the_trap) = (0, BTreeSet::new());
    while let Some(done) = all.join_next().await {
        let (request, answer) = done.expect("no panic");
        served += usize::from(is_served(answer.as_ref()));
        if meant(&request) == host(8000, NOT_THERE) {
            for_the_trap.extend(request.value(NUMBER).map(str::to_owned));
        }
    }
    for one in trap.got() {
        let number = one.head.get(NUMBER);
        assert!(number.is_some_and(|number| for_the_trap.remove(number)), "{one:?}");
    }
    let mut numbers = BTreeSet::new();
    for one in &sandbox.got() {
        let number = one.head.get(NUMBER);
        let is_new = number.is_some_and(|number| numbers.insert(number.to_owned()));
        assert!(is_new, "came out of another one: {:?}", one.head);
        let framed = one.head.all("content-length").len() + one.head.all("transfer-encoding").len();
        assert!(framed <= 1, "its end is in doubt: {:?}", one.head);
        let shown = format!("{:?}", one.head);
        assert!(!one.head.any("x-sbx") && !one.head.any("x_sbx"), "{shown}");
        assert!(!one.head.line.starts_with("CONNECT"), "{shown}");
    }
    assert_eq!(sandbox.questions(), 0);
    assert!((20..=numbers.len()).contains(&served), "some are plain requests: {served}");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_requests_by_http_2_reach_no_other_sandbox_and_are_never_two() {
    need_caddy!();
    let (ca, dir) = (Ca::new(), tempfile::tempdir().expect("a directory"));
    let node = own_certificate::start(&ca, dir.path(), None).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    let trap = Sandbox::start(at(12, 8000), "trap").await;
    node.put(100_001, sandbox.address);
    node.put(NOT_THERE, trap.address);
    send_odd(&ca, &sandbox, &trap, REQUESTS).await;
}

/// The same over the connections that two nodes share: a request that came out of another one would be answered to
/// whoever asks next.
#[tokio::test(flavor = "multi_thread")]
async fn odd_requests_by_http_2_over_a_hop_reach_no_other_sandbox_and_are_never_two() {
    need_caddy!();
    let (ca, dir, pki) = (Ca::new(), tempfile::tempdir().expect("a directory"), Pki::new());
    let edge = own_certificate::start(&ca, dir.path(), Some(pki.path())).await;
    let owner = Node::start_with(2, Some(pki.path()), |_| {}).await;
    let hop = Hop::between(edge, owner).await;
    let trap = Sandbox::start(at(12, 8000), "trap").await;
    hop.owner.put(NOT_THERE, trap.address);
    let honest = Honest::start(hop.edge.public);
    send_odd(&ca, &hop.alpha, &trap, HOP_REQUESTS).await;
    honest.end().await;
}
