//! TCP connections of this thread's network namespace, asked of the kernel by its sock_diag.
//!
//! `/proc/net/tcp` does not tell how many bytes a connection has moved, and nothing else ends the
//! connections of another process.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{
        ExtensionFlags, InetRequest, InetResponse, InetResponseHeader, SocketId, StateFlags,
        nlas::Nla,
    },
};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv,
            send, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};

/// Most connections that are looked at, at a time.
const CONNECTIONS_MAX: usize = 10_000;
/// Most looks for connections that are to end.
const ROUNDS_MAX: usize = 20;
/// Longest wait for one message, seconds. The kernel answers at once.
const ANSWER_S: i64 = 2;
/// Size of the buffer for messages, bytes. The kernel fills at most 32 KiB at a time.
const BUFFER_BYTES: usize = 64 * 1024;
/// Place of `tcpi_bytes_acked` in <linux/tcp.h>'s `struct tcp_info`, which only grows at its end: bytes
/// that the other side has acknowledged.
const BYTES_ACKED: std::ops::Range<usize> = 120..128;
/// Place of `tcpi_bytes_received`, which follows: bytes that the other side has sent.
const BYTES_RECEIVED: std::ops::Range<usize> = 128..136;

/// An established TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Number that the kernel gives to this socket and to no other until the next boot.
    pub id: u64,
    /// Address of the other end.
    pub remote: SocketAddr,
    /// Bytes of content that it has moved in both directions, without headers and repetitions.
    pub bytes: u64,
}

/// Lists the established connections with other hosts.
///
/// # Errors
/// When the kernel has no sock_diag, or there are more than 10,000.
pub fn established() -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        dump(request(family, StateFlags::ESTABLISHED, ExtensionFlags::INFO), |socket| {
            if found.len() >= CONNECTIONS_MAX {
                return Err(io::Error::other("the namespace has more than 10000 connections"));
            }
            found.extend(connection(&socket).filter(|one| !one.remote.ip().is_loopback()));
            Ok(())
        })?;
    }
    Ok(found)
}

/// Ends the connections to an address and port, and returns how many there were. Looks again until there are
/// no others: some may be new, or were too many at a time.
///
/// # Errors
/// When the kernel lacks CONFIG_INET_DIAG_DESTROY, or CAP_NET_ADMIN is missing: then they stay open
/// until one end closes them. With the first error; the others were tried all the same.
pub fn destroy(to: SocketAddr) -> io::Result<usize> {
    destroy_in_rounds(to, CONNECTIONS_MAX)
}

fn destroy_in_rounds(to: SocketAddr, at_a_time: usize) -> io::Result<usize> {
    let kernel = open()?;
    let (mut tried, mut ended, mut failed) = (HashSet::new(), 0, None);
    for _ in 0..ROUNDS_MAX {
        let sockets = connected(to, at_a_time, &tried, &mut failed);
        if sockets.is_empty() {
            break;
        }
        for socket in sockets {
            // Once: a socket that stays would be found for ever.
            tried.insert(socket.socket_id.cookie);
            match end(&kernel, socket) {
                Ok(()) => ended += 1,
                // It has ended by itself.
                Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
                // The kernel does not answer: each of the others would take as long.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
    }
    failed.map_or(Ok(ended), Err)
}

/// Finds sockets that are connected to an address and port and were not tried yet. The first error of all
/// is left in `failed`.
fn connected(
    to: SocketAddr,
    at_a_time: usize,
    tried: &HashSet<[u8; 8]>,
    failed: &mut Option<io::Error>,
) -> Vec<InetResponseHeader> {
    let states = StateFlags::all()
        - StateFlags::LISTEN
        - StateFlags::CLOSE
        - StateFlags::TIME_WAIT
        - StateFlags::SYN_RECV;
    let mut sockets = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut all = request(family, states.clone(), ExtensionFlags::empty());
        all.socket_id.destination_port = to.port();
        let found = dump(all, |InetResponse { header, .. }| {
            let is_new = remote(&header) == to && !tried.contains(&header.socket_id.cookie);
            if is_new && sockets.len() < at_a_time {
                sockets.push(header);
            }
            Ok(())
        });
        if let Err(error) = found {
            failed.get_or_insert(error);
        }
    }
    sockets
}

/// Ends the connection of one socket.
fn end(kernel: &OwnedFd, socket: InetResponseHeader) -> io::Result<()> {
    let mut one = request(socket.family, StateFlags::all(), ExtensionFlags::empty());
    one.socket_id = socket.socket_id;
    let order = SockDiagDestroy::new(SockDiagMessage::InetRequest(one));
    tell(kernel, NetlinkPayload::from(order), NLM_F_REQUEST | NLM_F_ACK)?;
    acknowledged(kernel)
}

fn request(family: u8, states: StateFlags, extensions: ExtensionFlags) -> InetRequest {
    let any = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id: any }
}

fn connection(socket: &InetResponse) -> Option<Connection> {
    let bytes = socket.nlas.iter().find_map(|attribute| {
        if let Nla::TcpInfo(info) = attribute { moved(info) } else { None }
    })?;
    let id = u64::from_ne_bytes(socket.header.socket_id.cookie);
    Some(Connection { id, remote: remote(&socket.header), bytes })
}

/// Other end of a socket; one of IPv6 may speak IPv4.
fn remote(socket: &InetResponseHeader) -> SocketAddr {
    let id = &socket.socket_id;
    let ip: IpAddr = id.destination_address.to_canonical();
    SocketAddr::new(ip, id.destination_port)
}

/// Bytes moved, of a `tcp_info`; `None` from a kernel before 4.1, which does not count them.
fn moved(info: &[u8]) -> Option<u64> {
    let count = |place| {
        Some(u64::from_ne_bytes(info.get::<std::ops::Range<usize>>(place)?.try_into().ok()?))
    };
    Some(count(BYTES_ACKED)?.saturating_add(count(BYTES_RECEIVED)?))
}

