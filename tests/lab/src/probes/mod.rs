//! Probes of the isolation: what root in a sandbox reaches, and as whom it can speak, tried from inside
//! real containers of a node.

use std::{collections::BTreeMap, process::Stdio, time::UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};

use crate::Node;

/// Tries to open a connection to each `ADDRESS/PORT`, or to send a datagram to each `udp:ADDRESS/PORT`, and
/// prints which were reached; a refusal is an answer, too.
const REACH: &str = include_str!("reach.py");
/// Sends as somebody else: `MAC IP` are the neighbour's, `OWN` is the sender's MAC, `HOST` the
/// gateway's MAC and `GATEWAY` its address. The last argument is the sender's own address.
const SPOOF: &str = include_str!("spoof.py");
/// Sends errors by ICMP about a connection: protocol, who opened it, and to whom, each as `ADDRESS/PORT`. They go to
/// whoever opened it.
const ERRORS: &str = include_str!("errors.py");
/// Port of corosync, UDP.
const COROSYNC: u16 = 5405;

/// Network beside a node, with a private and a public address, and the name server's. Its end is in a
/// network namespace of its own. The node and another one have routes to each other's sandboxes, which a
/// cluster may have, too: without them a probe of that node would fail for want of a way back.
#[derive(Debug)]
pub struct Lan {
    node: Node,
    other: Node,
}

impl Lan {
    /// Makes it, in place of one that was left behind.
    pub fn new(node: &Node, other: &Node) -> Result<Self> {
        let lan = Self { node: node.clone(), other: other.clone() };
        lan.remove();
        shell(
            node,
            "set -e; ip netns add lan; ip link add lan0 type veth peer name eth0 netns lan; \
             ip addr add 192.168.77.1/24 dev lan0; ip addr add 203.0.113.1/24 dev lan0; \
             ip addr add 169.254.169.254/32 dev lan0; ip link set lan0 up; \
             ip -n lan addr add 192.168.77.2/24 dev eth0; ip -n lan addr add 203.0.113.2/24 dev eth0; \
             ip -n lan addr add 10.99.1.3/32 dev eth0; ip -n lan link set lo up; \
             ip -n lan link set eth0 up; ip -n lan route add default via 192.168.77.1; \
             ip route add 10.99.1.3/32 via 192.168.77.2",
        )?;
        for (from, to) in lan.routes() {
            let (net, via) = (to.id().containers_net(), to.id().ip());
            let added = from.shell(&format!("ip route add {net}.0/24 via {via}"))?;
            ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
        }
        Ok(lan)
    }

    fn routes(&self) -> [(&Node, &Node); 2] {
        [(&self.node, &self.other), (&self.other, &self.node)]
    }

    fn remove(&self) {
        let line = "ip route del 10.99.1.3/32; ip link del lan0; ip netns del lan; true";
        drop(shell(&self.node, &format!("({line}) 2>/dev/null")));
        for (from, to) in self.routes() {
            let net = to.id().containers_net();
            drop(shell(from, &format!("ip route del {net}.0/24 2>/dev/null; true")));
        }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A sandbox as its neighbours see it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Number of its container.
    pub vmid: u64,
    /// Its IPv4 address.
    pub ip: String,
    /// Its MAC, which follows from the address.
    pub mac: String,
}

impl Seen {
    /// Derives the MAC as the agent does.
    pub fn new(vmid: u64, ip: &str) -> Result<Self> {
        let parsed: std::net::Ipv4Addr = ip.parse().with_context(|| format!("address {ip:?}"))?;
        let [a, b, c, d] = parsed.octets();
        Ok(Self { vmid, ip: ip.into(), mac: format!("02:50:{a:02x}:{b:02x}:{c:02x}:{d:02x}") })
    }
}

/// Returns what no sandbox may reach, with a neighbour's address and the `Lan` beside the node.
///
/// # Errors
/// When the bridge or the neighbour has no IPv6 address: then nothing would be proved about IPv6.
pub fn closed(node: &Node, neighbour: &Seen) -> Result<BTreeMap<&'static str, String>> {
    let host = link_local(node, "", "vmbr0")?;
    let other = link_local(node, &format!("lxc-attach -n {} --", neighbour.vmid), "eth0")?;
    Ok(BTreeMap::from([
        ("neighbour", format!("{}/8000", neighbour.ip)),
        ("neighbour, UDP", format!("udp:{}/{COROSYNC}", neighbour.ip)),
        ("neighbour, IPv6", format!("{other}%eth0/8000")),
        ("gateway, ssh", "10.100.1.1/22".to_owned()),
        ("gateway, UDP", format!("udp:10.100.1.1/{COROSYNC}")),
        ("host, corosync", format!("udp:10.99.0.1/{COROSYNC}")),
        ("host, IPv6", format!("{host}%eth0/22")),
        ("host, IPv6 and UDP", format!("udp:{host}%eth0/{COROSYNC}")),
        ("agent", "10.99.0.1/7445".to_owned()),
        ("ingress", "10.99.0.1/8480".to_owned()),
        ("private address of the host", "192.168.77.1/22".to_owned()),
        ("public address of the host", "203.0.113.1/22".to_owned()),
        ("private network", "192.168.77.2/80".to_owned()),
        ("metadata", "169.254.169.254/80".to_owned()),
        ("name server, another port", "10.99.1.3/80".to_owned()),
    ]))
}

