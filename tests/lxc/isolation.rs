//! Isolation: what root in a sandbox reaches, and as whom it can speak, tried from inside real
//! containers. Each probe must succeed once our rules are away: otherwise it proves nothing.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
};

use lab::daemons::AGENT;
use serde_json::Value;

use crate::{
    http::get,
    world::{PATIENCE, World, id, node, ran, vmid, wait, world},
};

/// Tries to open a connection to each `ADDRESS/PORT` and prints which were reached; a refusal is an
/// answer, too.
const PROBE: &str = r#"
import socket, sys, threading
found = {}
def reach(target):
    address, port = target.rsplit("/", 1)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(1.5)
    try:
        s.connect(socket.getaddrinfo(address, int(port), family, socket.SOCK_STREAM)[0][4])
        found[target] = "yes"
    except ConnectionRefusedError:
        found[target] = "yes"
    except OSError:
        found[target] = "no"
all = [threading.Thread(target=reach, args=(t,)) for t in sys.argv[1:]]
[t.start() for t in all]
[t.join() for t in all]
for target, word in found.items():
    print(target, word)
"#;

/// Sends as somebody else: `MAC IP` are the neighbour's, `OWN` is the sender's MAC, `HOST` the
/// gateway's MAC and `GATEWAY` its address. The last argument is the sender's own address.
const SPOOF: &str = r#"
import socket, struct, sys, time
mac, ip, own, host, gateway = sys.argv[1:6]
mac, own, host = (bytes.fromhex(x.replace(":", "")) for x in (mac, own, host))
ip, gateway = socket.inet_aton(ip), socket.inet_aton(gateway)
every = b"\xff" * 6
def udp(source, target, sport, dport, body):
    part = struct.pack("!HHHH", sport, dport, 8 + len(body), 0) + body
    head = bytes([0x45, 0]) + struct.pack("!H", 20 + len(part)) + bytes([0, 0, 0, 0, 64, 17, 0, 0]) + source + target
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xffff) + (total >> 16)
    return head[:10] + struct.pack("!H", 0xffff ^ total) + head[12:] + part
def arp(kind, sender, target):
    return b"\x00\x01\x08\x00\x06\x04" + struct.pack("!H", kind) + own + sender + host + target
frames = {
    "arp": [host + own + b"\x08\x06" + arp(2, ip, gateway), every + own + b"\x08\x06" + arp(1, ip, ip)],
    "mac": [every + mac + b"\x88\xb5" + bytes(60), bytes.fromhex("0180c200000e") + mac + b"\x88\xcc" + bytes(60),
            bytes.fromhex("0180c2000003") + mac + b"\x88\x8e" + bytes(60)],
    "ip": [host + own + b"\x08\x00" + udp(ip, gateway, 4242, 4242, b"x")],
    "dhcp": [every + own + b"\x08\x00" + udp(gateway, b"\xff" * 4, 67, 68, bytes(300))],
    "lldp": [bytes.fromhex("0180c200000e") + own + b"\x08\x00" + udp(bytes(4), b"\xff" * 4, 4343, 4343, b"x")],
    "broadcast": [host + own + b"\x08\x00"
                  + udp(socket.inet_aton(sys.argv[7]), socket.inet_aton("203.0.113.255"), 4344, 4344, b"x")],
}[sys.argv[6]]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for _ in range(5):
    for frame in frames:
        s.send(frame)
        time.sleep(0.02)
"#;

/// Network beside node1, with a private and a public address, and the name server's. Its end is in a
/// network namespace of the test's own.
pub(crate) struct Lan<'a>(&'a World);

impl<'a> Lan<'a> {
    pub(crate) fn new(world: &'a World) -> Self {
        let lan = Self(world);
        lan.remove();
        world.shell(
            "node1",
            "set -e; ip netns add lan; ip link add lan0 type veth peer name eth0 netns lan; \
             ip addr add 192.168.77.1/24 dev lan0; ip addr add 203.0.113.1/24 dev lan0; \
             ip addr add 169.254.169.254/32 dev lan0; ip link set lan0 up; \
             ip -n lan addr add 192.168.77.2/24 dev eth0; ip -n lan addr add 203.0.113.2/24 dev eth0; \
             ip -n lan addr add 10.99.1.3/32 dev eth0; ip -n lan link set lo up; \
             ip -n lan link set eth0 up; ip -n lan route add default via 192.168.77.1; \
             ip route add 10.99.1.3/32 via 192.168.77.2",
        );
        lan
    }

    fn remove(&self) {
        let line = "ip route del 10.99.1.3/32; ip link del lan0; ip netns del lan; true";
        self.0.shell("node1", &format!("({line}) 2>/dev/null"));
    }
}

impl Drop for Lan<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Process of the agent that is stopped while this lives: nothing puts the rules back.
pub(crate) struct Held<'a>(&'a World);

impl<'a> Held<'a> {
    pub(crate) fn new(world: &'a World) -> Self {
        world.shell("node1", "pkill -STOP -f '^/[^ ]*pve-sandbox-agent run'");
        Self(world)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.shell("node1", "pkill -CONT -f '^/[^ ]*pve-sandbox-agent run'");
    }
}

