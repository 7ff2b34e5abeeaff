//! Sandboxes that expire on a node whose controller is down.

use std::time::Instant;

use lab::daemons::CONTROLLER;

use crate::world::{PATIENCE, id, node, vmid, wait, world};

#[test]
fn sandboxes_expire_while_the_controller_is_down() {
    let Some(world) = world() else { return };
    let paused = world.create(&["--ttl", "4s", "--ttl-action", "pause"]);
    let deleted = world.create(&["--ttl", "4s", "--ttl-action", "delete"]);
    let services = world.lab.services();
    services.stop(CONTROLLER, PATIENCE).expect("stopped");
    wait("the node to delete it", || {
        world.left_of(node(&deleted), vmid(&deleted)).trim().is_empty()
    });
    services.start(CONTROLLER, PATIENCE).expect("started");
    wait("the controller to know", || {
        let told = world.ctl(&["--json", "get", id(&deleted)]);
        told.code == 0 && told.text().contains("\"phase\":\"deleted\"")
    });
    assert_eq!(world.get(id(&deleted))["cause"], "ttl");
    let paused_now = world.wait_phase(id(&paused), "paused");
    assert_eq!(paused_now["cause"], "ttl");
    // After a resume it has the full time again, and the time can be extended.
    assert_eq!(world.ctl(&["resume", id(&paused)]).code, 0);
    assert_eq!(
        world.json(&["lifetime", id(&paused), "--ttl", "never"])["expires_at"],
        serde_json::Value::Null
    );
    world.finish();
}

#[test]
fn idle_sandbox_is_paused_and_one_with_an_active_command_is_not() {
    let Some(world) = world() else { return };
    let rule = ["--idle", "10s", "--idle-action", "pause"];
    let [quiet, forgotten, writes, works] = [(); 4].map(|()| world.create(&rule));
    for (sandbox, line) in [
        // As a server that nobody asks anything.
        (&forgotten, "exec sleep 600"),
        (&writes, "while sleep 1; do echo on; done"),
        (&works, "while :; do :; done"),
    ] {
        let run = ["exec", "--exec-id", "run", "--detach", id(sandbox), "--shell", line];
        let ran = world.ctl(&run);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let begun = Instant::now();
    for sandbox in [&quiet, &forgotten] {
        let paused = world.wait_phase(id(sandbox), "paused");
        assert_eq!(paused["cause"], "idle");
    }
    assert!(begun.elapsed().as_secs() >= 5, "not at once");
    for sandbox in [&writes, &works] {
        assert_eq!(world.get(id(sandbox))["phase"], "running", "a command is active in it");
    }
    world.finish();
}
