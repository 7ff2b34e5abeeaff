//! What one sandbox uses up is not used up for others.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    isolation::{Held, Lan, probe, python},
    world::{id, node, vmid, wait, world},
};

/// Starts processes until it cannot, and leaves them running.
const FORK_BOMB: &str = "(while :; do sleep 600 & done) 2>/dev/null; exec sleep 600";

#[test]
fn fork_bomb_reaches_the_limit_of_its_sandbox_and_no_other() {
    let Some(world) = world() else { return };
    let (bomb, other) = (world.create(&["--node", "node1"]), world.create(&["--node", "node1"]));
    // A lab node sees the machine's v1 hierarchies there.
    let dirs = ["/run/lab/cgroup/pids", "/sys/fs/cgroup"];
    let number = |file: &str| {
        let files = dirs.map(|dir| format!("{dir}/lxc/{}/{file}", vmid(&bomb)));
        let script = format!("cat {} 2>/dev/null || cat {}", files[0], files[1]);
        let said = world.node(node(&bomb)).exec(["/bin/sh", "-c", &script]).expect("cat");
        String::from_utf8_lossy(&said.stdout).trim().parse::<u64>().ok()
    };
    let max = number("pids.max").expect("a limit in the cgroup");

    let ran = world.ctl(&["exec", "--detach", id(&bomb), "--", "sh", "-c", FORK_BOMB]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    // The shell that could not start another has ended.
    wait("the bomb to reach the limit", || {
        number("pids.current").is_some_and(|now| now + 2 >= max)
    });
    wait("what is left to be filled up", || {
        world.ctl(&["exec", "--detach", id(&bomb), "--", "sleep", "600"]).code != 0
    });
    // Its neighbour does not notice.
    let ran = world.ctl(&["exec", id(&other), "--", "echo", "fine"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "fine"), "{}", ran.stderr);
    // In the same sandbox nothing more can be started, and the error says so.
    let begun = Instant::now();
    let (reason, message) = world.refused(&["exec", id(&bomb), "--", "true"]);
    assert_eq!(reason, "EXEC_FAILED", "{message}");
    assert!(message.contains("too many processes"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(15));
    // It can be stopped, and its next boot is limited, too.
    let ran = world.ctl(&["stop", id(&bomb)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = world.ctl(&["start", id(&bomb)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(number("pids.max"), Some(max));
    let ran = world.ctl(&["exec", id(&bomb), "--", "echo", "again"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "again"), "{}", ran.stderr);
    world.finish();
}

/// Limits on the use of disks that agents set unless they are told otherwise, as cgroup files write them.
const IO_V1: [(&str, &str); 4] = [
    ("blkio.throttle.read_bps_device", "268435456"),
    ("blkio.throttle.write_bps_device", "134217728"),
    ("blkio.throttle.read_iops_device", "20000"),
    ("blkio.throttle.write_iops_device", "10000"),
];
const IO_V2: &str = "rbps=268435456 wbps=134217728 riops=20000 wiops=10000";

#[test]
fn use_of_disks_is_limited_in_each_boot_or_fsck_says_that_it_is_not() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node1"]);
    // A lab node sees the machine's v1 hierarchies there.
    let v1 = format!("/run/lab/cgroup/blkio/lxc/{}", vmid(&sandbox));
    let v2 = format!("/sys/fs/cgroup/lxc/{}/io.max", vmid(&sandbox));
    let shell = |script: &str| world.shell("node1", script);
    // On both, a line begins with the number of the device.
    let values = |file: &str| -> Vec<String> {
        let text = shell(&format!("cat {file}"));
        text.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim().to_owned())).collect()
    };
    let has_v1 = shell("test -e /run/lab/cgroup/blkio && echo yes; true").contains("yes");
    let has_v2 =
        || shell("cat /sys/fs/cgroup/cgroup.controllers").split_whitespace().any(|c| c == "io");
    let check = |when: &str| {
        if has_v1 {
            for (file, value) in IO_V1 {
                assert_eq!(values(&format!("{v1}/{file}")), [value], "{when}: {file}");
            }
        } else if has_v2() {
            assert_eq!(values(&v2), [IO_V2], "{when}");
        } else {
            let ran = world.ctl(&["fsck"]);
            assert!(ran.text().contains("no cgroup controller `io`"), "{when}: {}", ran.text());
        }
    };
    check("after its creation");
    for verb in ["stop", "start"] {
        let ran = world.ctl(&[verb, id(&sandbox)]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    check("after a restart");
    let ran = world.ctl(&["exec", id(&sandbox), "--", "echo", "fine"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "fine"), "{}", ran.stderr);
    if has_v1 || has_v2() {
        world.finish();
    }
}

/// Sends a datagram to each port of a public address, from the first to the last argument.
const FLOOD: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for port in range(int(sys.argv[1]), int(sys.argv[2])):
    try:
        s.sendto(b"x", ("203.0.113.2", port))
    except OSError:
        pass
"#;

#[test]
fn flood_of_connections_reaches_the_limit_of_its_sandbox_and_no_other() {
    let Some(world) = world() else { return };
    let lan = Lan::new(&world);
    let (flood, other) = (world.create(&["--node", "node1"]), world.create(&["--node", "node1"]));
    let rules = || world.shell("node1", "nft list chain inet pve_sandbox connections");
    let limit = rules()
        .split_once("ct count over ")
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<u64>().ok());
    let limit = limit.expect("this kernel counts connections");
    let tracked = || -> u64 {
        let text = world.shell("node1", "cat /proc/sys/net/netfilter/nf_conntrack_count");
        text.trim().parse().expect("a number")
    };
    let send = |from: u64| {
        let ports = [from, from + 3 * limit].map(|port| port.to_string());
        python(&world, vmid(&flood), FLOOD, &ports);
    };
    // Closed connections are tracked for two minutes: those of earlier tests, and some that begin meanwhile.
    let others = tracked() + 200;
    send(10_000);
    let bounded = tracked();
    assert!((limit / 2..limit + others).contains(&bounded), "{bounded} of {limit}, and {others}");
    let public = BTreeMap::from([("public network", "203.0.113.2/80".to_owned())]);
    assert!(probe(&world, vmid(&other), &public)["public network"], "the neighbour");
    // What comes in is not counted.
    let ran = world.ctl(&["exec", id(&flood), "--", "true"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    // Without the rule all of them are tracked, so the count above proves something.
    let held = Held::new(&world);
    world.shell("node1", "nft flush chain inet pve_sandbox connections");
    send(20_000);
    assert!(tracked() > 2 * limit + others, "{} of {limit}, and {others}", tracked());
    drop(held);
    wait("the rule again", || rules().contains("ct count over"));
    drop(lan);
    world.finish();
}
