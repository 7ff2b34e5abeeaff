//! A failed creation leaves nothing behind and reports the error of `pct`.

use standin::faults::{Action, Rule};

use crate::world::{node, unique, vmid, wait, world};

/// Creates on node1 with a fault plan, and checks that the creation fails as expected.
fn fails(rules: &[Rule], expected: &str) {
    let Some(world) = world() else { return };
    world.faults("node1", rules);
    let key = unique("fails");
    let (reason, message) = world.refused(&["create", "--node", "node1", "--request-id", &key]);
    assert!(message.contains(expected), "{reason}: {message}");
    let tries = world.of_request(&key);
    for sandbox in &tries {
        assert_eq!(sandbox["phase"], "failed", "{sandbox}");
        assert_ne!(sandbox["failure"]["rollback"], "", "{sandbox}");
        assert_eq!(world.left_of(node(sandbox), vmid(sandbox)), "", "left behind");
    }
    world.faults("node1", &[]);
    // The next creation works.
    world.create(&["--node", "node1"]);
    world.finish();
}

#[test]
fn failed_start_leaves_nothing_and_reports_pct() {
    fails(
        &[Rule::once("start", "lxc-start", Action::Exit)
            .saying(255, "startup for container '100000' failed")
            .always()],
        "startup for container",
    );
}

#[test]
fn failed_configuration_leaves_nothing_and_reports_pct() {
    fails(
        &[Rule::once("set", "write", Action::Exit)
            .saying(255, "bridge 'vmbr0' does not exist")
            .always()],
        "bridge 'vmbr0' does not exist",
    );
}

#[test]
fn killed_clone_and_its_locks_are_cleaned_up() {
    let Some(world) = world() else { return };
    // Parent and worker die after the volume: the template stays locked, the volume unreferenced.
    world.faults("node1", &[Rule::once("clone", "volume", Action::DieAfter)]);
    let key = unique("killed");
    let ran = world.ctl(&["create", "--node", "node1", "--request-id", &key]);
    world.faults("node1", &[]);
    wait("the creation to end", || {
        world.of_request(&key).iter().all(|s| s["phase"] == "failed" || s["phase"] == "running")
    });
    for sandbox in world.of_request(&key) {
        if sandbox["phase"] == "running" {
            world.mine(crate::world::id(&sandbox));
        } else {
            assert_ne!(ran.code, 0);
            wait("nothing to be left", || world.left_of(node(&sandbox), vmid(&sandbox)).is_empty());
        }
    }
    world.create(&["--node", "node1"]);
    world.finish();
}

#[test]
fn creation_waits_while_the_storage_is_full() {
    let Some(world) = world() else { return };
    // Again and again: what was removed before is freed by the file system a while later.
    let fill = "free=$(($(df --output=avail -B1 /rpool/data | tail -n 1) - 67108864)); \
                [ $free -lt 1048576 ] || fallocate -l $free $(mktemp -u /rpool/data/.filler.XXXXXX); \
                sync -f /rpool/data";
    wait("the node to report it", || {
        world.shell("node2", fill);
        let nodes = world.json(&["nodes"]);
        let node = nodes.as_array().and_then(|n| n.iter().find(|n| n["id"] == "node2").cloned());
        node.is_some_and(|n| n["load"]["storage_free"].as_u64().is_some_and(|b| b < 200 << 20))
    });
    let why = world.json(&["explain", "--dry-run", "--node", "node2"]);
    let verdicts = why["nodes"].as_array().cloned().unwrap_or_default();
    // A creation that fits on no node waits for room.
    let key = unique("full");
    let ran = world.ctl(&["create", "--node", "node2", "--no-wait", "--request-id", &key]);
    let freed =
        world.shell("node2", "rm /rpool/data/.filler.* && sync -f /rpool/data && echo freed");
    assert_eq!(freed, "freed\n");
    assert!(
        verdicts.iter().any(|v| v["id"] == "node2" && v["filtered"] == "STORAGE_FULL"),
        "{why}"
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    wait("the creation to find room", || {
        world.of_request(&key).iter().any(|sandbox| sandbox["phase"] == "running")
    });
    for sandbox in world.of_request(&key) {
        world.mine(crate::world::id(&sandbox));
    }
    world.finish();
}
