//! Capture of the frames of one network interface.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{AddressFamily, LinkAddr, SockFlag, SockType, recvfrom, socket},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Longest frame of a DHCP server, bytes: it fits the MTU of an Ethernet.
pub const FRAME_BYTES_MAX: usize = 1514;
/// `PACKET_OUTGOING` of <linux/if_packet.h>: the frame left this host by the interface.
const OUTGOING: u8 = 4;

/// Capture of one interface's IPv4 UDP frames to port 68, whole, from any sender.
#[derive(Debug)]
pub struct Capture(AsyncFd<OwnedFd>);

/// Direction of a frame through the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Received from the network that the interface is connected to.
    In,
    /// Sent by this host.
    Out,
}

impl Capture {
    /// Starts to listen.
    ///
    /// # Errors
    /// Without CAP_NET_RAW, or when there is no such interface.
    pub fn on(interface: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Protocol 0: nothing arrives before the bind, and by then the filter is set.
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        filter(&fd)?;
        bind(&fd, interface)?;
        register(fd)
    }

    /// Reads the next frame into `frame`. Returns its length and direction.
    ///
    /// # Errors
    /// When the interface is down or gone.
    pub async fn next(&self, frame: &mut [u8; FRAME_BYTES_MAX]) -> io::Result<(usize, Way)> {
        self.0
            .async_io(Interest::READABLE, |fd| {
                let (length, from) = recvfrom::<LinkAddr>(fd.as_raw_fd(), frame)?;
                let from = from.ok_or(io::ErrorKind::InvalidData)?;
                let way = if from.pkttype() == OUTGOING { Way::Out } else { Way::In };
                Ok((length, way))
            })
            .await
    }
}

#[expect(unsafe_code, reason = "AsyncFd")]
fn register(fd: OwnedFd) -> io::Result<Capture> {
    // SAFETY: an `OwnedFd` is open, is this very descriptor until it is dropped, and is moved in
    // here for good.
    Ok(Capture(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? }))
}

/// Drops frames that `Capture` does not return, so that other traffic causes no wakeups. The kernel
/// has removed VLAN tags by then.
#[expect(unsafe_code, reason = "SO_ATTACH_FILTER has no safe wrapper")]
fn filter(fd: &OwnedFd) -> io::Result<()> {
    const LD_HALF: u16 = 0x28;
    const LD_BYTE: u16 = 0x30;
    const LD_HALF_INDEXED: u16 = 0x48;
    const LDX_HEADER_LENGTH: u16 = 0xb1;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_BITS: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(LD_HALF, 0, 0, 12),
        op(JUMP_EQUAL, 0, 8, 0x0800),
        op(LD_BYTE, 0, 0, 23),
        op(JUMP_EQUAL, 0, 6, 17),
        // Fragments carry no whole message.
        op(LD_HALF, 0, 0, 20),
        op(JUMP_BITS, 4, 0, 0x3fff),
        op(LDX_HEADER_LENGTH, 0, 0, 14),
        op(LD_HALF_INDEXED, 0, 0, 16),
        op(JUMP_EQUAL, 0, 1, 68),
        op(RETURN, 0, 0, 0xffff),
        op(RETURN, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    let size =
        libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).map_err(io::Error::other)?;
    // SAFETY: the kernel copies the program, which lives until the call returns, and gets its size.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&program).cast(),
            size,
        )
    };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "bind to an interface has no safe wrapper")]
fn bind(fd: &OwnedFd, interface: u32) -> io::Result<()> {
    let every_protocol = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be();
    let address = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: every_protocol,
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size =
        libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    // SAFETY: the address lives until the call returns, and the kernel gets its size.
    let done = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), size) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, time::Duration};

    use nix::{net::if_::if_nametoindex, unistd::geteuid};

    use super::*;

    /// Expects each frame twice on loopback: as it leaves and as it arrives.
    #[tokio::test]
    async fn only_frames_to_dhcp_clients_are_captured_with_their_direction() {
        assert!(
            geteuid().is_root(),
            "run this test as root: it needs CAP_NET_RAW, which the agent has"
        );
        let capture = Capture::on(if_nametoindex("lo").expect("lo")).expect("listens");
        let sender = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let port = sender.local_addr().expect("bound").port();
        sender.send_to(b"other", "127.0.0.1:69").expect("sent");
        sender.send_to(b"to the client", "127.0.0.1:68").expect("sent");
        let mut frame = [0; FRAME_BYTES_MAX];
        let mut ways = Vec::new();
        while ways.len() < 2 {
            let next = tokio::time::timeout(Duration::from_secs(30), capture.next(&mut frame));
            let (length, way) = next.await.expect("in time").expect("seen");
            // Another test, or the host's own client, may use the port as well.
            if frame[34..36] == port.to_be_bytes() {
                assert!(frame[..length].ends_with(b"to the client"));
                ways.push(way);
            }
        }
        assert_eq!(ways, [Way::Out, Way::In]);
    }
}
