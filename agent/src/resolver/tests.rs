//! The resolver beside a name server of the test's own, on the loopback. Sandboxes have addresses there.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use proptest::prelude::*;
use simple_dns::{
    CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE,
    rdata::{A, CNAME, RData},
};

use super::*;

const SANDBOX: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 4);

/// Lists of sandboxes, and what was opened for them.
#[derive(Debug, Default)]
struct Fake {
    lists: Mutex<BTreeMap<Ipv4Addr, (AllowList, u64)>>,
    opened: Mutex<Vec<Grant>>,
    calls: AtomicUsize,
    fails: AtomicBool,
    /// Names that the host's rules do not allow.
    refused: Mutex<Refusals>,
}

#[async_trait::async_trait]
impl Lists for Fake {
    fn list_of(&self, source: Ipv4Addr) -> Option<(SandboxId, AllowList, u64)> {
        let (list, number) = self.lists.lock().get(&source)?.clone();
        Some((SandboxId::new(u64::from(source.octets()[3]), &[0; 10]), list, number))
    }

    fn may_be_reached(&self, address: Ipv4Addr) -> bool {
        !address.is_private() && !address.is_loopback() && !address.is_link_local()
    }

    async fn open(&self, grants: &[Grant]) -> Result<Refusals, String> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) {
            return Err("told to fail".to_owned());
        }
        self.opened.lock().extend_from_slice(grants);
        Ok(self.refused.lock().clone())
    }

    fn answers(&self, _: bool) {}
}

/// Name server that knows some names, and counts what it is asked.
#[derive(Debug, Default)]
struct Upstream {
    asked: Mutex<Vec<String>>,
}

impl Upstream {
    /// Builds its answers to a question, one after the other.
    fn answers(&self, bytes: &[u8], by: Transport) -> Vec<Vec<u8>> {
        let question = Packet::parse(bytes).expect("a question of ours");
        let name = question.questions[0].qname.to_string();
        self.asked.lock().push(name.clone());
        let mut reply = Packet::new_reply(question.id());
        reply.questions.push(question.questions[0].clone());
        let mut add = |owner: &'static str, ttl, data| {
            let owner = Name::new(owner).expect("a name");
            reply.answers.push(ResourceRecord::new(owner, CLASS::IN, ttl, data));
        };
        let ip = |last| RData::A(A::from(Ipv4Addr::new(93, 184, 216, last)));
        let inside = || RData::A(A::from(Ipv4Addr::new(10, 0, 0, 5)));
        match name.split('.').next().unwrap_or_default() {
            "one" => add("one.example.org", 1, ip(34)),
            "alias" => {
                add(
                    "alias.example.org",
                    3600,
                    RData::CNAME(CNAME(Name::new("a.cdn.net").expect("one"))),
                );
                add("stray.cdn.net", 3600, ip(66));
                add("A.CDN.net", 3600, ip(40));
            }
            "inside" => {
                add("inside.example.org", 60, inside());
                add("inside.example.org", 60, ip(35));
            }
            "loop" => {
                let data = || RData::CNAME(CNAME(Name::new("loop.example.org").expect("one")));
                add("loop.example.org", 60, data());
            }
            "hidden" => add("hidden.example.org", 60, inside()),
            "gone" => *reply.rcode_mut() = RCODE::NameError,
            "sick" => *reply.rcode_mut() = RCODE::ServerFailure,
            "long" if by == Transport::Tcp => {
                for last in 1..=60 {
                    add("long.example.org", 60, ip(last));
                }
            }
            "long" => reply.set_flags(PacketFlag::TRUNCATION),
            "foreign" => {
                add("foreign.example.org", 60, ip(36));
                let right = reply.build_bytes_vec().expect("bytes");
                reply.set_id(question.id().wrapping_add(1));
                let guess = reply.build_bytes_vec().expect("bytes");
                return vec![guess, b"junk".to_vec(), right];
            }
            _ => return Vec::new(),
        }
        vec![reply.build_bytes_vec().expect("bytes")]
    }

    async fn start(self: Arc<Self>) -> SocketAddr {
        let udp = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let address = udp.local_addr().expect("an address");
        let tcp = TcpListener::bind(address).await.expect("the port of the datagrams");
        let this = Arc::clone(&self);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.expect("a question");
                for answer in this.answers(&buffer[..length], Transport::Udp) {
                    udp.send_to(&answer, from).await.expect("sent");
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.expect("a connection");
                let length = stream.read_u16().await.expect("a length");
                let mut bytes = vec![0; length.into()];
                stream.read_exact(&mut bytes).await.expect("a question");
                for answer in self.answers(&bytes, Transport::Tcp) {
                    let length = u16::try_from(answer.len()).expect("short");
                    stream.write_u16(length).await.expect("sent");
                    stream.write_all(&answer).await.expect("sent");
                }
            }
        });
        address
    }
}

