//! On a tree of files, with a thread that plays the kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::{
    pve::{ContainerConfig, Mark, Pve, pct::Pct, pct::Places},
    run::Runner,
};

const VMID: u32 = 1001;

fn vmid() -> Vmid {
    Vmid::try_from(VMID).expect("in range")
}

fn mark() -> Mark {
    Mark {
        sandbox_id: SandboxId::new(1, &[1; 10]),
        vmid: vmid(),
        attempt: 1,
        team: "acme".parse().expect("valid"),
        request_id: "r-1".parse().expect("valid"),
    }
}

struct Tree {
    dir: tempfile::TempDir,
    pct: Pct,
    over: Arc<AtomicBool>,
    v1: bool,
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
    fs::write(path, text).expect("written");
}

impl Tree {
    /// `freezes`: the kernel does what is written.
    fn new(v1: bool, freezes: bool) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |path: &str| dir.path().join(path);
        let places = Places {
            root: at("pve"),
            lock_dir: at("lock"),
            cgroup_root: at("cg"),
            proc: at("proc"),
            ..Places::default()
        };
        write(
            &at("pve/.members"),
            r#"{"nodename":"n1","version":1,"cluster":{"name":"c","version":1,"nodes":1,"quorate":1},"nodelist":{"n1":{"id":1,"online":1,"ip":"127.0.0.1"}}}"#,
        );
        write(&at("lock/x"), "");
        let conf = format!("#{}\narch: amd64\nunknown: kept\n\n[snap]\nlock: old\n", mark())
            .replace(':', "%3A")
            .replace("arch%3A", "arch:")
            .replace("unknown%3A", "unknown:")
            .replace("lock%3A", "lock:");
        write(&at(&format!("pve/nodes/n1/lxc/{VMID}.conf")), &conf);
        write(&at("proc/net/unix"), &format!("0: 2 0 0 1 1 1 @/var/lib/lxc/{VMID}/command\n"));
        let inner = inner(dir.path(), v1);
        if v1 {
            write(&inner.join("freezer.state"), "THAWED\n");
        } else {
            write(&inner.join("cgroup.freeze"), "0\n");
            write(&inner.join("cgroup.events"), "populated 1\nfrozen 0\n");
        }
        let over = Arc::new(AtomicBool::new(false));
        if !v1 && freezes {
            let (inner, over) = (inner, Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let wish = fs::read_to_string(inner.join("cgroup.freeze")).unwrap_or_default();
                    if let Some(wish @ ('0' | '1')) = wish.chars().next() {
                        let fresh = inner.join("events.new");
                        let text = format!("populated 1\nfrozen {wish}\n");
                        if fs::write(&fresh, text).is_ok() {
                            drop(fs::rename(&fresh, inner.join("cgroup.events")));
                        }
                    }
                    std::thread::yield_now();
                }
            });
        }
        let runner = Runner::new(at("out"), at("proc"), 1).expect("a directory");
        let pct = Pct::new("n1".parse().expect("valid"), places, runner);
        Self { dir, pct, over, v1 }
    }

    async fn config(&self) -> ContainerConfig {
        self.pct.config(vmid()).await.expect("read").expect("it is there")
    }

    fn state(&self) -> String {
        let inner = inner(self.dir.path(), self.v1);
        let file = inner.join(if self.v1 { "freezer.state" } else { "cgroup.freeze" });
        fs::read_to_string(file).expect("readable")
    }
}

fn inner(root: &Path, v1: bool) -> PathBuf {
    let hierarchy = root.join("cg").join(if v1 { "freezer" } else { "" });
    hierarchy.join("lxc").join(VMID.to_string()).join("ns")
}

#[tokio::test]
async fn it_is_frozen_and_thawed_by_files_alone() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    assert!(!pct.frozen(vmid()).await);
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    assert!(pct.frozen(vmid()).await);
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen already");
    pct.thaw(vmid(), &owner).await.expect("thawed");
    assert!(!pct.frozen(vmid()).await);
    pct.thaw(vmid(), &owner).await.expect("thawed already");
}

/// A plain file keeps what was written over it, so each state is put there by hand.
#[tokio::test]
async fn on_v1_the_state_is_asked_for_until_it_is_there() {
    let tree = Tree::new(true, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    assert!(pct.frozen(vmid()).await && tree.state().starts_with("FROZEN"));
    pct.thaw(vmid(), &owner).await.expect("thawed");
    assert!(!pct.frozen(vmid()).await);
}

#[tokio::test]
async fn what_does_not_freeze_is_thawed_again() {
    let tree = Tree::new(false, false);
    let short = Duration::from_millis(50);
    let error = tree.pct.freeze(vmid(), &mark().sandbox_id, short).await.expect_err("stuck");
    assert!(matches!(error.kind, ErrorKind::Deadline(_)), "{error}");
    assert!(tree.state().starts_with('0'));
}

#[tokio::test]
async fn only_its_owners_container_is_touched() {
    let tree = Tree::new(false, true);
    let (pct, other) = (&tree.pct, SandboxId::new(2, &[2; 10]));
    let before = tree.config().await;
    let results = [
        pct.freeze(vmid(), &other, THAW).await,
        pct.thaw(vmid(), &other).await,
        pct.hold(vmid(), &other).await,
        pct.release(vmid(), &other).await,
    ];
    for result in results {
        let error = result.expect_err("not its");
        assert!(matches!(error.kind, ErrorKind::NotOurs(_)), "{error}");
    }
    assert_eq!(tree.config().await, before);
    assert!(tree.state().starts_with('0'));
}

#[tokio::test]
async fn the_lock_is_one_write_and_leaves_the_rest_alone() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    let before = tree.config().await;
    for _ in 0..2 {
        pct.hold(vmid(), &owner).await.expect("held");
        assert!(hold::held(&tree.config().await));
    }
    assert_eq!(tree.config().await.mark(), Some(mark()));
    for _ in 0..2 {
        pct.release(vmid(), &owner).await.expect("given back");
        assert_eq!(tree.config().await, before);
    }
    let dir = fs::read_dir(tree.dir.path().join("pve/nodes/n1/lxc")).expect("readable");
    assert_eq!(dir.count(), 1, "no half-written file is left");
}

#[tokio::test]
async fn without_quorum_it_is_frozen_and_not_locked() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    let members = tree.dir.path().join("pve/.members");
    let quorate = fs::read_to_string(&members).expect("readable");
    fs::write(&members, quorate.replace("\"quorate\":1", "\"quorate\":0")).expect("written");
    let error = pct.hold(vmid(), &owner).await.expect_err("no quorum");
    assert!(matches!(error.kind, ErrorKind::NoQuorum(_)), "{error}");
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    pct.release(vmid(), &owner).await.expect("there is nothing to give back");
    pct.thaw(vmid(), &owner).await.expect("thawed");
}
