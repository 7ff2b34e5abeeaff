//! Daemons, callers and nodes that die during an operation.

use std::process::Stdio;

use lab::daemons::{AGENT, CONTROLLER};
use standin::faults::{Action, Rule};

use crate::world::{PATIENCE, World, id, node, unique, vmid, wait, world};

/// Starts a creation on node1 that is slow at a step of `pct`; returns once it is known.
fn slow_create(world: &World, command: &str, step: &str, key: &str) -> std::process::Child {
    world.faults("node1", &[Rule::once(command, step, Action::SleepMs).lasting_ms(3000)]);
    let child = world
        .command(&["create", "--node", "node1", "--request-id", key])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sandboxctl");
    wait("pct to be in the middle", || {
        !world.shell("node1", &format!("pgrep -f '[t]ask UPID.*vz{command}'")).is_empty()
    });
    child
}

/// Checks that the creation of that key is finished or undone, and that an undone one left nothing.
#[track_caller]
fn settled(world: &World, key: &str) {
    wait("the creation to be finished or undone", || {
        let tries = world.of_request(key);
        !tries.is_empty() && tries.iter().all(|s| s["phase"] == "running" || s["phase"] == "failed")
    });
    let mut alive = 0;
    for sandbox in world.of_request(key) {
        if sandbox["phase"] == "running" {
            alive += 1;
            world.mine(id(&sandbox));
            assert_eq!(world.ctl(&["exec", id(&sandbox), "--", "true"]).code, 0);
        } else {
            wait("nothing to be left", || world.left_of(node(&sandbox), vmid(&sandbox)).is_empty());
        }
    }
    assert!(alive <= 1, "two sandboxes of one request_id");
}

fn agent_killed_in(command: &str, step: &str) {
    let Some(world) = world() else { return };
    let bystander = world.create(&["--node", "node1"]);
    let key = unique("killed");
    let mut child = slow_create(&world, command, step, &key);
    let services = world.node("node1").services().expect("services");
    services.kill(AGENT, false, PATIENCE).expect("kill -9");
    child.wait().expect("sandboxctl ends");
    settled(&world, &key);
    // The other sandbox still runs.
    assert_eq!(world.get(id(&bystander))["boot"], 1);
    assert_eq!(world.ctl(&["exec", id(&bystander), "--", "true"]).code, 0);
    world.finish();
}

#[test]
fn creation_is_finished_or_undone_after_agent_kill_in_the_clone() {
    agent_killed_in("clone", "volume");
}

#[test]
fn creation_is_finished_or_undone_after_agent_kill_in_the_start() {
    agent_killed_in("start", "lxc-start");
}

#[test]
fn controller_killed_during_a_creation_knows_it_afterwards() {
    let Some(world) = world() else { return };
    let key = unique("controller");
    let mut child = slow_create(&world, "clone", "volume", &key);
    world.lab.services().kill(CONTROLLER, false, PATIENCE).expect("kill -9");
    child.wait().expect("sandboxctl ends");
    wait("the controller again", || world.ctl(&["nodes"]).code == 0);
    settled(&world, &key);
    let again = world.create(&["--node", "node1", "--request-id", &key]);
    assert_eq!(world.of_request(&key).iter().filter(|s| s["phase"] == "running").count(), 1);
    assert_eq!(again["request_id"], key.as_str());
    world.finish();
}

#[test]
fn creation_is_finished_after_its_caller_is_killed() {
    let Some(world) = world() else { return };
    let key = unique("hangup");
    let mut child = slow_create(&world, "clone", "volume", &key);
    child.kill().expect("kill sandboxctl");
    child.wait().expect("dead");
    wait("the creation to be finished all the same", || {
        world.of_request(&key).iter().any(|sandbox| sandbox["phase"] == "running")
    });
    settled(&world, &key);
    world.finish();
}

#[test]
fn dead_node_is_unreachable_and_its_sandboxes_return_with_it() {
    let Some(world) = world() else { return };
    let there = world.create(&["--node", "node3"]);
    world.node("node3").kill().expect("power cut");
    world.wait_phase(id(&there), "unreachable");
    let (reason, _) = world.refused(&["exec", id(&there), "--", "true"]);
    assert_eq!(reason, "NODE_UNREACHABLE");
    let elsewhere = world.create(&[]);
    assert_ne!(node(&elsewhere), "node3");
    let (reason, message) = world.refused(&["create", "--node", "node3", "--wait", "5s"]);
    assert!(reason == "NO_CAPACITY" || reason == "NODE_UNREACHABLE", "{reason}: {message}");
    assert!(message.contains("node3"), "{message}");
    world.node("node3").boot().expect("boot");
    // A reboot is a power cut for a running sandbox: it is started again, with its disk.
    wait("it to run in its next boot", || {
        let now = world.get(id(&there));
        now["phase"] == "running" && now["boot"] == 2
    });
    assert_eq!(world.get(id(&there))["cause"], "node_rebooted");
    assert_eq!(world.ctl(&["exec", id(&there), "--", "true"]).code, 0);
    world.finish();
}
