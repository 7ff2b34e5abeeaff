//! The rules where PVE's own firewall puts a bridge between a container and the node's bridge: real
//! interfaces, and probes of which each succeeds once the rules are away.
//!
//! ```text
//!  sandbox --- veth100002i0 [fwbr100002i0] fwln100002i0 --- fwpr100002p0 [vmbr0] veth100003i0 --- neighbour
//!                                                                           |  \ nic0 --- machine
//!                                                             10.100.1.1: host --- up0 --- public
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, setns};
use tokio::time::Instant;

use super::{
    super::{RESOLVER_PORT, names},
    *,
};

/// Longest wait for an answer; one that comes takes a millisecond.
pub(super) const WAIT: Duration = Duration::from_secs(1);
/// Port of every server here.
pub(super) const PORT: u16 = 8000;
/// Switch of the kernel that shows bridged packets to `inet`; PVE's firewall turns it on.
const CALL_INET: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 1);
pub(super) const SANDBOX: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 2);
pub(super) const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 3);
/// Address of nobody, which the sandbox takes.
const TAKEN: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 9);
/// MAC of nobody, which the sandbox takes.
const TAKEN_MAC: &str = "02:50:0a:64:01:63";
const OWN_MAC: &str = "02:50:0a:64:01:02";
pub(super) const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

impl Namespace {
    /// Runs something on a thread inside.
    pub(super) fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let path = self.path();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let namespace = File::open(path).expect("the namespace");
                setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
                run()
            });
            inside.join().expect("no panic")
        })
    }

    /// Runs lines of iproute2, and returns what the last one printed.
    #[expect(clippy::disallowed_methods, reason = "a test is somebody else on the host")]
    fn ip(&self, lines: &str) -> String {
        let [nsenter, namespace, _] = self.nft();
        let mut said = String::new();
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words = line.split_whitespace();
            let output = Command::new(&nsenter).arg(&namespace).args(words).output().expect("ran");
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
            said = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        said
    }

    fn listen(&self) -> TcpListener {
        self.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("a port"))
    }

    pub(super) fn reaches(&self, ip: Ipv4Addr) -> bool {
        let address = SocketAddr::from((ip, PORT));
        self.inside(|| TcpStream::connect_timeout(&address, WAIT).is_ok())
    }

    /// Sends frames for `ip` to a MAC.
    fn resolve(&self, ip: Ipv4Addr, mac: &str) {
        self.ip(&format!("ip neigh replace {ip} lladdr {mac} dev eth0 nud permanent"));
    }
}

/// Host with a sandbox behind PVE's firewall, a neighbour without it, a machine on the same bridge, and a
/// public network.
pub(super) struct Wired {
    pub(super) host: Namespace,
    pub(super) sandbox: Namespace,
    pub(super) neighbour: Namespace,
    machine: Namespace,
    pub(super) public: Namespace,
    /// MAC of the bridge of PVE's firewall.
    inner: String,
    _listeners: Vec<TcpListener>,
}

impl Wired {
    pub(super) fn new() -> Self {
        let new = Namespace::new;
        let (host, sandbox, neighbour, machine, public) = (new(), new(), new(), new(), new());
        let [a, b, m, p] = [&sandbox, &neighbour, &machine, &public].map(|one| one.0.id());
        host.ip(&format!(
            "ip link set lo up
             ip link add vmbr0 type bridge forward_delay 0
             ip addr add {HOST}/24 dev vmbr0
             ip link add fwbr100002i0 type bridge forward_delay 0
             ip link add veth100002i0 type veth peer name eth0 address {OWN_MAC} netns {a}
             ip link add fwpr100002p0 type veth peer name fwln100002i0
             ip link add veth100003i0 type veth peer name eth0 address 02:50:0a:64:01:03 netns {b}
             ip link add nic0 type veth peer name eth0 netns {m}
             ip link add up0 type veth peer name eth0 netns {p}
             ip link set veth100002i0 master fwbr100002i0 up
             ip link set fwln100002i0 master fwbr100002i0 up
             ip link set fwpr100002p0 master vmbr0 up
             ip link set veth100003i0 master vmbr0 up
             ip link set nic0 master vmbr0 up
             ip link set fwbr100002i0 up
             ip link set vmbr0 up
             ip addr add 203.0.113.1/24 dev up0
             ip link set up0 up
             ip route add 198.51.100.7 dev vmbr0"
        ));
        for (namespace, address, route) in [
            (&sandbox, "10.100.1.2/24", "default via 10.100.1.1"),
            (&neighbour, "10.100.1.3/24", "default via 10.100.1.1"),
            (&machine, "198.51.100.7/32", "10.100.1.0/24 dev eth0"),
            (&public, "203.0.113.2/24", "default via 203.0.113.1"),
        ] {
            namespace.ip(&format!(
                "ip link set eth0 up\nip addr add {address} dev eth0\nip route add {route}"
            ));
        }
        host.inside(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("it forwards"));
        let link = host.ip("ip -o link show fwbr100002i0");
        let words = link.split_once("link/ether ").and_then(|(_, rest)| rest.split(' ').next());
        let inner = words.expect("a MAC").to_owned();
        let listening = [&host, &sandbox, &neighbour, &public].map(Namespace::listen);
        Self { host, sandbox, neighbour, machine, public, inner, _listeners: listening.into() }
    }

