//! The shim of a sandbox as a process of its node: its cgroup and its resource usage.

use std::time::Duration;

use crate::world::{World, id, node, vmid, wait, world};

/// Returns the pids of a sandbox's shims.
fn shims(world: &World, node: &str, id: &str) -> Vec<u32> {
    let found = world.shell(node, &format!("pgrep -f '[s]him .*{id}'"));
    found.lines().filter_map(|line| line.parse().ok()).collect()
}

fn cgroup(world: &World, node: &str, vmid: u64) -> Vec<u32> {
    let procs = format!("cat /sys/fs/cgroup/pve-sandbox/{vmid}/cgroup.procs 2>/dev/null");
    world.shell(node, &procs).lines().filter_map(|line| line.parse().ok()).collect()
}

fn is_there(world: &World, node: &str, vmid: u64) -> bool {
    !world.shell(node, &format!("ls -d /sys/fs/cgroup/pve-sandbox/{vmid}")).is_empty()
}

#[test]
fn killed_shim_is_replaced_in_its_own_cgroup() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let (id, vmid, node) = (id(&sandbox), vmid(&sandbox), node(&sandbox).to_owned());
    assert_eq!(world.ctl(&["exec", id, "--", "true"]).code, 0);
    let [shim] = shims(&world, &node, id)[..] else { panic!("one shim") };
    assert!(cgroup(&world, &node, vmid).contains(&shim), "{:?}", cgroup(&world, &node, vmid));
    // Beside the container's cgroup: not frozen with it, and without processes from inside.
    let inside = world.ctl(&["exec", id, "--", "cat", "/proc/self/cgroup"]).stdout;
    assert!(!String::from_utf8_lossy(&inside).contains("pve-sandbox"), "{inside:?}");
    assert_eq!(world.ctl(&["pause", id]).code, 0);
    let events = format!("cat /sys/fs/cgroup/pve-sandbox/{vmid}/cgroup.events");
    assert!(world.shell(&node, &events).contains("frozen 0"));
    assert_eq!(world.ctl(&["resume", id]).code, 0);

    // A restarted agent finds the shim unchanged.
    let services = world.node(&node).services().expect("services");
    services.kill(lab::daemons::AGENT, false, Duration::from_secs(30)).expect("killed");
    wait("the agent", || world.ctl(&["exec", id, "--", "true"]).code == 0);
    assert_eq!(shims(&world, &node, id), [shim]);
    assert!(cgroup(&world, &node, vmid).contains(&shim));

    // A killed shim is replaced by another one in the same cgroup.
    world.shell(&node, &format!("kill -9 {shim}"));
    wait("another shim", || world.ctl(&["exec", id, "--", "true"]).code == 0);
    let [next] = shims(&world, &node, id)[..] else { panic!("one shim") };
    assert_ne!(next, shim);
    assert!(cgroup(&world, &node, vmid).contains(&next));

    // If it is killed with its sandbox, the agent removes its cgroup.
    world.shell(&node, &format!("kill -9 {next}"));
    assert_eq!(world.ctl(&["rm", id]).code, 0);
    wait("the cgroup's end", || {
        world.fsck();
        !is_there(&world, &node, vmid)
    });
    world.finish();
}

#[test]
fn shim_cgroup_is_removed_with_its_sandbox() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let (id, vmid, node) = (id(&sandbox), vmid(&sandbox), node(&sandbox).to_owned());
    assert_eq!(world.ctl(&["exec", id, "--", "true"]).code, 0);
    assert!(is_there(&world, &node, vmid));
    assert_eq!(world.ctl(&["rm", id]).code, 0);
    wait("the cgroup's end", || !is_there(&world, &node, vmid));
    world.finish();
}

#[test]
fn cpu_time_of_the_shim_is_counted_in_its_cgroup() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let (id, vmid, node) = (id(&sandbox), vmid(&sandbox), node(&sandbox).to_owned());
    // Without a reader: only the shim reads the pipe.
    let yes = ["exec", "--exec-id", "yes", "--detach", id, "--", "yes"];
    assert_eq!(world.ctl(&yes).code, 0);
    let stat = format!("cat /sys/fs/cgroup/pve-sandbox/{vmid}/cpu.stat");
    let used = || {
        let text = world.shell(&node, &stat);
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        line.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
    };
    let before = used();
    wait("the shim's work", || used() > before + 300_000);
    assert_eq!(world.ctl(&["kill", "-s", "9", id, "yes"]).code, 0);
    world.finish();
}
