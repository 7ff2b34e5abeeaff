//! Every command of `sandboxctl`, in the order of a user.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use crate::{
    http::{get, host},
    world::{id, node, vmid, wait, world},
};

#[test]
fn sandbox_works_from_create_to_rm() {
    let Some(world) = world() else { return };
    let size = ["--cpus", "1", "--memory", "256", "--disk", "7"];
    let sandbox = world.create(&[&size[..], &["--env", "COLOUR=green", "--meta", "a=b"]].concat());
    let (id, vmid, node) = (id(&sandbox), vmid(&sandbox), node(&sandbox));
    assert_eq!(sandbox["boot"], 1);
    assert_eq!(sandbox["size"]["memory_mib"], 256);
    assert_eq!(sandbox["size"]["disk_gib"], 7);
    let config = world.shell(node, &format!("grep ^rootfs /etc/pve/lxc/{vmid}.conf"));
    assert!(config.contains("size=7G"), "{config}");
    assert_eq!(sandbox["metadata"]["a"], "b");

    for name in [id.to_owned(), vmid.to_string(), format!("pve_lxc_{vmid}"), format!("cmux-{vmid}")]
    {
        assert_eq!(world.get(&name)["id"], id, "{name}");
    }
    let listed = world.json(&["ls"]);
    assert!(listed.as_array().is_some_and(|all| all.iter().any(|one| one["id"] == id)));
    let snapshots = world.json(&["snapshot", "ls"]);
    assert!(
        snapshots
            .as_array()
            .is_some_and(|all| all.iter().any(|s| s["id"] == sandbox["snapshot_id"]))
    );
    assert_eq!(world.json(&["explain", id])["node"], node);
    assert!(!world.json(&["version"]).is_null());

    // The kernel enforces the requested size.
    let limit = world.shell(
        node,
        &format!(
            "cat /run/lab/cgroup/memory/lxc/{vmid}/memory.limit_in_bytes \
             /sys/fs/cgroup/lxc/{vmid}/memory.max 2>/dev/null"
        ),
    );
    assert!(limit.lines().any(|line| line == "268435456"), "memory limit: {limit}");

    let hostname = world.ctl(&["exec", id, "--", "hostname"]);
    assert_eq!(hostname.text().trim(), id);
    let colour = world.ctl(&["exec", id, "--shell", "echo $COLOUR"]);
    assert_eq!(colour.text(), "green\n");

    let service = world.json(&["expose", id, "8000", "--name", "web"]);
    let by_vmid = host(service["url"].as_str().expect("a url"));
    assert!(by_vmid.starts_with(&format!("port-8000-vm-{vmid}.")), "{by_vmid}");
    let by_id = format!("port-8000-{id}.sandbox.localhost");
    for name in [&by_vmid, &by_id] {
        let (status, body) = get(node, name);
        assert!(status == 200 && body.contains("inside a sandbox"), "{name}: {status} {body}");
    }
    assert_eq!(host(world.ctl(&["url", id, "web"]).text().trim()), by_vmid);
    world.json(&["hide", id, "web"]);
    assert_eq!(get(node, &by_vmid).0, 403);

    world.json(&["expose", id, "8000", "--name", "web"]);
    world.json(&["stop", id]);
    world.wait_phase(id, "stopped");
    assert_eq!(world.refused(&["exec", id, "--", "true"]).0, "SANDBOX_NOT_RUNNING");
    assert_eq!(get(node, &by_vmid).0, 503);
    world.json(&["start", id]);
    let again = world.wait_phase(id, "running");
    assert_eq!(again["boot"], 2);
    assert_eq!(world.ctl(&["exec", id, "--", "true"]).code, 0);
    wait("its page again", || get(node, &by_vmid).0 == 200);

    world.json(&["rm", id]);
    world.wait_phase(id, "deleted");
    assert_eq!(world.left_of(node, vmid), "");
    assert_eq!(get(node, &by_vmid).0, 410);
    assert_eq!(get(node, &by_id).0, 410);
    assert_eq!(world.refused(&["exec", id, "--", "true"]).0, "SANDBOX_DELETED");
    assert_eq!(world.ctl(&["rm", id]).code, 0, "deleting a deleted one succeeds");
    world.finish();
}