/// A resolver with everything around it.
struct Lab {
    fake: Arc<Fake>,
    upstream: Arc<Upstream>,
    udp: SocketAddr,
    tcp: SocketAddr,
}

impl Lab {
    async fn new() -> Self {
        let upstream = Arc::new(Upstream::default());
        let server = Arc::clone(&upstream).start().await;
        let fake = Arc::new(Fake::default());
        fake.lists.lock().extend([SANDBOX, OTHER].map(|source| (source, (list(), 1))));
        let udp = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let at = (udp.local_addr().expect("one"), tcp.local_addr().expect("one"));
        let resolver = Resolver::new(Arc::clone(&fake) as _, vec![server]);
        tokio::spawn(async move { resolver.serve(Listening(udp, tcp)).await });
        Self { fake, upstream, udp: at.0, tcp: at.1 }
    }

    /// Sends from a sandbox, and returns the first answer.
    async fn send(&self, source: Ipv4Addr, bytes: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind((source, 0)).await.expect("bound");
        socket.send_to(bytes, self.udp).await.expect("sent");
        let mut buffer = [0; 4096];
        let received = timeout(Duration::from_secs(20), socket.recv(&mut buffer)).await.ok()?;
        Some(buffer[..received.expect("received")].to_vec())
    }

    async fn send_by_tcp(&self, source: Ipv4Addr, bytes: &[u8]) -> Vec<u8> {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind((source, 0).into()).expect("bound");
        let mut stream = socket.connect(self.tcp).await.expect("connected");
        let length = u16::try_from(bytes.len()).expect("short");
        stream.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await.expect("sent");
        let mut bytes = vec![0; stream.read_u16().await.expect("a length").into()];
        stream.read_exact(&mut bytes).await.expect("an answer");
        bytes
    }

    async fn ask(&self, source: Ipv4Addr, name: &str) -> (RCODE, Vec<Ipv4Addr>) {
        read(&self.send(source, &asking(name, TYPE::A)).await.expect("an answer"))
    }

    fn opened(&self, source: Ipv4Addr) -> Vec<Ipv4Addr> {
        let opened = self.fake.opened.lock();
        opened.iter().filter(|one| one.sandbox == source).map(|one| one.address).collect()
    }
}

fn asking(name: &str, kind: TYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(7);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let (kind, class) = (QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN));
    packet.questions.push(Question::new(Name::new(name).expect("a name"), kind, class, false));
    packet.build_bytes_vec().expect("bytes")
}

fn read(bytes: &[u8]) -> (RCODE, Vec<Ipv4Addr>) {
    let packet = Packet::parse(bytes).expect("an answer");
    assert_eq!(packet.id(), 7);
    assert!(packet.has_flags(PacketFlag::RESPONSE), "{packet:?}");
    let addresses = packet.answers.iter().filter_map(|record| {
        let RData::A(one) = &record.rdata else { return None };
        Some(Ipv4Addr::from(one.address))
    });
    (packet.rcode(), addresses.collect())
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(93, 184, 216, last)
}

