//! A process that does not freeze, because it waits for a FUSE file system that never answers. This
//! test program runs in the node for that, and puts a child into the container's cgroup.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::fd::AsRawFd as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::world::World;

const CGROUP: &str = "PVE_SANDBOX_TEST_STUCK_IN";
const MOUNT: &str = "/run/stuck";

/// The process; it lives as long as this value.
pub(crate) struct Stuck {
    keeper: Child,
    program: PathBuf,
}

impl Stuck {
    pub(crate) fn in_container(world: &World, node: &str, vmid: u64) -> Self {
        let node = world.node(node);
        let name = "var/tmp/stuck";
        let program = node.root().expect("a root").join(name);
        std::fs::copy(std::env::current_exe().expect("a path"), &program).expect("a copy");
        let argv = [
            "/usr/bin/env".to_owned(),
            format!("{CGROUP}=/sys/fs/cgroup/lxc/{vmid}/ns"),
            format!("/{name}"),
            "stuck::keeper".to_owned(),
            "--exact".to_owned(),
            "--nocapture".to_owned(),
        ];
        let mut command = node.command(argv.to_vec());
        let mut keeper =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the keeper");
        let mut lines = BufReader::new(keeper.stdout.take().expect("stdout")).lines();
        let there = lines.any(|line| line.is_ok_and(|line| line.contains("STUCK")));
        assert!(there, "nothing got stuck");
        Self { keeper, program }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // The keeper ends when its stdin closes.
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
        drop(std::fs::remove_file(&self.program));
    }
}

/// Keeps the process in the node, if the environment names the cgroup; otherwise does nothing.
#[test]
fn keeper() {
    let Some(cgroup) = std::env::var_os(CGROUP).map(PathBuf::from) else { return };
    let mut fuse =
        std::fs::File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
    std::fs::create_dir_all(MOUNT).expect("mkdir");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
    mount(Some("stuck"), MOUNT, Some("fuse"), MsFlags::empty(), Some(options.as_str()))
        .expect("mount");
    // Answers the kernel's INIT and reads nothing after it, so that a fatal signal still ends a
    // waiting process.
    let mut request = vec![0; 16 * 1024];
    let read = fuse.read(&mut request).expect("INIT");
    assert!(read >= 40 && request[4..8] == 26_u32.to_ne_bytes(), "it is INIT");
    let mut answer = Vec::new();
    for word in [80_u32, 0] {
        answer.extend(word.to_ne_bytes());
    }
    answer.extend(&request[8..16]);
    // Version 7.31 without options; 4 KiB at a time.
    for word in [7_u32, 31, 0, 0, 0, 4096] {
        answer.extend(word.to_ne_bytes());
    }
    answer.resize(80, 0);
    fuse.write_all(&answer).expect("answer");
    let mut child =
        Command::new("/usr/bin/stat").arg(format!("{MOUNT}/x")).spawn().expect("stat starts");
    let waits = || {
        let state = std::fs::read_to_string(format!("/proc/{}/wchan", child.id()));
        state.is_ok_and(|state| state.contains("fuse") || state.contains("request_wait"))
    };
    let begun = std::time::Instant::now();
    while !waits() && begun.elapsed().as_secs() < 3 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = child.id().to_string();
    let leaves = [cgroup.join("init.scope/cgroup.procs"), cgroup.join("cgroup.procs")];
    assert!(leaves.iter().any(|leaf| std::fs::write(leaf, &pid).is_ok()), "a leaf takes it");
    println!("STUCK");
    drop(std::io::stdin().read(&mut [0]));
    drop(child.kill());
    drop(child.wait());
    umount2(MOUNT, MntFlags::MNT_DETACH).expect("umount");
}