#[test]
fn exec_is_byte_exact_and_keeps_streams_and_codes_apart() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);

    let ran = world.ctl(&["exec", id, "--shell", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.text().as_str()), (7, "out\n"));
    assert!(ran.stderr.contains("err\n"), "{}", ran.stderr);

    // Every byte must come back, far more than a pipe holds.
    let bytes: Vec<u8> =
        (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let ran = world.ctl_with(&["exec", "-i", id, "--", "cat"], &bytes);
    assert_eq!((ran.code, ran.stdout.len()), (0, bytes.len()), "{}", ran.stderr);
    assert!(ran.stdout == bytes, "the bytes came back changed");

    // Arguments are passed unchanged: no shell, no options of ours or of lxc-attach.
    let odd = ["-n", "--", "$(id)", "a b", "", "'", "\n", "ä"];
    let mut args = vec!["exec", id, "--", "printf", "%s|"];
    args.extend(odd);
    assert_eq!(world.ctl(&args).text(), format!("{}|", odd.join("|")));

    for (line, code) in [("kill -TERM $$", 143), ("exec no-such-program-here", 127)] {
        assert_eq!(world.ctl(&["exec", id, "--shell", line]).code, code, "{line}");
    }
    let ran = world.ctl(&[
        "exec",
        "--cwd",
        "/srv",
        "--env",
        "A=1",
        "--user",
        "nobody",
        id,
        "--shell",
        "pwd; echo $A; id -un",
    ]);
    assert_eq!(ran.text(), "/srv\n1\nnobody\n", "{}", ran.stderr);

    // Inherits nothing of the host's environment, and only three descriptors.
    let ran = world.ctl(&[
        "exec",
        id,
        "--shell",
        "env | cut -d= -f1 | sort | tr '\\n' ' '; ls /proc/self/fd | tr '\\n' ' '",
    ]);
    let said = ran.text();
    assert!(
        !said.contains("SANDBOXCTL") && !said.contains("CARGO") && !said.contains("NOTIFY"),
        "{said}"
    );
    assert!(said.ends_with("0 1 2 3 "), "descriptors leak (3 is ls's own): {said}");

    // The time limit kills the whole process tree, however it tried to escape.
    let ran = world.ctl(&[
        "exec",
        "--timeout",
        "2s",
        id,
        "--shell",
        "setsid sleep 4242 & (sleep 4242 &) ; sleep 4242",
    ]);
    assert_eq!(ran.code, 124, "{}", ran.stderr);
    let left = world.ctl(&["exec", id, "--shell", "pgrep -x sleep; true"]);
    assert_eq!(left.text(), "", "sleeps that outlived the timeout");
    world.finish();
}

#[test]
fn request_id_identifies_one_sandbox() {
    let Some(world) = world() else { return };
    let key = crate::world::unique("idem");
    let first = world.create(&["--request-id", &key]);
    let again = world.create(&["--request-id", &key]);
    assert_eq!(first["id"], again["id"]);
    world.lab.services().restart("controller", crate::world::PATIENCE).expect("restart");
    let after = world.create(&["--request-id", &key]);
    assert_eq!(first["id"], after["id"], "the controller's restart forgot the request_id");
    let (reason, _) = world.refused(&["create", "--request-id", &key, "--cpus", "2"]);
    assert_eq!(reason, "REQUEST_ID_REUSED");
    world.finish();
}

#[test]
fn files_of_a_creation_are_there_when_it_runs() {
    let Some(world) = world() else { return };
    let dir = tempfile::tempdir().expect("tempdir");
    let local = dir.path().join("run.sh");
    std::fs::write(&local, "#!/bin/sh\necho began\n").expect("written");
    std::fs::set_permissions(&local, Permissions::from_mode(0o755)).expect("chmod");
    let file = format!("{}:/srv/tools/run.sh", local.display());

    let sandbox = world.create(&["--file", &file]);
    let ran = world.ctl(&["exec", id(&sandbox), "--", "/srv/tools/run.sh"]);
    assert_eq!((ran.code, ran.text().as_str()), (0, "began\n"), "{}", ran.stderr);

    let begun = world.json(&["create", "--no-wait", "--file", &file]);
    let begun = begun.as_array().map_or(begun.clone(), |list| list[0].clone());
    world.mine(id(&begun));
    let seen = world.wait_phase(id(&begun), "running");
    wait("the files of a creation that nobody waits for", || {
        world.ctl(&["exec", id(&seen), "--", "test", "-x", "/srv/tools/run.sh"]).code == 0
    });
    world.finish();
}