#[tokio::test]
async fn allowed_name_is_opened_for_its_sandbox_and_told() {
    let lab = Lab::new().await;
    assert_eq!(lab.ask(SANDBOX, "ONE.example.org").await, (RCODE::NoError, vec![ip(34)]));
    assert_eq!(lab.opened(SANDBOX), [ip(34)]);
    assert_eq!(lab.opened(OTHER), [] as [Ipv4Addr; 0]);
    // The answer holds for a while: nothing is asked or opened again.
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await, (RCODE::NoError, vec![ip(34)]));
    assert_eq!((lab.fake.calls.load(Ordering::SeqCst), lab.upstream.asked.lock().len()), (1, 1));
    assert_eq!(lab.ask(OTHER, "one.example.org").await.1, [ip(34)], "its own");
    assert_eq!(lab.opened(OTHER), [ip(34)]);
    // With another list it is opened anew: the former addresses may have been closed.
    let other = AllowList::parse(["one.example.org"]).expect("a list");
    lab.fake.lists.lock().insert(SANDBOX, (other, 2));
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await.1, [ip(34)]);
    assert_eq!(lab.fake.calls.load(Ordering::SeqCst), 3);
    // Also after a change there and back within the time of the answer.
    lab.fake.lists.lock().insert(OTHER, (list(), 3));
    assert_eq!(lab.ask(OTHER, "one.example.org").await.1, [ip(34)]);
    assert_eq!(lab.fake.calls.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn last_quarter_of_the_room_is_for_those_that_ask_little() {
    let fake = Arc::new(Fake::default());
    let source = |number: u8| Ipv4Addr::new(127, 0, 1, number);
    fake.lists.lock().extend((0..=255).map(|number| (source(number), (list(), 1))));
    let resolver = Resolver::new(fake, Vec::new());
    let ask = |number: u8| resolver.admit((source(number), 5353).into(), Transport::Udp);
    let mut rooms = Vec::new();
    let mut greedy = 0;
    while resolver.all.available_permits() > ALL_MAX / 4 {
        let admitted: Vec<_> = (0..EACH_MAX + 1).map_while(|_| ask(greedy)).collect();
        assert!(admitted.len() <= EACH_MAX);
        rooms.extend(admitted);
        greedy += 1;
    }
    assert_eq!(rooms.len(), ALL_MAX - ALL_MAX / 4);
    assert!((0..greedy).all(|number| ask(number).is_none()), "they have more than a few");
    // Each of many others gets its few, up to the end.
    let others = u8::try_from(ALL_MAX / 4 / FEW).expect("few");
    for number in greedy..greedy + others {
        let admitted: Vec<_> = (0..=FEW).map_while(|_| ask(number)).collect();
        assert_eq!(admitted.len(), FEW, "{number}");
        rooms.extend(admitted);
    }
    assert!(ask(greedy + others).is_none(), "there is no room at all");
    rooms.clear();
    assert!(ask(0).is_some());
}

fn list() -> AllowList {
    AllowList::parse(["*.example.org"]).expect("a list")
}

#[tokio::test]
async fn other_names_are_refused_and_not_asked_for() {
    let lab = Lab::new().await;
    for name in ["example.org", "one.example.com", "org", "one.example.org.evil.net", "_x.evil.net"]
    {
        assert_eq!(lab.ask(SANDBOX, name).await, (RCODE::Refused, vec![]), "{name}");
    }
    let dotted = asking(r"evil\.net.example.org", TYPE::A);
    let answer = lab.send(SANDBOX, &dotted).await.expect("an answer");
    assert_eq!(read(&answer).0, RCODE::Refused, "a dot inside of a label");
    let text = lab.send(SANDBOX, &asking("one.example.org", TYPE::TXT)).await.expect("an answer");
    assert_eq!(read(&text).0, RCODE::Refused);
    assert_eq!(*lab.upstream.asked.lock(), [] as [String; 0]);
    assert_eq!(lab.opened(SANDBOX), [] as [Ipv4Addr; 0]);
}

#[tokio::test]
async fn addresses_of_ipv6_and_hints_of_an_allowed_name_are_empty() {
    let lab = Lab::new().await;
    for kind in [TYPE::AAAA, TYPE::HTTPS] {
        let answer = lab.send(SANDBOX, &asking("one.example.org", kind)).await.expect("an answer");
        assert_eq!(read(&answer), (RCODE::NoError, vec![]));
    }
    assert_eq!(*lab.upstream.asked.lock(), [] as [String; 0]);
}

#[tokio::test]
async fn aliases_are_followed_and_nothing_else_is_believed() {
    let lab = Lab::new().await;
    assert_eq!(lab.ask(SANDBOX, "alias.example.org").await, (RCODE::NoError, vec![ip(40)]));
    assert_eq!(lab.opened(SANDBOX), [ip(40)], "a stray address is not the name's");
    assert_eq!(lab.ask(SANDBOX, "loop.example.org").await, (RCODE::NoError, vec![]));
    assert_eq!(lab.ask(SANDBOX, "foreign.example.org").await.1, [ip(36)], "the true answer");
}

#[tokio::test]
async fn address_that_no_sandbox_may_reach_is_neither_opened_nor_told() {
    let lab = Lab::new().await;
    assert_eq!(lab.ask(SANDBOX, "inside.example.org").await, (RCODE::NoError, vec![ip(35)]));
    assert_eq!(lab.ask(SANDBOX, "hidden.example.org").await, (RCODE::NoError, vec![]));
    assert_eq!(lab.opened(SANDBOX), [ip(35)]);
}

#[tokio::test]
async fn failures_are_told_and_open_nothing() {
    let lab = Lab::new().await;
    assert_eq!(lab.ask(SANDBOX, "gone.example.org").await, (RCODE::NameError, vec![]));
    assert_eq!(lab.ask(SANDBOX, "sick.example.org").await, (RCODE::ServerFailure, vec![]));
    lab.fake.fails.store(true, Ordering::SeqCst);
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await, (RCODE::ServerFailure, vec![]));
    lab.fake.fails.store(false, Ordering::SeqCst);
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await.1, [ip(34)], "it was not remembered");
}