/// Runs a Python script in a container, without the agent.
pub(crate) fn python(world: &World, vmid: u64, script: &str, args: &[String]) -> String {
    let vmid = vmid.to_string();
    let argv = ["/usr/bin/lxc-attach", "--clear-env", "-n", &vmid, "--"]
        .into_iter()
        .chain(["/usr/bin/python3", "-c", script])
        .map(str::to_owned)
        .chain(args.iter().cloned());
    let output = world.node("node1").command(argv).stdin(Stdio::null()).output().expect("attach");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn probe(
    world: &World,
    vmid: u64,
    targets: &BTreeMap<&str, String>,
) -> BTreeMap<String, bool> {
    let args: Vec<_> = targets.values().cloned().collect();
    let text = python(world, vmid, PROBE, &args);
    let words = |line: &str| {
        let (target, word) = line.split_once(' ').expect("two words");
        (target.to_owned(), word == "yes")
    };
    let by_target: BTreeMap<_, _> = text.lines().map(words).collect();
    targets.iter().map(|(name, target)| ((*name).to_owned(), by_target[target])).collect()
}

/// Creates a sandbox on node1 for the second team.
fn of_other_team(world: &World) -> Value {
    let args = ["--json", "create", "--node", "node1", "--expose", "web=8000"];
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let created = ran(world.command_with_token(&args, &token).output().expect("sandboxctl"));
    assert_eq!(created.code, 0, "{}", created.stderr);
    let sandbox: Value = serde_json::from_slice(&created.stdout).expect("JSON");
    sandbox.as_array().map_or(sandbox.clone(), |list| list[0].clone())
}

fn remove_of_other_team(world: &World, sandbox: &Value) {
    let token = world.variable("LAB_OTHER_TEAM_TOKEN");
    let mut command: Command = world.command_with_token(&["rm", id(sandbox)], &token);
    let removed = ran(command.output().expect("sandboxctl"));
    assert_eq!(removed.code, 0, "{}", removed.stderr);
}

/// A sandbox as its neighbours see it.
struct Seen {
    vmid: u64,
    ip: String,
    mac: String,
}

fn seen(sandbox: &Value) -> Seen {
    let ip = sandbox["ip"].as_str().expect("an address").to_owned();
    let bytes = ip.split('.').map(|part| format!("{:02x}", part.parse::<u8>().expect("a byte")));
    let mac = format!("02:50:{}", bytes.collect::<Vec<_>>().join(":"));
    Seen { vmid: vmid(sandbox), ip, mac }
}

/// Lets the first sandbox send as the second, and tells which of its frames had an effect.
fn spoofs(world: &World, from: &Seen, victim: &Seen) -> BTreeMap<&'static str, bool> {
    let port = |seen: &Seen| format!("veth{}i0", seen.vmid);
    let (own, other) = (port(from), port(victim));
    world.shell(
        "node1",
        "nft delete table bridge probe 2>/dev/null; nft delete table inet probe 2>/dev/null; true",
    );
    world.shell(
        "node1",
        "nft 'add table inet probe; \
         add chain inet probe lldp { type filter hook input priority 300; }; \
         add chain inet probe broadcast { type filter hook input priority 300; }; \
         add rule inet probe lldp udp dport 4343 counter; \
         add rule inet probe broadcast udp dport 4344 counter'",
    );
    world.shell(
        "node1",
        &format!(
            "nft 'add table bridge probe; \
             add chain bridge probe seen {{ type filter hook input priority 300; }}; \
             add chain bridge probe out {{ type filter hook postrouting priority 300; }}; \
             add rule bridge probe seen iifname \"{own}\" ip saddr {} udp dport 4242 counter; \
             add rule bridge probe out oifname \"{other}\" udp sport 67 counter'",
            victim.ip
        ),
    );
    let counted = |chain: &str| {
        let text = world.shell("node1", &format!("nft list chain {chain}"));
        assert!(text.contains("counter"), "{text}");
        !text.contains("packets 0 ")
    };
    let host = world.shell("node1", "cat /sys/class/net/vmbr0/address").trim().to_owned();
    let send = |kind: &str| {
        let args = [&victim.mac, &victim.ip, &from.mac, &host, "10.100.1.1", kind, &from.ip];
        python(world, from.vmid, SPOOF, &args.map(str::to_owned));
    };
    // The victim speaks first, so that host and bridge know where it is.
    let speak = || {
        let name_server = [("dns", "10.99.1.3/53".to_owned())].into();
        probe(world, victim.vmid, &name_server);
    };
    let mut found = BTreeMap::new();
    speak();
    send("arp");
    let neighbour = world.shell("node1", &format!("ip neigh show {} dev vmbr0", victim.ip));
    assert!(neighbour.contains("lladdr"), "{neighbour}");
    found.insert("arp", !neighbour.contains(&victim.mac));
    world.shell("node1", &format!("ip neigh flush to {} dev vmbr0", victim.ip));
    speak();
    send("mac");
    let learnt =
        world.shell("node1", &format!("bridge fdb show br vmbr0 | grep '^{}'", victim.mac));
    assert!(learnt.contains("dev"), "{learnt}");
    found.insert("mac", learnt.contains(&own));
    speak();
    send("ip");
    found.insert("ip", counted("bridge probe seen"));
    send("dhcp");
    found.insert("dhcp", counted("bridge probe out"));
    // Frames that the bridge hands to the host without a look, and addresses that are no host's.
    for kind in ["lldp", "broadcast"] {
        send(kind);
        found.insert(kind, counted(&format!("inet probe {kind}")));
    }
    world.shell("node1", "nft delete table bridge probe; nft delete table inet probe");
    speak();
    found
}