fn open() -> io::Result<OwnedFd> {
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    setsockopt(&kernel, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_S))?;
    connect(kernel.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(kernel)
}

fn tell<M: NetlinkSerializable>(
    kernel: &OwnedFd,
    payload: NetlinkPayload<M>,
    flags: u16,
) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    send(kernel.as_raw_fd(), &bytes, MsgFlags::empty())?;
    Ok(())
}

/// Asks for all sockets that match, and hands them over one by one.
fn dump(
    request: InetRequest,
    mut each: impl FnMut(InetResponse) -> io::Result<()>,
) -> io::Result<()> {
    let kernel = open()?;
    let request = NetlinkPayload::from(SockDiagMessage::InetRequest(request));
    tell(&kernel, request, NLM_F_REQUEST | NLM_F_DUMP)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        for message in messages::<SockDiagMessage>(&kernel, &mut buffer)? {
            match message {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                    each(*socket)?;
                }
                NetlinkPayload::Done(end) if end.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-end.code));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                other @ (NetlinkPayload::Noop
                | NetlinkPayload::Overrun(_)
                | NetlinkPayload::InnerMessage(_)
                | _) => return Err(unexpected(&other)),
            }
        }
    }
}

/// Waits for the answer to one order.
fn acknowledged(kernel: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    match messages::<SockDiagDestroy>(kernel, &mut buffer)?.into_iter().next() {
        Some(NetlinkPayload::Error(answer)) if answer.code.is_none() => Ok(()),
        Some(NetlinkPayload::Error(error)) => Err(error.to_io()),
        other => Err(unexpected(&other)),
    }
}

/// Reads the next messages.
fn messages<M: NetlinkDeserializable>(
    kernel: &OwnedFd,
    buffer: &mut [u8],
) -> io::Result<Vec<NetlinkPayload<M>>> {
    let length = recv(kernel.as_raw_fd(), buffer, MsgFlags::empty())?;
    let mut rest = buffer.get(..length).unwrap_or_default();
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
        // Each begins at a multiple of four.
        let next = usize::try_from(message.header.length).map_err(io::Error::other)?;
        rest = rest.get(next.next_multiple_of(4)..).unwrap_or_default();
        messages.push(message.payload);
        if next == 0 {
            break;
        }
    }
    if messages.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(messages)
}

fn unexpected(message: &impl std::fmt::Debug) -> io::Error {
    io::Error::other(format!("the kernel's sock_diag answered {message:?}"))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// All connections to a port of this host, which `established` leaves out.
    fn to(port: u16) -> Vec<Connection> {
        let mut found = Vec::new();
        let mut all = request(AF_INET, StateFlags::ESTABLISHED, ExtensionFlags::INFO);
        all.socket_id.destination_port = port;
        dump(all, |socket| {
            found.extend(connection(&socket));
            Ok(())
        })
        .expect("asked");
        found
    }

    #[test]
    fn bytes_of_a_connection_are_counted_in_both_directions() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("an address");
        let mut client = TcpStream::connect(address).expect("connected");
        let (mut server, _) = listener.accept().expect("accepted");
        let before = to(address.port());
        let [before] = before[..] else { panic!("one connection: {before:?}") };
        assert_eq!(before.remote, address);
        client.write_all(&[1; 1000]).expect("sent");
        server.read_exact(&mut [0; 1000]).expect("received");
        server.write_all(&[2; 500]).expect("sent");
        client.read_exact(&mut [0; 500]).expect("received");
        let after = to(address.port());
        let [after] = after[..] else { panic!("one connection: {after:?}") };
        // The SYN counts as a byte.
        assert_eq!((after.id, after.bytes - before.bytes), (before.id, 1500));
        assert!(established().expect("asked").iter().all(|one| one.remote != address), "local");
    }

    #[test]
    fn connections_to_one_port_end_and_others_stay() {
        let (one, other) = (TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
        let (one, other) = (one.expect("bound"), other.expect("bound"));
        let (to_one, to_other) =
            (one.local_addr().expect("an address"), other.local_addr().expect("an address"));
        let mut cut: Vec<_> =
            (0..3).map(|_| TcpStream::connect(to_one).expect("connected")).collect();
        let mut stays = TcpStream::connect(to_other).expect("connected");
        match destroy(to_one) {
            Ok(ended) => assert_eq!(ended, 3),
            // Ending sockets requires a privilege that a test may lack.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            Err(error) => panic!("{error}"),
        }
        for client in &mut cut {
            client.write_all(b"x").expect_err("it has ended");
        }
        stays.write_all(b"x").expect("it stays");
        assert_eq!(destroy(to_one).expect("asked"), 0);
    }

    #[test]
    fn more_connections_than_are_looked_at_a_time_end_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let to = listener.local_addr().expect("an address");
        let mut cut: Vec<_> = (0..5).map(|_| TcpStream::connect(to).expect("connected")).collect();
        match destroy_in_rounds(to, 2) {
            Ok(ended) => assert_eq!(ended, 5),
            // As above. Each was tried, and the first error is told.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            Err(error) => panic!("{error}"),
        }
        for client in &mut cut {
            client.write_all(b"x").expect_err("it has ended");
        }
    }

    #[test]
    fn short_tcp_info_of_an_old_kernel_counts_nothing() {
        assert_eq!(moved(&[0; 104]), None);
        let mut info = [0; 200];
        info[BYTES_ACKED].copy_from_slice(&7u64.to_ne_bytes());
        info[BYTES_RECEIVED].copy_from_slice(&5u64.to_ne_bytes());
        assert_eq!(moved(&info), Some(12));
    }
}