    /// Returns what may not work, each with whether it does.
    fn forbidden(&self) -> BTreeMap<&'static str, bool> {
        let Self { sandbox, neighbour, machine, inner, .. } = self;
        self.forget();
        let mut found = BTreeMap::from([
            ("a neighbour", sandbox.reaches(NEIGHBOUR)),
            ("the sandbox, by its neighbour", neighbour.reaches(SANDBOX)),
            ("the host", sandbox.reaches(HOST)),
            ("the spoofed source", self.spoofs()),
            ("ARP for another address", self.answers_for_another()),
            ("another MAC", self.takes_a_mac()),
        ]);
        // The host may still know the sandbox by the MAC that it took.
        self.forget();
        // The bridge in between has a MAC of its own, and what is sent there is the host's to route.
        for (ip, what) in
            [(HOST, "the host, past its bridge"), (NEIGHBOUR, "a neighbour, by the host")]
        {
            sandbox.resolve(ip, inner);
            found.insert(what, sandbox.reaches(ip));
        }
        machine.resolve(SANDBOX, inner);
        found.insert("the sandbox, from another machine, by the host", machine.reaches(SANDBOX));
        self.forget();
        found
    }

    /// Returns what must work, each with whether it does.
    fn allowed(&self) -> BTreeMap<&'static str, bool> {
        self.forget();
        BTreeMap::from([
            ("a public address", self.sandbox.reaches(PUBLIC)),
            ("a public address, by a datagram", self.datagram_arrives(SANDBOX)),
            ("the sandbox, by its host", self.host.reaches(SANDBOX)),
            ("the neighbour, by its host", self.host.reaches(NEIGHBOUR)),
        ])
    }

    /// Forgets all neighbours and their MACs, and what the bridges have learned.
    fn forget(&self) {
        self.host.ip("ip link set vmbr0 type bridge fdb_flush
             ip link set fwbr100002i0 type bridge fdb_flush");
        for namespace in [&self.host, &self.sandbox, &self.neighbour, &self.machine] {
            namespace.ip("ip neigh flush all nud all");
        }
    }

    /// Sends a datagram from an address of the sandbox to the public network.
    fn datagram_arrives(&self, from: Ipv4Addr) -> bool {
        let receiver = self.public.inside(|| UdpSocket::bind((PUBLIC, PORT)).expect("a port"));
        receiver.set_read_timeout(Some(WAIT)).expect("set");
        self.sandbox.inside(|| {
            let sender = UdpSocket::bind((from, 0)).expect("its address");
            sender.send_to(b"x", (PUBLIC, PORT)).expect("sent");
        });
        receiver.recv_from(&mut [0; 16]).is_ok()
    }

    fn spoofs(&self) -> bool {
        self.sandbox.ip(&format!("ip addr add {TAKEN}/32 dev eth0"));
        let arrives = self.datagram_arrives(TAKEN);
        self.sandbox.ip(&format!("ip addr del {TAKEN}/32 dev eth0"));
        arrives
    }

    /// Lets the host ask who has an address that the sandbox took.
    fn answers_for_another(&self) -> bool {
        self.sandbox.ip(&format!("ip addr add {TAKEN}/32 dev eth0"));
        self.host.reaches(TAKEN);
        let known = self.host.ip(&format!("ip neigh show {TAKEN}"));
        self.sandbox.ip(&format!("ip addr del {TAKEN}/32 dev eth0"));
        known.contains(OWN_MAC)
    }

    /// Lets the sandbox send as another MAC; true when a bridge has learned it.
    fn takes_a_mac(&self) -> bool {
        self.sandbox.ip(&format!("ip link set eth0 address {TAKEN_MAC}"));
        self.datagram_arrives(SANDBOX);
        let learned = ["vmbr0", "fwbr100002i0"].map(|bridge| {
            self.host.ip(&format!("bridge fdb show br {bridge}")).contains(TAKEN_MAC)
        });
        // The address goes with the route, which goes with the change of the MAC on some kernels.
        self.sandbox.ip(&format!(
            "ip link set eth0 address {OWN_MAC}\nip route replace default via {HOST}"
        ));
        learned.contains(&true)
    }
}

