//! Stopped sandboxes get to shut down by themselves; a reboot from inside is noticed.

use std::time::Instant;

use crate::world::{World, id, node, vmid, wait, world};

/// A service with an ExecStop, and one that traps SIGTERM; each writes what it was told.
const SERVICES: &str = r#"
printf '[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sh -c "echo told >/root/stop"\n' \
    >/etc/systemd/system/one.service
printf '[Service]\nExecStart=/bin/sh /root/trap.sh\n' >/etc/systemd/system/two.service
printf 'trap "echo told >/root/trap; exit 0" TERM\necho up >/root/up\nwhile :; do sleep 0.1; done\n' \
    >/root/trap.sh
systemctl daemon-reload && systemctl start one two && until [ -e /root/up ]; do sleep 0.1; done"#;

fn with_services(world: &World) -> serde_json::Value {
    let sandbox = world.create(&[]);
    let ran = world.ctl(&["exec", "--timeout", "60s", id(&sandbox), "--shell", SERVICES]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    sandbox
}

/// Reads from the sandbox's disk on its node what its services wrote.
fn told(world: &World, sandbox: &serde_json::Value) -> String {
    let root = format!("/rpool/data/subvol-{}-disk-0/root", vmid(sandbox));
    world.shell(node(sandbox), &format!("cd {root} && cat stop trap 2>/dev/null || true"))
}

#[test]
fn services_of_a_stopped_sandbox_end_as_they_want() {
    let Some(world) = world() else { return };
    let (running, paused) = (with_services(&world), with_services(&world));
    assert_eq!(world.ctl(&["pause", id(&paused)]).code, 0);
    for sandbox in [&running, &paused] {
        let ran = world.ctl(&["stop", id(sandbox)]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert_eq!(world.get(id(sandbox))["stop_result"], "shut_down");
        assert_eq!(told(&world, sandbox), "told\ntold\n");
    }
    world.finish();
}

#[test]
fn sandbox_without_grace_is_killed() {
    let Some(world) = world() else { return };
    let sandbox = with_services(&world);
    let ran = world.ctl(&["stop", "--grace", "0", id(&sandbox)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(world.get(id(&sandbox))["stop_result"], "killed");
    assert_eq!(told(&world, &sandbox), "");
    world.finish();
}

#[test]
fn process_that_entered_from_outside_delays_no_stop() {
    let Some(world) = world() else { return };
    let sandbox = with_services(&world);
    // Takes a while to end, and is no child of the init, which is told nothing of its end.
    let script = "printf 'trap \"i=0; while [ \\$i -lt 300000 ]; do i=\\$((i+1)); done; exit\" TERM\n\
                  touch /run/entered\nwhile :; do sleep 0.1; done\n' >/root/slow.sh";
    assert_eq!(world.ctl(&["exec", id(&sandbox), "--shell", script]).code, 0);
    let enter = format!("setsid lxc-attach -n {} -- sh /root/slow.sh", vmid(&sandbox));
    world.shell(node(&sandbox), &format!("{enter} </dev/null >/dev/null 2>&1 &"));
    wait("the process to be there", || {
        world.ctl(&["exec", id(&sandbox), "--", "test", "-e", "/run/entered"]).code == 0
    });
    let ran = world.ctl(&["stop", id(&sandbox)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(world.get(id(&sandbox))["stop_result"], "shut_down");
    world.finish();
}

#[test]
fn deletion_waits_for_no_service() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let line = "printf '[Service]\\nExecStart=/bin/sleep infinity\\nExecStop=/bin/sleep 80\\n' \
                >/etc/systemd/system/slow.service; systemctl daemon-reload; systemctl start slow";
    assert_eq!(world.ctl(&["exec", id(&sandbox), "--shell", line]).code, 0);
    let ran = world.ctl(&["stop", "--no-wait", "--grace", "10m", id(&sandbox)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(world.get(id(&sandbox))["phase"], "stopping");
    let begun = Instant::now();
    assert_eq!(world.ctl(&["rm", id(&sandbox)]).code, 0);
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
    world.finish();
}

#[test]
fn reboot_from_inside_counts_a_boot() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let ran = world.ctl(&["exec", "--detach", id(&sandbox), "--", "reboot"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    wait("the reboot to be noticed", || world.get(id(&sandbox))["boot"] == 2);
    let after = world.get(id(&sandbox));
    assert_eq!((&after["phase"], &after["cause"]), (&"running".into(), &"rebooted".into()));
    assert_eq!(after["failure"], serde_json::Value::Null);
    wait("the next boot to run commands", || {
        world.ctl(&["exec", id(&sandbox), "--", "systemctl", "is-system-running", "--wait"]).code
            != 125
    });
    let ran = world.ctl(&["exec", id(&sandbox), "--", "true"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    world.finish();
}
