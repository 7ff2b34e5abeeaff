//! A closed sandbox: nothing of its own gets out, and everything that is for it gets in.

use std::collections::BTreeMap;

use lab::daemons::AGENT;
use serde_json::Value;

use crate::{
    http::get,
    isolation::{Lan, errors, probe, python, seen},
    world::{PATIENCE, World, id, node, vmid, wait, world},
};

/// Sends by everything that a sandbox has: TCP, UDP, DNS, ICMP and IPv6.
const SEND: &str = r#"
import socket, struct
def attempt(send):
    try:
        send()
    except OSError:
        pass
def tcp(address, port):
    s = socket.socket()
    s.settimeout(0.5)
    s.connect((address, port))
def udp(address, port, body=b"x", family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.sendto(body, (address, port))
def ping(address):
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    total = sum(struct.unpack("!4H", echo))
    s.sendto(struct.pack("!BBHHH", 8, 0, 0xffff ^ total, 1, 1), (address, 0))
query = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + b"\x06secret\x07example\x03com\x00" + struct.pack("!2H", 1, 1)
for address in ["203.0.113.2", "192.168.77.2", "10.100.1.1", "10.99.1.3", "10.99.0.1"]:
    attempt(lambda: tcp(address, 80))
    attempt(lambda: tcp(address, 53))
    attempt(lambda: udp(address, 9))
    attempt(lambda: udp(address, 53, query))
    attempt(lambda: ping(address))
attempt(lambda: udp("255.255.255.255", 9))
attempt(lambda: udp("224.0.0.1", 9))
attempt(lambda: udp("ff02::1%eth0", 9, b"x", socket.AF_INET6))
"#;

/// Counters of what a sandbox sends of its own accord: to the host, through it, and over its bridge.
struct Counters<'a>(&'a World);

impl<'a> Counters<'a> {
    fn new(world: &'a World, sandbox: &Value) -> Self {
        let counters = Self(world);
        counters.remove();
        let ip = sandbox["ip"].as_str().expect("an address");
        let port = format!("veth{}i0", vmid(sandbox));
        world.shell(
            "node1",
            &format!(
                "nft 'add table inet probe; \
                 add chain inet probe to_host {{ type filter hook input priority 300; }}; \
                 add chain inet probe through {{ type filter hook forward priority 300; }}; \
                 add rule inet probe to_host ip saddr {ip} ct direction original counter; \
                 add rule inet probe through ip saddr {ip} counter; \
                 add table bridge probe; \
                 add chain bridge probe over {{ type filter hook forward priority 300; }}; \
                 add rule bridge probe over iifname \"{port}\" ether type != arp counter'"
            ),
        );
        counters
    }

    /// Returns which of the counters are above 0.
    fn above_zero(&self) -> Vec<&'static str> {
        let all = [("inet", "to_host"), ("inet", "through"), ("bridge", "over")];
        let counted = |(family, chain): &(&str, &str)| {
            let text = self.0.shell("node1", &format!("nft list chain {family} probe {chain}"));
            assert!(text.contains("counter"), "{text}");
            !text.contains("packets 0 ")
        };
        all.into_iter().filter(counted).map(|(_, chain)| chain).collect()
    }

    fn remove(&self) {
        let line = "nft delete table inet probe; nft delete table bridge probe; true";
        self.0.shell("node1", &format!("({line}) 2>/dev/null"));
    }
}

impl Drop for Counters<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

#[test]
fn nothing_leaves_a_closed_sandbox_and_its_callers_get_in() {
    let Some(world) = world() else { return };
    let lan = Lan::new(&world);
    let closed = world.create(&["--node", "node1", "--egress", "none", "--expose", "web=8000"]);
    let open = world.create(&["--node", "node1"]);
    assert_eq!((&closed["egress"], &open["egress"]), (&"none".into(), &"open".into()));
    let outside = BTreeMap::from([
        ("public network", "203.0.113.2/80".to_owned()),
        ("name server", "10.99.1.3/53".to_owned()),
    ]);
    let reached = |sandbox: &Value| {
        let found = probe(&world, vmid(sandbox), &outside);
        found.into_iter().filter(|(_, yes)| *yes).map(|(name, _)| name).collect::<Vec<_>>()
    };
    let sent = |sandbox: &Value| {
        let counters = Counters::new(&world, sandbox);
        python(&world, vmid(sandbox), SEND, &[]);
        counters.above_zero()
    };
    let page = format!("port-8000-vm-{}.sandbox.localhost", vmid(&closed));
    let is_closed = || {
        assert_eq!(reached(&closed), [""; 0]);
        assert_eq!(sent(&closed), [""; 0]);
        let told = errors(&world, &seen(&closed), &seen(&open));
        assert!(told.values().all(|told| !told), "{told:?}");
        wait("the sandbox's page", || get(node(&closed), &page).0 == 200);
    };
    is_closed();
    let ran = world.ctl(&["exec", id(&closed), "--", "echo", "in"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "in"), "{}", ran.stderr);
    // The same probes get out of an open one, so they prove something.
    assert_eq!(reached(&open).len(), 2);
    assert_eq!(sent(&open), ["to_host", "through"]);

    // It stays closed without the agent, with another one, and after a boot.
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    is_closed();
    wait("the agent again", || world.ctl(&["exec", id(&closed), "--", "true"]).code == 0);
    is_closed();
    for verb in ["stop", "start"] {
        let ran = world.ctl(&[verb, id(&closed)]);
        assert_eq!(ran.code, 0, "{verb}: {}", ran.stderr);
    }
    is_closed();

    // It is opened and closed again while it runs.
    assert_eq!(world.json(&["egress", id(&closed), "open"])["egress"], "open");
    assert_eq!(reached(&closed).len(), 2);
    assert_eq!(world.json(&["egress", id(&closed), "none"])["egress"], "none");
    is_closed();
    drop(lan);
    world.finish();
}

#[test]
fn team_that_may_have_nothing_open_gets_closed_sandboxes() {
    let Some(world) = world() else { return };
    let team = world.create(&[])["team"].as_str().expect("a team").to_owned();
    let most = |egress: &str| {
        let ran = world.ctl(&["team", "set", &team, "--egress", egress]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    };
    most("none");
    let (reason, message) = world.refused(&["create", "--egress", "open"]);
    let made = world.ctl(&["--json", "create"]);
    most("default");
    assert_eq!(reason, "EGRESS_REFUSED", "{message}");
    assert_eq!(made.code, 0, "{}", made.stderr);
    let made: Value = serde_json::from_slice(&made.stdout).expect("JSON");
    let made = made.as_array().map_or(made.clone(), |list| list[0].clone());
    world.mine(id(&made));
    assert_eq!(made["egress"], "none", "{made}");
    world.finish();
}