#[tokio::test]
async fn answer_that_the_rules_do_not_allow_yet_is_neither_told_nor_remembered() {
    let lab = Lab::new().await;
    *lab.fake.refused.lock() = [(SANDBOX, "one.example.org".to_owned())].into();
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await, (RCODE::ServerFailure, vec![]));
    lab.fake.refused.lock().clear();
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await.1, [ip(34)]);
}

#[tokio::test]
async fn long_answers_travel_by_tcp() {
    let lab = Lab::new().await;
    let question = asking("long.example.org", TYPE::A);
    let short = lab.send(SANDBOX, &question).await.expect("an answer");
    assert!(
        short.len() <= 512 && Packet::parse(&short).expect("one").has_flags(PacketFlag::TRUNCATION)
    );
    let (code, addresses) = read(&lab.send_by_tcp(SANDBOX, &question).await);
    assert_eq!((code, addresses.len()), (RCODE::NoError, 32), "bounded");
    assert_eq!(lab.opened(SANDBOX), addresses);
}

#[tokio::test(start_paused = true)]
async fn silent_name_server_fails_the_question() {
    let lab = Lab::new().await;
    let answer = lab.ask(SANDBOX, "silent.example.org").await;
    assert_eq!(answer, (RCODE::ServerFailure, vec![]));
}

#[tokio::test]
async fn who_has_no_list_gets_no_answer() {
    let lab = Lab::new().await;
    let socket = UdpSocket::bind((STRANGER, 0)).await.expect("bound");
    socket.send_to(&asking("one.example.org", TYPE::A), lab.udp).await.expect("sent");
    // This one is answered after the stranger's was looked at.
    lab.ask(SANDBOX, "one.example.org").await;
    let mut buffer = [0; 512];
    assert!(socket.try_recv(&mut buffer).is_err());
    assert_eq!(lab.upstream.asked.lock().len(), 1);
}

#[tokio::test]
async fn flood_of_one_sandbox_holds_up_no_other() {
    let lab = Lab::new().await;
    let socket = UdpSocket::bind((SANDBOX, 0)).await.expect("bound");
    for number in 0..200 {
        let question = asking(&format!("silent{number}.example.org"), TYPE::A);
        socket.send_to(&question, lab.udp).await.expect("sent");
    }
    let answer = timeout(Duration::from_secs(1), lab.ask(OTHER, "one.example.org")).await;
    assert_eq!(answer.expect("at once").1, [ip(34)]);
    let asked = lab.upstream.asked.lock().iter().filter(|name| name.starts_with("silent")).count();
    assert!(asked <= EACH_MAX, "{asked}");
}

#[tokio::test]
async fn malformed_messages_are_answered_or_dropped_and_harm_nobody() {
    let lab = Lab::new().await;
    let good = asking("one.example.org", TYPE::A);
    let mut many = good.clone();
    many[5] = 255;
    let mut answer = good.clone();
    answer[2] |= 0x80;
    let pointer = [&good[..12], &[0xc0_u8, 0x0c, 0, 1, 0, 1][..]].concat();
    let huge = [good.clone(), vec![0; 2000]].concat();
    let socket = UdpSocket::bind((SANDBOX, 0)).await.expect("bound");
    for wrong in [
        &b""[..],
        &b"x"[..],
        &good[..12],
        &good[..20],
        &many[..],
        &answer[..],
        &pointer[..],
        &huge[..],
    ] {
        socket.send_to(wrong, lab.udp).await.expect("sent");
    }
    let refused = lab.send(SANDBOX, &many).await.expect("an answer");
    assert_eq!(read(&refused).0, RCODE::FormatError);
    assert_eq!(lab.ask(SANDBOX, "one.example.org").await.1, [ip(34)]);
}

proptest! {
    #[test]
    fn no_bytes_are_too_much_for_the_parser(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        at in 0_usize..40,
        with in any::<u8>(),
    ) {
        drop(message::question(&bytes));
        message::said(&bytes, 7, "one.example.org");
        let mut near = asking("one.example.org", TYPE::A);
        let length = near.len();
        near[at % length] = with;
        drop(message::question(&near));
        near[2] |= 0x80;
        near.extend(&bytes);
        message::said(&near, 7, "one.example.org");
    }
}
