//! Records which addresses the DHCP server gave, seen where no sandbox can have sent the reply.
//!
//! A sandbox may answer DHCP requests of others, so a reply alone proves nothing; the place where
//! it is seen does. If the server is this host, its replies leave by the bridge interface itself,
//! which frames from one port to another do not pass. If the server is beyond the bridge's uplink,
//! its replies come in by that port. In both cases the sender must be the configured server: a
//! packet of a sandbox that a router sends back does not carry that address, and the kernel
//! forwards no packet that carries the host's own.

mod packet;

use std::{
    collections::HashMap,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use daemon::sync::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    sandbox::lifecycle::address::{DhcpReplies, Mac, Reply},
    sys::{
        packet::{Capture, FRAME_BYTES_MAX, Way},
        read,
    },
};

/// Most clients that are remembered: more than a /20 has.
const CLIENTS_MAX: usize = 4096;
/// Most ports of a bridge that are captured.
const UPLINKS_MAX: usize = 16;
/// Most layers of VLANs that are followed to a card.
const LAYERS_MAX: usize = 4;
/// Interval between checks which ports the bridge has.
const RESCAN: Duration = Duration::from_secs(5);

/// DHCP server, and the interfaces that its replies pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Bridge of the sandboxes.
    pub bridge: String,
    /// IP address of the server: this host's, or one beyond the uplink.
    pub address: Ipv4Addr,
    /// True when that address is this host's own.
    pub is_this_host: bool,
    /// Path of `/sys/class/net`.
    pub net: PathBuf,
}

/// Replies that were seen.
#[derive(Debug)]
pub struct Replies {
    server: Server,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    /// Last reply by client, with the end of its lease, until which it counts.
    clients: HashMap<Mac, (Reply, Instant)>,
    ready: Result<(), String>,
}

impl Replies {
    /// Starts capturing on a task of its own, until `stop`.
    pub fn watch(server: Server, stop: CancellationToken) -> Arc<Self> {
        let clients = HashMap::new();
        let seen = Mutex::new(Seen { clients, ready: Err("it was just started".to_owned()) });
        let replies = Arc::new(Self { server, seen });
        let mut listening = HashMap::new();
        // At once: the next sandbox that boots gets its reply soon.
        replies.listen(&mut listening);
        tokio::spawn(Arc::clone(&replies).run(listening, stop));
        replies
    }

    async fn run(
        self: Arc<Self>,
        mut listening: HashMap<u32, AbortOnDropHandle<()>>,
        stop: CancellationToken,
    ) {
        let mut ticks = interval(RESCAN);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.listen(&mut listening);
        }
    }

    /// Captures on the interfaces that replies pass now, and on no others.
    fn listen(self: &Arc<Self>, listening: &mut HashMap<u32, AbortOnDropHandle<()>>) {
        listening.retain(|_, task| !task.is_finished());
        let found = match interfaces(&self.server) {
            Ok(found) => found,
            Err(why) => {
                listening.clear();
                return self.set_ready(Err(why));
            }
        };
        listening.retain(|index, _| found.values().any(|known| known == index));
        let mut failed = None;
        for (name, index) in found {
            if listening.contains_key(&index) {
                continue;
            }
            match Capture::on(index) {
                Ok(capture) => {
                    let replies = Arc::clone(self);
                    let task = tokio::spawn(async move { replies.follow(&name, capture).await });
                    listening.insert(index, AbortOnDropHandle::new(task));
                }
                Err(error) => failed = Some(format!("DHCP replies on {name}: {error}")),
            }
        }
        self.set_ready(match failed {
            Some(why) => Err(why),
            None => Ok(()),
        });
    }

    async fn follow(&self, interface: &str, capture: Capture) {
        let mut frame = [0; FRAME_BYTES_MAX];
        loop {
            match capture.next(&mut frame).await {
                Ok((length, way)) => self.saw(&frame[..length], way),
                Err(error) => {
                    // The next check captures again, once the interface is back.
                    tracing::warn!(interface, %error, "DHCP replies can no longer be captured");
                    return;
                }
            }
        }
    }

    /// Records the reply in a frame that passed one of the interfaces.
    fn saw(&self, frame: &[u8], way: Way) {
        let expected = if self.server.is_this_host { Way::Out } else { Way::In };
        if way != expected {
            return;
        }
        let Some(reply) = packet::acknowledgement(frame) else { return };
        if reply.from != self.server.address {
            return;
        }
        let now = Instant::now();
        // An infinite lease counts as 136 years.
        let until = now.checked_add(reply.lease).unwrap_or(now + Duration::from_secs(1 << 31));
        let mut seen = self.seen.lock();
        if seen.clients.len() >= CLIENTS_MAX && !seen.clients.contains_key(&reply.mac) {
            let oldest = seen.clients.iter().min_by_key(|(_, (reply, _))| reply.seen);
            if let Some(oldest) = oldest.map(|(mac, _)| *mac) {
                seen.clients.remove(&oldest);
            }
        }
        seen.clients.insert(reply.mac, (Reply { ip: reply.ip, seen: now }, until));
    }

    fn set_ready(&self, ready: Result<(), String>) {
        let mut seen = self.seen.lock();
        if seen.ready != ready {
            match &ready {
                Ok(()) => tracing::info!(bridge = self.server.bridge, "DHCP replies are captured"),
                Err(why) => tracing::warn!(why, "DHCP is refused"),
            }
            seen.ready = ready;
        }
    }
}

