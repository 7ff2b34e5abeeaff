//! Tests of `resize`, with a script in place of `pct`, and of looks into a container.

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use nix::{libc::O_NONBLOCK, sys::stat::Mode, unistd::mkfifo};
use proto::id::{SandboxId, Vmid};
use tokio::time::timeout;

use super::*;
use crate::pve::Pve;

const VMID: u32 = 1001;

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
    fs::write(path, text).expect("written");
}

fn conf(options: &str) -> String {
    let mark = Mark {
        sandbox_id: SandboxId::new(1, &[1; 10]),
        vmid: Vmid::try_from(VMID).expect("in range"),
        attempt: 1,
        team: "acme".parse().expect("valid"),
        request_id: "r-1".parse().expect("valid"),
    };
    let mark = mark.to_string().replace(':', "%3A");
    format!("#{mark}\nrootfs: local-lvm:vm-{VMID}-disk-0,{options}\n")
}

/// Node with this script in place of `pct`. `$CONF` is the container's config.
fn node(dir: &Path, options: &str, running: bool, script: &str) -> Pct {
    let at = |path: &str| dir.join(path);
    write(
        &at("pve/.members"),
        r#"{"nodename":"n1","version":1,"cluster":{"name":"c","version":1,"nodes":1,"quorate":1},"nodelist":{"n1":{"id":1,"online":1,"ip":"127.0.0.1"}}}"#,
    );
    let config = at(&format!("pve/nodes/n1/lxc/{VMID}.conf"));
    write(&config, &conf(options));
    let socket = if running {
        format!("0: 2 0 0 1 1 1 @/var/lib/lxc/{VMID}/command\n")
    } else {
        String::new()
    };
    write(&at("proc/net/unix"), &socket);
    let pct = at("pct");
    write(
        &pct,
        &format!("#!/bin/sh\nCONF={}\nDIR={}\n{script}\n", config.display(), dir.display()),
    );
    fs::set_permissions(&pct, fs::Permissions::from_mode(0o755)).expect("a program");
    let places = HostPaths {
        root: at("pve"),
        pct,
        lock_dir: at("lock"),
        proc: at("proc"),
        cgroup_root: at("cg"),
        ..HostPaths::default()
    };
    let runner = Runner::new(at("out"), at("proc"), worker::is_task, 1).expect("a directory");
    Pct::new("n1".parse().expect("valid"), places, runner)
}

fn vmid() -> Vmid {
    Vmid::try_from(VMID).expect("in range")
}

const SOON: Duration = Duration::from_secs(60);
const GROW: &str = "sed -i s/size=2G/size=8G/ $CONF";

#[tokio::test]
async fn resize_reaches_the_requested_size_or_fails() {
    for (running, options, script, expected) in [
        (true, "size=2G", GROW.to_owned(), None),
        (false, "size=2G", GROW.to_owned(), None),
        (true, "size=8G", "exit 9".to_owned(), None),
        (true, "size=2G", "exit 0".to_owned(), Some("the disk has 2 GiB")),
        (
            true,
            "size=2G",
            format!("{GROW}; echo \"Failed to update the container's filesystem: exit code 32\""),
            Some("exit code 32"),
        ),
        (true, "ro=1,size=2G", GROW.to_owned(), Some("read-only")),
        (false, "ro=1,size=2G", GROW.to_owned(), None),
    ] {
        let dir = tempfile::tempdir().expect("tempdir");
        let pct = node(dir.path(), options, running, &script);
        let told = pct.resize(vmid(), 8, SOON).await.map_err(|error| error.to_string());
        match expected {
            None => assert_eq!(told, Ok(()), "{running} {options} {script}"),
            Some(words) => {
                let why = told.expect_err("it did not grow");
                assert!(why.contains(words), "{why}");
            }
        }
    }
}

