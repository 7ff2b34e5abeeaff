//! A sandbox with an allow-list: it reaches the addresses of its names, and nothing else.

use std::collections::BTreeMap;

use lab::daemons::AGENT;
use serde_json::Value;

use crate::{
    isolation::{Held, Lan, probe, python},
    world::{PATIENCE, World, id, vmid, wait, world},
};

/// Name server: `allowed` and `second` are names of the list, `inside` has a private address.
const SERVER: &str = r#"
import socket
names = {b"allowed": "203.0.113.2", b"other": "203.0.113.3", b"second": "203.0.113.4", b"inside": "192.168.77.2"}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("10.99.1.3", 53))
while True:
    query, sender = s.recvfrom(2000)
    label = query[13:13 + query[12]].lower()
    end = query.index(b"\0", 12) + 5
    found = socket.inet_aton(names[label]) if label in names else b""
    flags = b"\x81\x80" if found else b"\x81\x83"
    head = query[:2] + flags + b"\0\1" + (b"\0\1" if found else b"\0\0") + bytes(4)
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + found if found else b""
    s.sendto(head + query[12:end] + answer, sender)
"#;

/// Asks each name server that is given for a name, by UDP, and prints the code of its answer.
const ASK: &str = r#"
import socket, struct, sys
name, servers = sys.argv[1], sys.argv[2:]
labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
for server in servers:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    try:
        s.sendto(struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1", (server, 53))
        print(s.recv(2000)[3] & 15)
    except OSError:
        print("none")
"#;

/// Network beside node1 with four public addresses, and a name server in it. That runs in the file system
/// of a sandbox, which has what it takes.
struct Outside<'a> {
    world: &'a World,
    _lan: Lan,
}

impl<'a> Outside<'a> {
    fn new(world: &'a World, of: u64) -> Self {
        let outside = Self { world, _lan: Lan::new(world) };
        world.shell(
            "node1",
            &format!(
                "set -e; ip -n lan addr add 203.0.113.3/24 dev eth0; ip -n lan addr add 203.0.113.4/24 dev eth0; \
                 init=$(lxc-info -n {of} -p -H); \
                 setsid ip netns exec lan nsenter --mount=/proc/$init/ns/mnt /usr/bin/python3 -c '{SERVER}' \
                 >/dev/null 2>&1 </dev/null &"
            ),
        );
        outside
    }
}

impl Drop for Outside<'_> {
    fn drop(&mut self) {
        self.world.shell("node1", "ip netns pids lan | xargs -r kill");
    }
}

#[test]
fn sandbox_with_an_allow_list_reaches_its_names_alone() {
    let Some(world) = world() else { return };
    let open = world.create(&["--node", "node1"]);
    let outside = Outside::new(&world, vmid(&open));
    let list = "allow=allowed.example.org,second.example.org,inside.example.org";
    let listed = world.create(&["--node", "node1", "--egress", list]);
    assert_eq!(
        (&listed["egress"], &listed["egress_names"][0]),
        (&"allow".into(), &"allowed.example.org".into())
    );
    let reaches = |sandbox: &Value, target: &str| {
        let targets = BTreeMap::from([("it", format!("{target}/80"))]);
        probe(&world, vmid(sandbox), &targets)["it"]
    };
    let asks = |sandbox: &Value, name: &str| {
        let servers = ["10.99.1.3", "203.0.113.2"];
        let args: Vec<_> = [name].iter().chain(&servers).map(|word| (*word).to_owned()).collect();
        let codes = python(&world, vmid(sandbox), ASK, &args);
        codes.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    // The open one reaches all of it, so the probes prove something.
    wait("the name server", || reaches(&open, "allowed.example.org"));
    for target in ["other.example.org", "203.0.113.2", "203.0.113.3", "203.0.113.4"] {
        assert!(reaches(&open, target), "{target}");
    }

    // An address is closed until its name was asked for, and every name server is the resolver.
    assert!(!reaches(&listed, "203.0.113.2"));
    assert!(reaches(&listed, "allowed.example.org") && reaches(&listed, "203.0.113.2"));
    for target in ["other.example.org", "inside.example.org", "203.0.113.3", "192.168.77.2"] {
        assert!(!reaches(&listed, target), "{target}");
    }
    assert_eq!(asks(&listed, "allowed.example.org"), ["0"; 2]);
    assert_eq!(asks(&listed, "other.example.org"), ["5"; 2], "refused");
    assert_eq!(world.ctl(&["exec", id(&listed), "--", "true"]).code, 0);

    // Without the agent there are no answers: nothing new is reached, and what is open goes on.
    let held = Held::new(&world);
    assert!(!reaches(&listed, "second.example.org") && !reaches(&listed, "203.0.113.4"));
    assert!(reaches(&listed, "203.0.113.2"));
    drop(held);
    wait("answers again", || reaches(&listed, "second.example.org"));
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    assert!(reaches(&listed, "203.0.113.2"));
    wait("the next agent", || world.ctl(&["exec", id(&listed), "--", "true"]).code == 0);
    assert!(reaches(&listed, "203.0.113.2"), "it has kept the address");

    // A tighter list counts at once.
    wait("answers of the next agent", || reaches(&listed, "second.example.org"));
    let tighter = world.json(&["egress", id(&listed), "allow=second.example.org"]);
    assert_eq!(tighter["egress_names"], serde_json::json!(["second.example.org"]));
    assert!(!reaches(&listed, "203.0.113.2") && !reaches(&listed, "allowed.example.org"));
    assert!(reaches(&listed, "second.example.org") && reaches(&listed, "203.0.113.4"));
    assert_eq!(world.json(&["egress", id(&listed), "none"])["egress"], "none");
    assert!(!reaches(&listed, "203.0.113.4"));
    drop(outside);
    world.finish();
}