impl DhcpReplies for Replies {
    fn ready(&self) -> Result<(), String> {
        self.seen.lock().ready.clone()
    }

    fn last(&self, mac: Mac) -> Option<Reply> {
        let now = Instant::now();
        let seen = self.seen.lock();
        let (reply, until) = seen.clients.get(&mac)?;
        (*until > now).then_some(*reply)
    }
}

/// Finds the interfaces that the server's replies pass, with their indexes.
///
/// # Errors
/// A sentence, when there is none.
fn interfaces(server: &Server) -> Result<HashMap<String, u32>, String> {
    let Server { bridge, address, net, .. } = server;
    let index = |name: &str| {
        let text = read::text(&net.join(name).join("ifindex"), read::SMALL);
        text.trim().parse::<u32>().ok()
    };
    if server.is_this_host {
        let found = index(bridge).map(|index| HashMap::from([(bridge.clone(), index)]));
        return found.ok_or_else(|| format!("there is no interface {bridge}"));
    }
    let ports = fs::read_dir(net.join(bridge).join("brif")).into_iter().flatten().flatten();
    let names = ports.filter_map(|port| port.file_name().into_string().ok());
    let uplinks = names.filter(|name| is_uplink(net, name, LAYERS_MAX));
    let found: HashMap<_, _> = uplinks
        .filter_map(|name| index(&name).map(|index| (name, index)))
        .take(UPLINKS_MAX)
        .collect();
    if found.is_empty() {
        return Err(format!(
            "the replies of DHCP server {address} cannot be seen on this host: bridge {bridge} has no \
             uplink (a network card, a bond, or a VLAN of one), and the server is not this host. See \
             network.dhcp_server"
        ));
    }
    Ok(found)
}

/// Returns true for a network card, a bond, and a VLAN of these: interfaces without a container or
/// virtual machine at the other end. An interface of unknown kind is not an uplink.
fn is_uplink(net: &Path, name: &str, layers: usize) -> bool {
    let dir = net.join(name);
    if dir.join("device").exists() || dir.join("bonding").is_dir() {
        return true;
    }
    let uevent = read::text(&dir.join("uevent"), read::SMALL);
    if layers == 0 || !uevent.lines().any(|line| line == "DEVTYPE=vlan") {
        return false;
    }
    let lower = fs::read_dir(&dir).into_iter().flatten().flatten();
    let lower: Vec<String> = lower
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("lower_")?.to_owned()))
        .collect();
    !lower.is_empty() && lower.iter().all(|name| is_uplink(net, name, layers - 1))
}

#[cfg(test)]
mod tests {
    use super::{
        packet::tests::{SERVER, frame},
        *,
    };