/// Returns what no sandbox of this `Lan`'s node may reach of another node.
pub fn of_another_node(other: &Node) -> BTreeMap<&'static str, String> {
    let ip = other.id().ip();
    BTreeMap::from([
        ("another node, agent", format!("{ip}/7445")),
        ("another node, corosync", format!("udp:{ip}/{COROSYNC}")),
    ])
}

/// Returns what no sandbox may reach of a sandbox on another node. The rules of both nodes forbid it.
pub fn of_far_sandbox(far: &Seen) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("sandbox of another node", format!("{}/8000", far.ip)),
        ("sandbox of another node, UDP", format!("udp:{}/{COROSYNC}", far.ip)),
    ])
}

/// Returns what every sandbox may reach beside that `Lan`.
pub fn open() -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("public network", "203.0.113.2/80".to_owned()),
        ("name server", "10.99.1.3/53".to_owned()),
    ])
}

fn link_local(node: &Node, line: &str, interface: &str) -> Result<String> {
    let text = shell(node, &format!("{line} ip -6 -o addr show dev {interface} scope link"))?;
    let word = text.split_whitespace().find(|word| word.starts_with("fe80:"));
    let address = word.and_then(|word| word.split('/').next());
    let address = address.with_context(|| format!("{interface} has no IPv6 address: {text:?}"))?;
    Ok(address.to_owned())
}

/// Runs a line in the node's shell; returns its stdout.
fn shell(node: &Node, line: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&node.shell(line)?.stdout).into_owned())
}

/// Runs a Python script in a container, without the agent.
pub fn python(node: &Node, vmid: u64, script: &str, args: &[String]) -> Result<String> {
    let vmid = vmid.to_string();
    let argv = ["/usr/bin/lxc-attach", "--clear-env", "-n", &vmid, "--"]
        .into_iter()
        .chain(["/usr/bin/python3", "-c", script])
        .map(str::to_owned)
        .chain(args.iter().cloned());
    let output = node.command(argv).stdin(Stdio::null()).output().context("lxc-attach")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Tries to reach each target from a container; returns which were reached.
pub fn reach(
    node: &Node,
    vmid: u64,
    targets: &BTreeMap<&str, String>,
) -> Result<BTreeMap<String, bool>> {
    let args: Vec<_> = targets.values().cloned().collect();
    let text = python(node, vmid, REACH, &args)?;
    let words = text.lines().filter_map(|line| line.split_once(' '));
    let found: BTreeMap<_, _> = words.map(|(target, word)| (target, word == "yes")).collect();
    let of = |target: &String| found.get(target.as_str()).copied().context("a word of each target");
    targets.iter().map(|(name, target)| Ok(((*name).to_owned(), of(target)?))).collect()
}

/// Lets the first sandbox send as the second, and tells which of its frames had an effect.
pub fn spoofs(node: &Node, from: &Seen, victim: &Seen) -> Result<BTreeMap<&'static str, bool>> {
    let port = |seen: &Seen| format!("veth{}i0", seen.vmid);
    let (own, other) = (port(from), port(victim));
    count_spoofed(node, &own, &other, victim)?;
    let counted = |chain: &str| -> Result<bool> {
        let text = shell(node, &format!("nft list chain {chain}"))?;
        ensure!(text.contains("counter"), "{text}");
        Ok(!text.contains("packets 0 "))
    };
    let host = shell(node, "cat /sys/class/net/vmbr0/address")?.trim().to_owned();
    let send = |kind: &str| {
        let args = [&victim.mac, &victim.ip, &from.mac, &host, "10.100.1.1", kind, &from.ip];
        python(node, from.vmid, SPOOF, &args.map(str::to_owned)).map(drop)
    };
    // The victim speaks first, so that host and bridge know where it is.
    let speak = || {
        let name_server = BTreeMap::from([("dns", "10.99.1.3/53".to_owned())]);
        reach(node, victim.vmid, &name_server).map(drop)
    };
    let mut found = BTreeMap::new();
    speak()?;
    send("arp")?;
    let neighbour = shell(node, &format!("ip neigh show {} dev vmbr0", victim.ip))?;
    ensure!(neighbour.contains("lladdr"), "{neighbour}");
    found.insert("arp", !neighbour.contains(&victim.mac));
    shell(node, &format!("ip neigh flush to {} dev vmbr0", victim.ip))?;
    speak()?;
    send("mac")?;
    let learnt = shell(node, &format!("bridge fdb show br vmbr0 | grep '^{}'", victim.mac))?;
    ensure!(learnt.contains("dev"), "{learnt}");
    found.insert("mac", learnt.contains(&own));
    speak()?;
    send("ip")?;
    found.insert("ip", counted("bridge probe seen")?);
    send("dhcp")?;
    found.insert("dhcp", counted("bridge probe out")?);
    // Frames that the bridge hands to the host without a look, and addresses that are no host's.
    for kind in ["lldp", "broadcast"] {
        send(kind)?;
        found.insert(kind, counted(&format!("inet probe {kind}"))?);
    }
    shell(node, "nft delete table bridge probe; nft delete table inet probe")?;
    speak()?;
    Ok(found)
}