impl Wired {
    /// Lets the sandbox ask a name server by a datagram. True when the question is led to the host's resolver,
    /// and the sandbox gets the answer as from the server that it asked.
    fn is_led_to_the_resolver(&self, server: Ipv4Addr) -> bool {
        let at = (HOST, RESOLVER_PORT);
        let resolver = self.host.inside(|| UdpSocket::bind(at).expect("a port"));
        resolver.set_read_timeout(Some(WAIT)).expect("set");
        let asking = self.sandbox.inside(|| {
            let socket = UdpSocket::bind((SANDBOX, 0)).expect("its address");
            socket.connect((server, 53)).expect("connected");
            socket.send(b"question").expect("sent");
            socket
        });
        asking.set_read_timeout(Some(WAIT)).expect("set");
        let mut buffer = [0; 16];
        let Ok((_, from)) = resolver.recv_from(&mut buffer) else { return false };
        assert_eq!(from.ip(), SANDBOX, "it is known by its own address");
        resolver.send_to(b"answer", from).expect("sent");
        asking.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == b"answer")
    }
}

/// Sends on a socket of the sandbox; true when that is heard at this server, and answered.
fn is_answered(asking: &UdpSocket, server: &UdpSocket) -> bool {
    let mut buffer = [0; 16];
    asking.send(b"question").expect("sent");
    let Ok((_, from)) = server.recv_from(&mut buffer) else { return false };
    server.send_to(b"answer", from).expect("sent");
    asking.recv(&mut buffer).is_ok()
}

/// Packets that the host takes for its name server.
struct Questions<'a>(&'a Namespace);

impl<'a> Questions<'a> {
    fn count_on(host: &'a Namespace) -> Self {
        host.run("add table ip probe");
        host.run("add chain ip probe taken { type filter hook input priority 0; policy accept; }");
        host.run("add rule ip probe taken udp dport 53 counter");
        Self(host)
    }

    fn taken(&self) -> u64 {
        let listed = self.0.run("list chain ip probe taken");
        let count = listed.split_once("counter packets ").map(|(_, rest)| rest);
        let count = count.and_then(|rest| rest.split(' ').next());
        count.and_then(|count| count.parse().ok()).expect("a counter")
    }

    /// Sends questions as fast as it goes, and waits until the host took at least some of them; returns how many.
    fn asked_by(&self, sandbox: &Namespace, count: u32, at_least: u64) -> u64 {
        let before = self.taken();
        sandbox.inside(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port");
            for _ in 0..count {
                socket.send_to(b"question", (HOST, 53)).expect("sent");
            }
        });
        let deadline = Instant::now() + WAIT;
        loop {
            let taken = self.taken() - before;
            if taken >= at_least || Instant::now() >= deadline {
                return taken;
            }
        }
    }

    /// Waits until two readings a moment apart are equal: the host has taken all that it takes; returns how many.
    async fn settled(&self) -> u64 {
        let deadline = Instant::now() + WAIT;
        let mut before = self.taken();
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let taken = self.taken();
            if taken == before || Instant::now() >= deadline {
                return taken;
            }
            before = taken;
        }
    }
}

#[tokio::test]
async fn questions_of_one_sandbox_are_bounded_and_its_neighbours_are_not() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &wired.host.nft());
    let questions = Questions::count_on(&wired.host);
    firewall.apply(&rules([(100_002, entry(2)), (100_003, entry(3))])).await.expect("applied");
    // With the first one the host's MAC is known; before, a sandbox keeps only some packets for it.
    assert_eq!(questions.asked_by(&wired.sandbox, 1, 1), 1);
    assert_eq!(questions.asked_by(&wired.sandbox, 100, 100), 100, "programs ask so many at once");
    let begun = Instant::now();
    let before = questions.taken();
    questions.asked_by(&wired.sandbox, 5000, 1);
    let taken = questions.settled().await - before;
    let most = 400 + 200 * (begun.elapsed().as_secs() + 1);
    assert!(taken <= most, "{taken} of at most {most}");
    assert_eq!(questions.asked_by(&wired.neighbour, 1, 1), 1);
    assert_eq!(questions.asked_by(&wired.neighbour, 100, 100), 100, "the neighbour asks on");
    assert_eq!(firewall.check().await, Ok(None), "rates are no difference");
    // Without the rules the host takes nearly all of them.
    wired.host.run(&format!("delete table inet {TABLE}"));
    let taken = questions.asked_by(&wired.sandbox, 5000, most + 1);
    assert!(taken > most, "{taken}");
}