    const MAC: Mac = [2, 0x51, 0, 1, 0x86, 0xa0];

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 100, 1, last)
    }

    fn replies(is_this_host: bool) -> Replies {
        let (bridge, net) = ("vmbr0".to_owned(), "/nowhere".into());
        let server = Server { bridge, address: SERVER, is_this_host, net };
        Replies { server, seen: Mutex::new(Seen { clients: HashMap::new(), ready: Ok(()) }) }
    }

    fn address(replies: &Replies) -> Option<Ipv4Addr> {
        replies.last(MAC).map(|reply| reply.ip)
    }

    #[tokio::test(start_paused = true)]
    async fn only_replies_that_the_server_can_have_sent_count() {
        // The host is the server: a frame that comes in by the bridge is a sandbox's.
        let here = replies(true);
        here.saw(&frame(SERVER, MAC, ip(7)), Way::In);
        assert_eq!(address(&here), None);
        here.saw(&frame(SERVER, MAC, ip(7)), Way::Out);
        assert_eq!(address(&here), Some(ip(7)));
        // The server is beyond the uplink: a frame that leaves by it is a sandbox's, flooded by the
        // bridge.
        let there = replies(false);
        there.saw(&frame(SERVER, MAC, ip(7)), Way::Out);
        assert_eq!(address(&there), None);
        there.saw(&frame(ip(66), MAC, ip(7)), Way::In);
        assert_eq!(address(&there), None, "another sender");
        there.saw(&frame(SERVER, [0; 6], ip(7)), Way::In);
        assert_eq!(address(&there), None, "another client");
        there.saw(&frame(SERVER, MAC, ip(7)), Way::In);
        there.saw(&frame(SERVER, MAC, ip(8)), Way::In);
        assert_eq!(address(&there), Some(ip(8)), "the last");
    }

    #[tokio::test(start_paused = true)]
    async fn reply_counts_until_its_lease_ends() {
        let replies = replies(true);
        replies.saw(&frame(SERVER, MAC, ip(7)), Way::Out);
        tokio::time::advance(Duration::from_secs(3599)).await;
        assert_eq!(address(&replies), Some(ip(7)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(address(&replies), None);
    }

    #[tokio::test(start_paused = true)]
    async fn number_of_remembered_clients_is_bounded() {
        let replies = replies(true);
        for number in 0..10_000u32 {
            let [a, b, c, d] = number.to_be_bytes();
            replies.saw(&frame(SERVER, [6, 6, a, b, c, d], ip(7)), Way::Out);
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        replies.saw(&frame(SERVER, MAC, ip(8)), Way::Out);
        assert_eq!(replies.seen.lock().clients.len(), CLIENTS_MAX);
        assert_eq!(address(&replies), Some(ip(8)));
    }

    #[test]
    fn an_uplink_is_a_card_a_bond_or_a_vlan_of_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let net = dir.path();
        let put = |path: &str, text: &str| {
            let path = net.join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        };
        put("vmbr0/ifindex", "4\n");
        let server = |is_this_host| Server {
            bridge: "vmbr0".into(),
            address: SERVER,
            is_this_host,
            net: net.to_owned(),
        };
        assert_eq!(interfaces(&server(true)), Ok(HashMap::from([("vmbr0".into(), 4)])));
        // Interfaces of sandboxes, virtual machines and firewalls.
        for (index, port) in ["veth100i0", "tap101i0", "fwpr102p0", "eth9"].iter().enumerate() {
            put(&format!("vmbr0/brif/{port}/x"), "");
            put(&format!("{port}/ifindex"), &format!("{}\n", 20 + index));
            put(&format!("{port}/uevent"), &format!("INTERFACE={port}\n"));
        }
        let why = interfaces(&server(false)).expect_err("no uplink");
        assert!(why.contains("vmbr0 has no uplink") && why.contains("10.100.1.1"), "{why}");
        // A VLAN of an interface that a sandbox may be connected to is no uplink either.
        put("vmbr0/brif/veth100i0.5/x", "");
        put("veth100i0.5/ifindex", "30\n");
        put("veth100i0.5/uevent", "DEVTYPE=vlan\nINTERFACE=veth100i0.5\n");
        put("veth100i0.5/lower_veth100i0/x", "");
        interfaces(&server(false)).expect_err("no uplink");
        for (index, port, kind) in [(5, "eno1", "device/x"), (6, "bond0", "bonding/x")] {
            put(&format!("vmbr0/brif/{port}/x"), "");
            put(&format!("{port}/ifindex"), &format!("{index}\n"));
            put(&format!("{port}/{kind}"), "");
        }
        put("vmbr0/brif/bond0.7/x", "");
        put("bond0.7/ifindex", "7\n");
        put("bond0.7/uevent", "DEVTYPE=vlan\n");
        put("bond0.7/lower_bond0/x", "");
        let expected = [("eno1", 5), ("bond0", 6), ("bond0.7", 7)];
        let expected = expected.map(|(name, index)| (name.to_owned(), index));
        assert_eq!(interfaces(&server(false)), Ok(expected.into()));
    }
}
