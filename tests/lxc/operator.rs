//! Actions of an operator with `pct`, and containers that are adopted and given back.

use crate::world::{World, id, vmid, wait, world};

/// Id outside every node's part of the range, as an operator may choose it.
const THEIRS: u32 = 300_207;

/// Creates a container as people make them by hand.
fn make(world: &World) -> String {
    world.shell(
        "node2",
        &format!(
            "set -e; cd /; pct clone 9001 {THEIRS} --hostname pvelxc-1a2b3c4d \
               --description 'cmux-execd-auth-token=0123' >/dev/null; \
             pct set {THEIRS} --net0 name=eth0,bridge=vmbr0,ip=10.100.2.238/24,gw=10.100.2.1 >/dev/null; \
             pct start {THEIRS} >/dev/null; cat /etc/pve/lxc/{THEIRS}.conf"
        ),
    )
}

fn init(world: &World) -> String {
    let line = format!("head -n 1 /sys/fs/cgroup/lxc/{THEIRS}/ns/init.scope/cgroup.procs");
    world.shell("node2", &line)
}

#[test]
fn container_is_adopted_released_and_adopted_again() {
    let Some(world) = world() else { return };
    let config = |world: &World| world.shell("node2", &format!("cat /etc/pve/lxc/{THEIRS}.conf"));
    let number = THEIRS.to_string();
    let before = make(&world);
    wait("its init", || !init(&world).trim().is_empty());
    let pid = init(&world);

    let adopt = ["adopt", &number, "--team", "demo"];
    let told = world.json(&adopt);
    assert_eq!((&told["adopted"], &told["sandbox"]["phase"]), (&false.into(), &"running".into()));
    assert_eq!(told["volumes"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(config(&world), before, "only told");

    let adopted = world.json(&[&adopt[..], &["--yes"]].concat());
    let own = id(&adopted["sandbox"]).to_owned();
    assert_eq!(adopted["sandbox"]["ip"], "10.100.2.238");
    assert_eq!(world.ctl(&["exec", &own, "--", "hostname"]).text(), "pvelxc-1a2b3c4d\n");
    world.json(&["pause", &own]);
    world.json(&["resume", &own]);
    world.fsck();

    assert_eq!(world.ctl(&["release", &own]).code, 0);
    assert_eq!(config(&world), before, "as it was, byte for byte");
    assert_eq!(init(&world), pid, "and it ran on");
    let (reason, _) = world.refused(&["exec", &own, "--", "true"]);
    assert_eq!(reason, "SANDBOX_DELETED");
    world.fsck();

    let again = world.json(&[&adopt[..], &["--yes"]].concat());
    let again = id(&again["sandbox"]).to_owned();
    assert_ne!(again, own, "another sandbox");
    let log = world.ctl(&["events", &again]).text();
    assert!(log.contains("ADOPT_ASKED") || log.contains("adopt_asked"), "{log}");
    assert_eq!(world.ctl(&["rm", &again]).code, 0);
    assert_eq!(world.left_of("node2", THEIRS.into()), "");
    world.finish();
}

#[test]
fn changes_made_with_pct_are_recorded() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--node", "node2"]);
    let (own, number) = (id(&sandbox).to_owned(), vmid(&sandbox));
    world.shell("node2", &format!("cd /; pct stop {number} >/dev/null"));
    let stopped = world.wait_phase(&own, "stopped");
    assert_eq!(stopped["cause"], "found_down");

    world.shell("node2", &format!("cd /; pct start {number} >/dev/null"));
    let started = world.wait_phase(&own, "running");
    assert_eq!((&started["cause"], &started["boot"]), (&"found_up".into(), &2.into()));
    assert_eq!(world.ctl(&["exec", &own, "--", "true"]).code, 0);

    world.shell(
        "node2",
        &format!("cd /; pct stop {number} >/dev/null; pct destroy {number} >/dev/null"),
    );
    wait("it to be noted as gone", || world.get(&own)["failure"]["reason"] == "CONTAINER_GONE");
    let (reason, why) = world.refused(&["start", &own]);
    assert_eq!(reason, "NOT_OURS", "{why}");
    assert_eq!(world.ctl(&["rm", &own]).code, 0);
    world.finish();
}
