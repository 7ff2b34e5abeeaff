//! Addresses: a tenant changes its own interface, and answers other sandboxes' DHCP.

use serde_json::Value;

use crate::{
    http::get,
    world::{World, id, node, vmid, wait, world},
};

/// Tells everybody on the bridge, repeatedly, that the DHCP server gives `IP` to `MAC`.
const ROGUE: &str = r#"
import socket, struct, sys, time
mac, ip, server = bytes.fromhex(sys.argv[1]), socket.inet_aton(sys.argv[2]), socket.inet_aton(sys.argv[3])
message = bytes([2, 1, 6, 0]) + b"\x07" * 4 + bytes(8) + ip + server + bytes(4) + mac + bytes(10 + 192)
message += bytes([99, 130, 83, 99, 53, 1, 5, 54, 4]) + server + bytes([51, 4, 0, 0, 14, 16, 255])
udp = struct.pack("!HHHH", 67, 68, 8 + len(message), 0) + message
head = bytes([0x45, 0]) + struct.pack("!H", 20 + len(udp)) + bytes([0, 0, 0, 0, 64, 17, 0, 0]) + server + b"\xff" * 4
total = sum(struct.unpack("!10H", head))
total = (total & 0xffff) + (total >> 16)
head = head[:10] + struct.pack("!H", 0xffff ^ total) + head[12:]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
open("/run/rogue", "w").close()
while True:
    s.send(b"\xff" * 6 + bytes.fromhex("02000000beef") + b"\x08\x00" + head + udp)
    time.sleep(0.02)
"#;

fn ip(sandbox: &Value) -> &str {
    sandbox["ip"].as_str().unwrap_or_default()
}

/// Adds addresses to the sandbox's interface as its root, at every boot from now on.
fn adds(world: &World, sandbox: &str, addresses: [&str; 2]) {
    let [one, two] = addresses
        .map(|address| format!("ExecStart=/usr/bin/env ip address add {address} dev eth0\n"));
    let unit = format!(
        "[Unit]\nAfter=networking.service\n[Service]\nType=oneshot\n{one}{two}\
         [Install]\nWantedBy=multi-user.target\n"
    );
    let line = format!(
        "printf '{}' >/etc/systemd/system/more.service && systemctl enable --now more.service",
        unit.replace('\n', "\\n")
    );
    let ran = world.ctl(&["exec", sandbox, "--shell", &line]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

fn restart(world: &World, sandbox: &str) -> Value {
    world.json(&["stop", sandbox]);
    world.wait_phase(sandbox, "stopped");
    world.json(&["start", sandbox]);
    let started = world.wait_phase(sandbox, "running");
    let more = ["exec", sandbox, "--shell", "ip -4 address show dev eth0"];
    wait("the tenant's address", || world.ctl(&more).text().contains("10.100.0.7/32"));
    started
}

#[test]
fn tenant_that_adds_addresses_keeps_its_lease() {
    let Some(world) = world() else { return };
    for dhcp in [false, true] {
        let mut args = vec!["--node", "node1", "--expose", "web=8000"];
        args.extend(dhcp.then_some("--dhcp"));
        let sandbox = world.create(&args);
        let own = id(&sandbox).to_owned();
        let before = ip(&sandbox).to_owned();
        let last: u8 = before.rsplit('.').next().and_then(|n| n.parse().ok()).expect("an address");
        assert_eq!(last >= 240, dhcp, "{before}: the server's range is at the end of the network");
        let host = format!("port-8000-vm-{}.sandbox.localhost", vmid(&sandbox));
        wait("its page", || get(node(&sandbox), &host).0 == 200);
        // Lower than its own: one outside the network and one inside.
        adds(&world, &own, ["10.100.0.7/32", "10.100.1.232/32"]);
        let after = restart(&world, &own);
        let address = ip(&after);
        if dhcp {
            let last: u8 = address.rsplit('.').next().and_then(|n| n.parse().ok()).expect("one");
            assert!(address.starts_with("10.100.1.") && last >= 240, "{address}");
        } else {
            assert_eq!(address, before);
        }
        wait("its page", || get(node(&after), &host).0 == 200);
        world.fsck();
    }
    world.finish();
}

#[test]
fn dhcp_server_inside_a_sandbox_gives_no_address_to_others() {
    let Some(world) = world() else { return };
    let rogue = world.create(&["--node", "node1"]);
    let victim = world.create(&["--node", "node1", "--dhcp"]);
    let rogue = id(&rogue).to_owned();
    let ran =
        world.ctl_with(&["exec", "-i", &rogue, "--", "tee", "/root/rogue.py"], ROGUE.as_bytes());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let mac = format!("0251{:08x}", vmid(&victim));
    let line = format!(
        "setsid python3 /root/rogue.py {mac} 10.100.1.235 10.100.1.1 >/root/log 2>&1 </dev/null & exit 0"
    );
    assert_eq!(world.ctl(&["exec", &rogue, "--shell", &line]).code, 0);
    wait("the rogue to send", || {
        world.ctl(&["exec", &rogue, "--shell", "cat /root/log; test -e /run/rogue"]).code == 0
    });
    let own = id(&victim).to_owned();
    world.json(&["stop", &own]);
    world.wait_phase(&own, "stopped");
    world.json(&["start", &own]);
    let started = world.wait_phase(&own, "running");
    assert_ne!(ip(&started), "10.100.1.235");
    assert!(ip(&started).starts_with("10.100.1."), "{started}");
    world.fsck();
    world.finish();
}

#[test]
fn changed_net0_is_reported_and_the_sandbox_is_not_started() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2"]);
    let (own, number) = (id(&sandbox).to_owned(), vmid(&sandbox));
    let before = world.shell("node2", &format!("grep '^net0:' /etc/pve/lxc/{number}.conf"));
    let before = before.trim().trim_start_matches("net0: ").to_owned();
    let put = |net0: &str| {
        world.shell("node2", &format!("pct set {number} --net0 {net0} && echo done"));
    };
    world.json(&["stop", &own]);
    world.wait_phase(&own, "stopped");
    put(&before.replace(&format!("ip={}", ip(&sandbox)), "ip=10.100.2.236"));
    let said = world.ctl(&["fsck"]);
    assert_ne!(said.code, 0, "{}", said.text());
    let (reason, message) = world.refused(&["start", &own]);
    assert_eq!(reason, "ADDRESS_CONFLICT", "{message}");
    assert!(message.contains(ip(&sandbox)), "what it is to be: {message}");
    put(&before);
    world.json(&["start", &own]);
    world.wait_phase(&own, "running");
    world.fsck();
    world.finish();
}
