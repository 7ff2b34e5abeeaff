//! Parses a DHCPACK, the one DHCP message that matters, from a frame. Pure and of bounded work: a
//! frame is read once, and nothing in it is trusted.

use std::{net::Ipv4Addr, time::Duration};

use crate::sandbox::lifecycle::address::Mac;

/// Acknowledgement of a server that a client has an address now (RFC 2131, DHCPACK).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Acknowledgement {
    /// Sender of the packet.
    pub(super) from: Ipv4Addr,
    pub(super) mac: Mac,
    pub(super) ip: Ipv4Addr,
    pub(super) lease: Duration,
}

const ETHERNET_BYTES: usize = 14;
const UDP_BYTES: usize = 8;
/// Length of the fixed part of a DHCP message, in bytes, with the cookie that its options begin
/// with.
const FIXED_BYTES: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// Parses an Ethernet frame; `None` when it is anything else.
pub(super) fn acknowledgement(frame: &[u8]) -> Option<Acknowledgement> {
    let packet = frame.get(ETHERNET_BYTES..).filter(|_| number(frame, 12) == Some(0x0800))?;
    let header = usize::from(*packet.first()? & 0x0f) * 4;
    let total = usize::from(number(packet, 2)?);
    let whole = number(packet, 6)? & 0x3fff == 0;
    if packet[0] >> 4 != 4 || header < 20 || packet.get(9) != Some(&17) || !whole {
        return None;
    }
    let from = address(packet, 12)?;
    let datagram = packet.get(header..total)?;
    if (number(datagram, 0)?, number(datagram, 2)?) != (SERVER_PORT, CLIENT_PORT) {
        return None;
    }
    let message = datagram.get(UDP_BYTES..usize::from(number(datagram, 4)?))?;
    // A reply, on Ethernet, with addresses of six bytes.
    if message.get(..3)? != [2, 1, 6] || message.get(FIXED_BYTES - 4..FIXED_BYTES)? != COOKIE {
        return None;
    }
    let (mut acknowledges, mut lease) = (false, None);
    for (option, value) in options(&message[FIXED_BYTES..]) {
        match option {
            53 => acknowledges = value == [5],
            51 => lease = value.try_into().ok().map(u32::from_be_bytes),
            _ => {}
        }
    }
    let ip = address(message, 16)?;
    // A reply to a DHCPINFORM gives no address and has no lease.
    if !acknowledges || ip.is_unspecified() {
        return None;
    }
    let mac = message.get(28..34)?.try_into().ok()?;
    Some(Acknowledgement { from, mac, ip, lease: Duration::from_secs(lease?.into()) })
}

/// Iterates over code and value of each option, up to the end or to a truncated option.
fn options(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            match rest {
                [0, behind @ ..] => rest = behind,
                [255, ..] | [] | [_] => return None,
                [option, length, behind @ ..] => {
                    let (value, behind) = behind.split_at_checked(usize::from(*length))?;
                    rest = behind;
                    return Some((*option, value));
                }
            }
        }
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::dhcp) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 1);

    /// Builds a frame as a server sends it.
    pub(in crate::dhcp) fn frame(from: Ipv4Addr, mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
        with(from, mac, ip, &[53, 1, 5, 54, 4, 10, 100, 1, 1, 51, 4, 0, 0, 14, 16, 255])
    }

    fn with(from: Ipv4Addr, mac: Mac, ip: Ipv4Addr, options: &[u8]) -> Vec<u8> {
        let mut message = vec![2, 1, 6, 0];
        message.extend([7; 4]);
        message.extend([0; 8]);
        message.extend(ip.octets());
        message.extend([0; 8]);
        message.extend(mac);
        message.resize(236, 0);
        message.extend(COOKIE);
        message.extend(options);
        let udp = u16::try_from(message.len() + UDP_BYTES).expect("short");
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1, 8, 0]);
        frame.extend([0x45, 0]);
        frame.extend((udp + 20).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend(from.octets());
        frame.extend([255; 4]);
        frame.extend([0, 67, 0, 68]);
        frame.extend(udp.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(message);
        // Padding that a card adds to a short frame.
        frame.extend([0; 9]);
        frame
    }

    const MAC: Mac = [2, 0x50, 10, 100, 1, 7];
    const IP: Ipv4Addr = Ipv4Addr::new(10, 100, 1, 7);

    #[test]
    fn acknowledgement_is_parsed() {
        let lease = Duration::from_secs(3600);
        let expected = Acknowledgement { from: SERVER, mac: MAC, ip: IP, lease };
        assert_eq!(acknowledgement(&frame(SERVER, MAC, IP)), Some(expected.clone()));
        // IP options, and padding between DHCP options.
        let mut longer = frame(SERVER, MAC, IP);
        longer[14] = 0x46;
        let total = number(&longer, 16).expect("there") + 4;
        longer[16..18].copy_from_slice(&total.to_be_bytes());
        longer.splice(34..34, [1, 1, 1, 1]);
        assert_eq!(acknowledgement(&longer), Some(expected.clone()));
        let padded = with(SERVER, MAC, IP, &[0, 0, 51, 4, 0, 0, 14, 16, 0, 53, 1, 5]);
        assert_eq!(acknowledgement(&padded), Some(expected));
    }

    #[test]
    fn frame_without_a_valid_acknowledgement_is_ignored() {
        let changed = |at: usize, to: u8| {
            let mut frame = frame(SERVER, MAC, IP);
            frame[at] = to;
            acknowledgement(&frame)
        };
        for (at, to, why) in [
            (13, 6, "no IPv4 in it"),
            (14, 0x65, "another version of IP"),
            (14, 0x44, "a header that is too short"),
            (20, 0x20, "the first of several fragments"),
            (21, 1, "a later fragment"),
            (23, 6, "not UDP"),
            (35, 68, "not from a server's port"),
            (37, 67, "not to a client's port"),
            (42, 1, "a request"),
            (44, 16, "another kind of hardware address"),
            (278, 0, "no cookie"),
            (284, 6, "a refusal"),
            (284, 2, "an offer"),
        ] {
            assert_eq!(changed(at, to), None, "{why}");
        }
        let inform = frame(SERVER, MAC, Ipv4Addr::UNSPECIFIED);
        assert_eq!(acknowledgement(&inform), None);
        assert_eq!(acknowledgement(&with(SERVER, MAC, IP, &[53, 1, 5, 255])), None, "no lease");
        let behind_the_end = [53, 1, 2, 51, 4, 0, 0, 14, 16, 255, 53, 1, 5];
        assert_eq!(acknowledgement(&with(SERVER, MAC, IP, &behind_the_end)), None);
    }

    proptest! {
        #[test]
        fn parsing_any_frame_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = acknowledgement(&bytes);
        }

        #[test]
        fn parsing_a_damaged_frame_does_not_panic(
            at in 0usize..320, to: u8, length in 0usize..320,
        ) {
            let mut frame = frame(SERVER, MAC, IP);
            if let Some(byte) = frame.get_mut(at) {
                *byte = to;
            }
            frame.truncate(length);
            let _ = acknowledgement(&frame);
        }

        #[test]
        fn parsing_any_options_terminates(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(options(&bytes).count() <= bytes.len());
            let _ = acknowledgement(&with(SERVER, MAC, IP, &bytes));
        }
    }
}