/// Lets a sandbox send errors about connections that others have opened, and tells who of them got one: the node, a
/// neighbour that the node masks, and a machine of the private network.
pub fn errors(node: &Node, from: &Seen, neighbour: &Seen) -> Result<BTreeMap<&'static str, bool>> {
    let gone =
        "nft delete table inet probe 2>/dev/null; nft delete table ip probe 2>/dev/null; true";
    let kinds = "icmp type { destination-unreachable, time-exceeded, parameter-problem } counter";
    // Not of an earlier call: whoever closes a connection keeps its port for a minute.
    let port = fresh_ports(3);
    let (own, victim) = (&from.ip, &neighbour.ip);
    shell(
        node,
        &format!(
            "{gone}; nft 'add table inet probe; \
             add chain inet probe node {{ type filter hook input priority 300; }}; \
             add chain inet probe neighbour {{ type filter hook forward priority 300; }}; \
             add chain inet probe machine {{ type filter hook forward priority 300; }}; \
             add rule inet probe node ip saddr {own} {kinds}; \
             add rule inet probe neighbour ip saddr {own} ip daddr {victim} {kinds}; \
             add rule inet probe machine ip saddr {own} ip daddr 192.168.77.2 {kinds}; \
             add table ip probe; \
             add chain ip probe out {{ type nat hook postrouting priority srcnat; }}; \
             add rule ip probe out oifname lan0 ip saddr {victim} masquerade'"
        ),
    )?;
    // What they carry does not matter, nor that they end: the node goes on to track them.
    let get = "curl --silent --output /dev/null --max-time 2 --local-port";
    shell(node, &format!("{get} {port} http://{own}:8000/; true"))?;
    let agent = format!("{get} {} http://10.99.0.1:7445/", port + 1);
    shell(node, &format!("nsenter --net=/run/netns/lan {agent}; true"))?;
    let masked = port + 2;
    let datagram = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
         s.bind((\"\", {masked})); s.sendto(b\"x\", (\"203.0.113.2\", 9))"
    );
    python(node, neighbour.vmid, &datagram, &[])?;
    let flows = [
        ("node", "6", format!("10.100.1.1/{port}"), format!("{own}/8000")),
        ("neighbour", "17", format!("203.0.113.1/{masked}"), "203.0.113.2/9".to_owned()),
        ("machine", "6", format!("192.168.77.2/{}", port + 1), "10.99.0.1/7445".to_owned()),
    ];
    let mut found = BTreeMap::new();
    for (who, protocol, opener, to) in flows {
        python(node, from.vmid, ERRORS, &[protocol.to_owned(), opener, to])?;
        let text = shell(node, &format!("nft list chain inet probe {who}"))?;
        ensure!(text.contains("counter"), "{text}");
        found.insert(who, !text.contains("packets 0 "));
    }
    shell(node, gone)?;
    Ok(found)
}

/// Returns the first of so many ports that no call of this minute had, and that no kernel gives to a program.
fn fresh_ports(count: u16) -> u16 {
    let since = UNIX_EPOCH.elapsed().unwrap_or_default().as_millis() / 100;
    20_000 + u16::try_from(since % 3000).unwrap_or_default() * count
}

/// Counts on the node the frames that a spoofer's port sends as the victim.
fn count_spoofed(node: &Node, own: &str, other: &str, victim: &Seen) -> Result<()> {
    shell(
        node,
        "nft delete table bridge probe 2>/dev/null; nft delete table inet probe 2>/dev/null; true",
    )?;
    shell(
        node,
        "nft 'add table inet probe; \
         add chain inet probe lldp { type filter hook input priority 300; }; \
         add chain inet probe broadcast { type filter hook input priority 300; }; \
         add rule inet probe lldp udp dport 4343 counter; \
         add rule inet probe broadcast udp dport 4344 counter'",
    )?;
    shell(
        node,
        &format!(
            "nft 'add table bridge probe; \
             add chain bridge probe seen {{ type filter hook input priority 300; }}; \
             add chain bridge probe out {{ type filter hook postrouting priority 300; }}; \
             add rule bridge probe seen iifname \"{own}\" ip saddr {} udp dport 4242 counter; \
             add rule bridge probe out oifname \"{other}\" udp sport 67 counter'",
            victim.ip
        ),
    )
    .map(drop)
}
