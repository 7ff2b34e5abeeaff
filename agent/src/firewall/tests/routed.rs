//! What the host takes and routes for a sandbox: errors by ICMP about connections of others, and connections
//! to name servers. Real packets, over the interfaces of `firewall_bridge`.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
};

use nix::{
    libc::{IPPROTO_TCP, IPPROTO_UDP},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
    },
};
use tokio::time::Instant;

use super::{
    firewall_bridge::{HOST, NEIGHBOUR, PORT, PUBLIC, SANDBOX, WAIT, Wired},
    *,
};
use crate::firewall::{RESOLVER_PORT, render::FAMILIES};

/// Address of the host on the public network.
const UPLINK: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Connection that the host tracks: protocol, who opened it, and to whom.
type Flow = (i32, SocketAddrV4, SocketAddrV4);

/// Sums as IP and ICMP do.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|word| u32::from_be_bytes([0, 0, word[0], word[1]]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("16 bits")).to_be_bytes()
}

/// Error by ICMP, "host unreachable", as a router on the way from the first address to the second would send it.
fn error_about((protocol, from, to): Flow) -> Vec<u8> {
    let protocol = u8::try_from(protocol).expect("a protocol");
    let mut inner = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0];
    inner.extend(from.ip().octets().into_iter().chain(to.ip().octets()));
    let sum = checksum(&inner);
    inner[10..12].copy_from_slice(&sum);
    inner.extend(from.port().to_be_bytes().into_iter().chain(to.port().to_be_bytes()));
    inner.extend([0; 4]);
    let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
    error.extend(inner);
    let sum = checksum(&error);
    error[2..4].copy_from_slice(&sum);
    error
}

/// Sends an error about a connection to whoever opened it.
fn forge(from: &Namespace, flow: Flow) {
    from.inside(|| {
        let (family, kind) = (AddressFamily::Inet, SockType::Raw);
        let raw = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp).expect("one");
        let to = SockaddrIn::from(SocketAddrV4::new(*flow.1.ip(), 0));
        sendto(raw.as_raw_fd(), &error_about(flow), &to, MsgFlags::empty()).expect("sent");
    });
}

fn v4(address: SocketAddr) -> SocketAddrV4 {
    let SocketAddr::V4(address) = address else { panic!("{address} is of IPv4") };
    address
}