#[tokio::test]
async fn older_flow_to_a_name_server_is_led_to_the_resolver_and_back() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &wired.host.nft());
    let with = |first: Entry| rules([(100_002, first), (100_003, entry(3))]);
    let list = Entry { egress: "allow=a.b".parse().expect("an egress"), ..entry(2) };
    let public = wired.public.inside(|| UdpSocket::bind((PUBLIC, 53)).expect("a port"));
    let resolver = wired.host.inside(|| UdpSocket::bind((HOST, RESOLVER_PORT)).expect("a port"));
    let asking = wired.sandbox.inside(|| UdpSocket::bind((SANDBOX, 0)).expect("its address"));
    asking.connect((PUBLIC, 53)).expect("connected");
    for socket in [&public, &resolver, &asking] {
        socket.set_read_timeout(Some(WAIT)).expect("set");
    }
    for _ in 0..2 {
        firewall.apply(&with(entry(2))).await.expect("applied");
        assert!(is_answered(&asking, &public), "an open sandbox asks whom it wants");
        firewall.apply(&with(list.clone())).await.expect("tightened");
        assert!(is_answered(&asking, &resolver), "the same socket");
        assert!(!is_answered(&asking, &public));
        // That one heard what the other did not take.
        drop(resolver.recv(&mut [0; 16]));
    }
    let closed = Entry { egress: Egress::None, ..entry(2) };
    firewall.apply(&with(closed)).await.expect("closed");
    assert!(!is_answered(&asking, &public) && !is_answered(&asking, &resolver));
}

#[tokio::test]
async fn list_holds_behind_the_bridge_of_pves_firewall() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let list = Entry { egress: "allow=a.b".parse().expect("an egress"), ..entry(2) };
    let switch = wired.host.inside(|| Path::new(CALL_INET).exists());
    let values: &[&str] = if switch { &["0", "1"] } else { &["0"] };
    for value in values {
        if switch {
            wired.host.inside(|| fs::write(CALL_INET, value).expect("switched"));
        }
        // One that has given no addresses yet.
        let firewall = NftFirewall::of(net.path(), &wired.host.nft());
        wired.forget();
        firewall
            .apply(&rules([(100_002, list.clone()), (100_003, entry(3))]))
            .await
            .expect("applied");
        for server in [PUBLIC, HOST] {
            assert!(wired.is_led_to_the_resolver(server), "{server}, {value}");
        }
        assert!(!wired.sandbox.reaches(PUBLIC), "no name has it");
        let grant = Grant { sandbox: SANDBOX, name: "a.b".to_owned(), address: PUBLIC };
        firewall.allow(&[grant]).await.expect("allowed");
        assert!(wired.sandbox.reaches(PUBLIC), "{value}");
        assert!(wired.host.reaches(SANDBOX), "what comes in is answered");
        assert!(!wired.sandbox.reaches(NEIGHBOUR), "{value}");
        // Without the rules a question goes where it was sent, and any address is reached.
        for family in super::super::render::FAMILIES {
            wired.host.run(&format!("delete table {family} {TABLE}"));
            wired.host.run(&format!("delete table {family} {}", names::TABLE));
        }
        wired.forget();
        assert!(!wired.is_led_to_the_resolver(PUBLIC), "{value}");
        assert!(wired.sandbox.reaches(PUBLIC), "{value}");
        assert!(firewall.check().await.expect("listed").is_some(), "the next call replaces them");
    }
}

#[tokio::test]
async fn rules_hold_behind_the_bridge_of_pves_firewall() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &wired.host.nft());
    let all = |probes: BTreeMap<&'static str, bool>, expected: bool| {
        let other: Vec<_> = probes.iter().filter(|(_, works)| **works != expected).collect();
        assert!(other.is_empty(), "not {expected}: {other:?}");
    };
    // Without the switch, the kernel was built without it, or nobody has loaded br_netfilter.
    let switch = wired.host.inside(|| Path::new(CALL_INET).exists());
    let values: &[&str] = if switch { &["0", "1"] } else { &["0"] };
    for value in values {
        if switch {
            wired.host.inside(|| fs::write(CALL_INET, value).expect("switched"));
        }
        firewall.apply(&rules([(100_002, entry(2)), (100_003, entry(3))])).await.expect("applied");
        all(wired.allowed(), true);
        all(wired.forbidden(), false);
        // Each probe proves something only if the rules are what stops it.
        for family in super::super::render::FAMILIES {
            wired.host.run(&format!("delete table {family} {TABLE}"));
        }
        all(wired.allowed(), true);
        all(wired.forbidden(), true);
        assert!(firewall.check().await.expect("listed").is_some(), "the next call replaces them");
    }
}
