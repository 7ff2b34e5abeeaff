//! The size of a sandbox changes while it runs.

use crate::world::{World, id, node, refusal, vmid, world};

/// Memory limit of a sandbox in the kernel, bytes; on cgroup v1 or v2.
fn limits(world: &World, sandbox: &serde_json::Value) -> String {
    let vmid = vmid(sandbox);
    let files = format!(
        "cat /run/lab/cgroup/memory/lxc/{vmid}/memory.limit_in_bytes \
         /run/lab/cgroup/cpu/lxc/{vmid}/cpu.cfs_quota_us /sys/fs/cgroup/lxc/{vmid}/memory.max \
         /sys/fs/cgroup/lxc/{vmid}/cpu.max 2>/dev/null || true"
    );
    world.shell(node(sandbox), &files)
}

#[test]
fn running_sandbox_gets_more_cores_memory_and_disk_at_once() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--cpus", "1", "--memory", "256m", "--disk", "7g"]);
    let id = id(&sandbox);
    let ran = world.ctl(&["resize", id, "--cpus", "2", "--memory", "512m", "--disk", "9g"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let now = world.get(id);
    assert_eq!((&now["size"]["cpu_cores"], &now["size"]["memory_mib"]), (&2.into(), &512.into()));
    assert_eq!((&now["size"]["disk_gib"], &now["boot"]), (&9.into(), &1.into()));
    let limits = limits(&world, &sandbox);
    assert!(limits.contains(&(512 << 20).to_string()), "{limits}");
    assert!(limits.contains("200000"), "{limits}");
    let config = world.shell(node(&sandbox), &format!("cat /etc/pve/lxc/{}.conf", vmid(&sandbox)));
    assert!(config.contains("size=9G") && config.contains("memory: 512"), "{config}");
    let events = world.ctl(&["events", id]).text();
    assert!(events.contains("2 cores, 512 MiB, 9 GiB disk"), "{events}");
    world.finish();
}

#[test]
fn sandbox_keeps_its_size_where_a_new_one_is_refused() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--cpus", "1", "--memory", "512m", "--disk", "7g"]);
    let id = id(&sandbox);
    // A buffer of 200 MiB that nobody takes.
    let hold = "dd if=/dev/zero bs=200M count=1 | sleep 1000";
    let ran = world.ctl(&["exec", "--detach", "--exec-id", "hold", id, "--shell", hold]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let held =
        "until grep -q 'VmRSS:.*20[0-9]\\{4\\} kB' /proc/$(pidof dd)/status; do sleep 0.1; done";
    assert_eq!(world.ctl(&["exec", "--timeout", "20s", id, "--shell", held]).code, 0);
    for (args, reason) in [
        (["--memory", "128m"], "MEMORY_IN_USE"),
        (["--memory", "400g"], "NEVER_FITS"),
        (["--disk", "6g"], "FIELD_INVALID"),
        (["--memory", "16m"], "FIELD_INVALID"),
    ] {
        let ran = world.ctl(&[&["--json", "resize", id][..], &args].concat());
        assert_eq!(refusal(&ran).0, reason, "{args:?}: {}", ran.stderr);
    }
    assert_eq!(world.get(id)["size"], sandbox["size"]);
    assert_eq!(world.ctl(&["pause", id]).code, 0);
    let ran = world.ctl(&["--json", "resize", id, "--cpus", "2"]);
    assert_eq!(refusal(&ran).0, "SANDBOX_PAUSED", "{}", ran.stderr);
    assert_eq!(world.ctl(&["resume", id]).code, 0);
    assert_eq!(world.ctl(&["kill", "-s", "KILL", id, "hold"]).code, 0);
    let ran = world.ctl(&["resize", id, "--memory", "256m"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    world.finish();
}
