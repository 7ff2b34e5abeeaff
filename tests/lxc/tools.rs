//! The template for people: its programs, the limits that its sandboxes see, and the way out.

use std::path::Path;

use lab::{image::TOOLS, layout::HUB_IP, lxcfs, settings::Settings, sources};

use crate::world::{id, node, vmid, world};

#[test]
fn sandbox_has_the_programs_of_an_agents_work_and_sees_its_own_limits() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&["--snapshot", TOOLS.snapshot, "--cpus", "1", "--memory", "768m"]);
    let (id, node, vmid) = (id(&sandbox), node(&sandbox), vmid(&sandbox));
    for program in ["git", "curl", "node", "python3"] {
        let ran = world.ctl(&["exec", id, "--", program, "--version"]);
        assert_eq!(ran.code, 0, "{program}: {}", ran.stderr);
    }
    let shell = |line: &str| world.ctl(&["exec", id, "--shell", line]).text().trim().to_owned();
    let there = |path: &str| !world.shell(node, &format!("ls -d {path}")).is_empty();
    // The controller of CPUs is on v1 or v2, or the machine withholds it.
    let pinned = there(&format!("/run/lab/cgroup/cpuset/lxc/{vmid}"))
        || there(&format!("/sys/fs/cgroup/lxc/{vmid}/cpuset.cpus"));
    if pinned {
        assert_eq!(shell("nproc"), "1");
    } else {
        println!("SKIPPED: this machine gives the lab no cpuset");
    }
    let memory = shell("free -m | awk '/^Mem:/ {print $2}'");
    if there(&format!("{}/proc", lxcfs::IN_NODE)) {
        assert_eq!(memory, "768");
        if pinned {
            assert_eq!(shell("grep -c ^processor /proc/cpuinfo"), "1");
        }
        let resized = world.ctl(&["resize", id, "--memory", "896m"]);
        assert_eq!(resized.code, 0, "{}", resized.stderr);
        assert_eq!(shell("free -m | awk '/^Mem:/ {print $2}'"), "896");
    } else {
        println!("SKIPPED: the lab has no lxcfs; `free` shows {memory} MiB");
    }
    world.finish();
}

#[test]
fn sandbox_reaches_the_world_outside_and_not_the_controller() {
    let Some(world) = world() else { return };
    if !Settings::load(world.lab.layout()).expect("settings").way_out {
        println!("SKIPPED: this machine has no way out");
        return;
    }
    let mirror = sources::mirror(Path::new("/etc/apt"));
    let sandbox = world.create(&["--snapshot", TOOLS.snapshot]);
    let id = id(&sandbox);
    let curl =
        |url: &str, limit: &str| world.ctl(&["exec", id, "--", "curl", "-sS", "-m", limit, url]);
    // Any answer will do: this is about names and connections.
    let ran = curl(&mirror, "20");
    assert_eq!(ran.code, 0, "{mirror}: {}", ran.stderr);
    let ran = curl(&format!("https://{HUB_IP}:7443"), "3");
    assert!([7, 28].contains(&ran.code), "the controller was reached: {ran:?}");
    world.finish();
}