/// Connections that others have opened, by who they are. They last as long as this.
struct Tracked {
    flows: [(&'static str, Flow); 3],
    _tcp: [TcpStream; 2],
    _udp: UdpSocket,
}

impl Tracked {
    fn new(wired: &Wired) -> Self {
        let connect = |from: &Namespace, to: Ipv4Addr| {
            from.inside(|| TcpStream::connect_timeout(&(to, PORT).into(), WAIT).expect("connected"))
        };
        let of = |stream: &TcpStream| {
            let (from, to) = (stream.local_addr().expect("one"), stream.peer_addr().expect("one"));
            (IPPROTO_TCP, v4(from), v4(to))
        };
        let (by_host, by_public) = (connect(&wired.host, PUBLIC), connect(&wired.public, UPLINK));
        let by_neighbour = wired.neighbour.inside(|| {
            let socket = UdpSocket::bind((NEIGHBOUR, 4303)).expect("a port");
            socket.send_to(b"x", (PUBLIC, 4304)).expect("sent");
            socket
        });
        // The host gives it its own address, and leaves it its port.
        let masked = SocketAddrV4::new(UPLINK, 4303);
        let flows = [
            ("the host", of(&by_host)),
            ("a neighbour", (IPPROTO_UDP, masked, SocketAddrV4::new(PUBLIC, 4304))),
            ("a machine that is out of reach", of(&by_public)),
        ];
        Self { flows, _tcp: [by_host, by_public], _udp: by_neighbour }
    }
}

/// Counters on the host of the errors that a sandbox sends, and the way out of its neighbour.
fn count_errors(host: &Namespace) {
    let error = format!("ip saddr {SANDBOX} icmp type destination-unreachable counter");
    for line in [
        "add table ip probe".to_owned(),
        "add chain ip probe out { type nat hook postrouting priority 100; }".to_owned(),
        format!("add rule ip probe out oifname up0 ip saddr {NEIGHBOUR} masquerade"),
        "add chain ip probe taken { type filter hook input priority 0; }".to_owned(),
        "add chain ip probe routed { type filter hook forward priority 0; }".to_owned(),
        format!("add rule ip probe taken {error}"),
        format!("add rule ip probe routed {error}"),
    ] {
        host.run(&line);
    }
}

/// Lets the sandbox forge an error to each; returns who got one within the time of an answer.
fn reached_by_errors(wired: &Wired, tracked: &Tracked) -> Vec<&'static str> {
    let counted = || {
        let listed = ["taken", "routed"]
            .map(|chain| wired.host.run(&format!("list chain ip probe {chain}")));
        let counts = listed.iter().filter_map(|text| text.split_once("counter packets "));
        let counts = counts.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        counts.sum::<u64>()
    };
    let is_reached = |flow: Flow| {
        let (before, deadline) = (counted(), Instant::now() + WAIT);
        forge(&wired.sandbox, flow);
        while counted() == before {
            if Instant::now() >= deadline {
                return false;
            }
        }
        true
    };
    let reached = tracked.flows.iter().filter(|(_, flow)| is_reached(*flow));
    reached.map(|(who, _)| *who).collect()
}

#[tokio::test]
async fn errors_that_a_sandbox_forges_reach_nobody_and_those_about_its_own_connections_reach_it() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &wired.host.nft());
    let with = |first: Entry| rules([(100_002, first), (100_003, entry(3))]);
    count_errors(&wired.host);
    firewall.apply(&with(Entry { egress: Egress::None, ..entry(2) })).await.expect("applied");
    let tracked = Tracked::new(&wired);
    assert_eq!(reached_by_errors(&wired, &tracked), [""; 0]);
    assert!(wired.host.reaches(SANDBOX), "what comes in is answered");

    // Nobody listens there, and the kernel of the other side says so.
    firewall.apply(&with(entry(2))).await.expect("opened");
    let refused = wired.sandbox.inside(|| {
        let socket = UdpSocket::bind((SANDBOX, 0)).expect("its address");
        socket.set_read_timeout(Some(WAIT)).expect("set");
        socket.connect((PUBLIC, 9)).expect("connected");
        socket.send(b"x").expect("sent");
        socket.recv(&mut [0; 16]).map_err(|error| error.kind())
    });
    assert_eq!(refused, Err(ErrorKind::ConnectionRefused));

    // Without the rules each of them gets the error, so the rules are what stops it.
    for family in FAMILIES {
        wired.host.run(&format!("delete table {family} {TABLE}"));
    }
    let all = tracked.flows.map(|(who, _)| who);
    assert_eq!(reached_by_errors(&wired, &tracked), all);
}

#[tokio::test]
async fn sandbox_keeps_few_connections_to_a_name_server() {
    let wired = Wired::new();
    let net = tempfile::tempdir().expect("a directory");
    let firewall = NftFirewall::of(net.path(), &wired.host.nft());
    let with = |first: Entry| rules([(100_002, first), (100_003, entry(3))]);
    let listen = |port| wired.host.inside(|| TcpListener::bind((HOST, port)).expect("a port"));
    let (server, resolver) = (listen(53), listen(RESOLVER_PORT));
    let open = |from: &Namespace, to: Ipv4Addr, count: usize| {
        let connect = |_| TcpStream::connect_timeout(&(to, 53).into(), WAIT).ok();
        from.inside(|| (0..count).filter_map(connect).collect::<Vec<_>>())
    };
    firewall.apply(&with(entry(2))).await.expect("applied");
    let own = open(&wired.sandbox, HOST, 6);
    assert_eq!(own.len(), 4);
    assert_eq!(open(&wired.neighbour, HOST, 2).len(), 2, "the neighbour asks on");
    assert_eq!(firewall.check().await, Ok(None), "what is counted is no difference");
    // A connection that both sides have closed does not count.
    drop(own);
    for _ in 0..6 {
        server.accept().expect("connected");
    }
    let deadline = Instant::now() + WAIT * 10;
    while open(&wired.sandbox, HOST, 1).is_empty() {
        assert!(Instant::now() < deadline, "closed connections are counted");
    }

    // With a list, whatever name server is asked: the host's resolver answers.
    let list = Entry { egress: "allow=a.b".parse().expect("an egress"), ..entry(2) };
    firewall.apply(&with(list)).await.expect("tightened");
    assert_eq!(open(&wired.sandbox, PUBLIC, 6).len(), 4);
    assert_eq!(firewall.check().await, Ok(None));
    drop(resolver);
}