#[tokio::test]
async fn waiting_resize_gives_its_turn_to_others() {
    let dir = tempfile::tempdir().expect("tempdir");
    // With a single slot, the resize ends only if a stop gets the slot meanwhile.
    let script = format!(
        "case $1 in resize) touch $DIR/begun\n\
         timeout 60 sh -c 'until [ -e $0 ]; do sleep 0.05; done' $DIR/over && {GROW};; \
         *) touch $DIR/over;; esac"
    );
    let pct = node(dir.path(), "size=2G", false, &script);
    let host = std::sync::Arc::clone(&pct.0);
    let begun = dir.path().join("begun");
    let other = async {
        let deadline = Instant::now() + SOON;
        while !begun.exists() {
            assert!(Instant::now() < deadline, "the resize has not begun");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        host.pct(Command::Stop(Vmid::MIN), Instant::now() + SOON).await
    };
    let (resized, other) = tokio::join!(pct.resize(vmid(), 8, SOON), other);
    other.expect("its turn came");
    resized.expect("resized");
}

/// The status of a tenant's process may take as long as he likes; here it is a pipe that nobody has written to.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slow_process_of_a_tenant_keeps_no_thread_of_the_runtime() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pct = node(dir.path(), "size=2G", true, "");
    write(&dir.path().join(format!("cg/lxc/{VMID}/cgroup.procs")), "70\n");
    let status = dir.path().join("proc/70/status");
    fs::create_dir_all(status.parent().expect("a directory")).expect("mkdir");
    mkfifo(&status, Mode::from_bits_truncate(0o600)).expect("made");
    let config = |vmid| {
        let pct = pct.clone();
        tokio::spawn(async move { pct.config(vmid).await.expect("read").is_some() })
    };
    let (begun, own) = (Instant::now(), config(vmid()));
    // It opens once somebody reads.
    let writer = loop {
        match fs::OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&status) {
            Ok(writer) => break writer,
            Err(_) => assert!(begun.elapsed() < SOON, "nobody looks"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let other = timeout(SOON, config(Vmid::MIN)).await.expect("a thread is free");
    assert!(!other.expect("no panic") && !own.is_finished());
    drop(writer);
    assert!(own.await.expect("no panic"), "its config is there");
}

#[tokio::test]
async fn init_that_runs_is_not_looked_for_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pct = node(dir.path(), "size=2G", true, "");
    let at = |path: &str| dir.path().join(path);
    let procs = at(&format!("cg/lxc/{VMID}/cgroup.procs"));
    write(&procs, "70\n");
    write(&at("proc/70/status"), "NSpid:\t70\t1\n");
    write(&at("proc/70/stat"), &format!("70 (init) S 41 {}", "1 ".repeat(48)));
    let found = pct.init(vmid()).await;
    assert_eq!(found, Some(Init { pid: 70, start: 1 }));
    pct.config(vmid()).await.expect("read").expect("it is there");
    // From now on a tenant hides it.
    write(&procs, "");
    assert_eq!(pct.init(vmid()).await, found);
    let configs = pct.configs().await.expect("read");
    assert!(configs.contains_key(&vmid()));
    assert_eq!(pct.init(vmid()).await, found, "a list of all does not forget it");
    // Another process has its number.
    write(&at("proc/70/stat"), &format!("70 (other) S 41 {}", "2 ".repeat(48)));
    assert_eq!(pct.init(vmid()).await, None);
}

#[tokio::test]
async fn unreadable_config_is_not_taken_for_one_that_is_not_ours() {
    let dir = tempfile::tempdir().expect("tempdir");
    let pct = node(dir.path(), "size=2G", true, "");
    let config = dir.path().join(format!("pve/nodes/n1/lxc/{VMID}.conf"));
    let ours = pct.0.mark_by_config(vmid()).await.expect("read");
    assert_eq!(ours.map(|mark| mark.vmid), Some(vmid()));
    write(&config, "hostname: other\n");
    assert_eq!(pct.0.mark_by_config(vmid()).await.expect("read"), None);
    fs::remove_file(&config).expect("removed");
    assert_eq!(pct.0.mark_by_config(vmid()).await.expect("it is gone"), None);
    fs::create_dir(&config).expect("made");
    pct.0.mark_by_config(vmid()).await.expect_err("it is no file");
}