fn link_local(world: &World, line: &str) -> Option<String> {
    let text = world.shell("node1", &format!("{line} ip -6 -o addr show dev eth0 scope link"));
    let word = text.split_whitespace().find(|word| word.starts_with("fe80:"))?;
    Some(word.split('/').next()?.to_owned())
}

#[test]
fn sandbox_reaches_the_world_and_nothing_beside_it() {
    let Some(world) = world() else { return };
    let lan = Lan::new(&world);
    let one = world.create(&["--node", "node1"]);
    let two = of_other_team(&world);
    let (own, other) = (seen(&one), seen(&two));
    let page = format!("port-8000-vm-{}.sandbox.localhost", other.vmid);
    wait("the neighbour's page", || get(node(&two), &page).0 == 200);

    let mut closed = BTreeMap::from([
        ("neighbour", format!("{}/8000", other.ip)),
        ("gateway, ssh", "10.100.1.1/22".to_owned()),
        ("agent", "10.99.0.1/7445".to_owned()),
        ("ingress", "10.99.0.1/8480".to_owned()),
        ("private address of the host", "192.168.77.1/22".to_owned()),
        ("public address of the host", "203.0.113.1/22".to_owned()),
        ("private network", "192.168.77.2/80".to_owned()),
        ("metadata", "169.254.169.254/80".to_owned()),
        ("name server, another port", "10.99.1.3/80".to_owned()),
    ]);
    let bridge = world.shell("node1", "ip -6 -o addr show dev vmbr0 scope link");
    let bridge = bridge.split_whitespace().find(|word| word.starts_with("fe80:"));
    let of_other = link_local(&world, &format!("lxc-attach -n {} --", other.vmid));
    if let (Some(host), Some(neighbour)) = (bridge, of_other) {
        let host = host.split('/').next().expect("an address");
        closed.insert("host, IPv6", format!("{host}%eth0/22"));
        closed.insert("neighbour, IPv6", format!("{neighbour}%eth0/8000"));
    } else {
        println!("the sandboxes have no IPv6 here: it is not probed");
    }
    let open = BTreeMap::from([
        ("public network", "203.0.113.2/80".to_owned()),
        ("name server", "10.99.1.3/53".to_owned()),
    ]);
    let all = |reached: &BTreeMap<String, bool>, is: bool| {
        let wrong: Vec<_> = reached.iter().filter(|(_, reached)| **reached != is).collect();
        assert!(wrong.is_empty(), "expected {is}, found {wrong:?}");
    };
    let isolated = |world: &World| {
        all(&probe(world, own.vmid, &closed), false);
        all(&probe(world, own.vmid, &open), true);
        let drawn = spoofs(world, &own, &other);
        assert!(drawn.values().all(|drawn| !drawn), "{drawn:?}");
        assert_eq!(get(node(&two), &page).0, 200, "the neighbour's page");
    };
    isolated(&world);

    // The rules outlive their agent.
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    isolated(&world);
    wait("the agent again", || world.ctl(&["exec", id(&one), "--", "true"]).code == 0);
    isolated(&world);

    // Without the rules every probe gets through, so each of them proves something.
    let held = Held::new(&world);
    world.shell("node1", "nft delete table bridge pve_sandbox; nft delete table inet pve_sandbox");
    world.shell("node1", "echo 0 >/sys/class/net/vmbr0/bridge/no_linklocal_learn");
    // Not at the first try: a kernel that has just found no neighbour waits before it asks again.
    let through = |targets: &BTreeMap<&str, String>| {
        wait("every probe to get through", || {
            probe(&world, own.vmid, targets).values().all(|reached| *reached)
        })
    };
    through(&closed);
    through(&open);
    let drawn = spoofs(&world, &own, &other);
    assert!(drawn.values().all(|drawn| *drawn), "{drawn:?}");
    drop(held);

    // The agent puts them back, and tells.
    wait("the rules again", || {
        world.shell("node1", "nft list tables").matches("pve_sandbox").count() == 2
    });
    wait("a finding", || world.ctl(&["fsck"]).text().contains("isolation rules"));
    isolated(&world);

    remove_of_other_team(&world, &two);
    drop(lan);
    world.finish();
}
