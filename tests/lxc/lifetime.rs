//! Sandboxes that expire on a node whose controller is down.

use std::time::{Duration, Instant};

use lab::daemons::CONTROLLER;

use crate::{
    http::Socket,
    ingress::ECHO,
    world::{PATIENCE, id, node, vmid, wait, world},
};

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

#[test]
fn silent_websocket_keeps_no_sandbox_awake_but_bytes_and_cpu_use_do() {
    let Some(world) = world() else { return };
    let rule = ["--idle", "10s", "--idle-action", "pause", "--expose", "echo=9000"];
    let [silent, busy] = [(); 2].map(|()| world.create(&rule));
    let works = world.create(&["--idle", "10s", "--idle-cpu", "20"]);
    // None of these is a command that the API knows of: each leaves its session.
    let detached = |sandbox: &serde_json::Value, line: &str| {
        let line = format!("setsid {line} >/dev/null 2>&1 </dev/null & exit 0");
        let ran = world.ctl(&["exec", id(sandbox), "--shell", &line]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    };
    detached(&works, "sh -c 'while :; do :; done'");
    let sockets = [&silent, &busy].map(|sandbox| {
        let write = ["exec", "-i", id(sandbox), "--", "tee", "/root/echo.py"];
        assert_eq!(world.ctl_with(&write, ECHO.as_bytes()).code, 0);
        detached(sandbox, "python3 /root/echo.py");
        let listens = "exec 3<>/dev/tcp/127.0.0.1/9000";
        wait("the echo to listen", || {
            world.ctl(&["exec", id(sandbox), "--shell", listens]).code == 0
        });
        let host = format!("port-9000-vm-{}.sandbox.localhost", vmid(sandbox));
        Socket::open(node(sandbox), &host)
    });
    let [mut forgotten, mut typed] = sockets;
    assert_eq!(forgotten.echo("once").expect("alive"), "once");
    let text = "x".repeat(120);
    let begun = Instant::now();
    wait("the sandbox with the silent socket to be paused", || {
        for _ in 0..10 {
            assert_eq!(typed.echo(&text).expect("alive"), text);
        }
        std::thread::sleep(Duration::from_millis(100));
        world.get(id(&silent))["phase"] == "paused"
    });
    assert!(begun.elapsed() > Duration::from_secs(5), "not at once");
    assert_eq!(world.get(id(&silent))["cause"], "idle");
    for sandbox in [&busy, &works] {
        assert_eq!(world.get(id(sandbox))["phase"], "running");
    }
    // The socket outlives the pause, and it does not wake the sandbox.
    world.json(&["resume", id(&silent)]);
    assert_eq!(forgotten.echo("again").expect("alive"), "again");
    world.finish();
}
