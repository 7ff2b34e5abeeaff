//! Tests of pausing on a tree of files, with a thread that plays the kernel.

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
    pve::{ContainerConfig, HostPaths, Mark, Pve, pct::Pct, worker},
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
    /// With `freezes`, a thread acts on writes as the kernel would.
    fn new(v1: bool, freezes: bool) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |path: &str| dir.path().join(path);
        let places = HostPaths {
            root: at("pve"),
            lock_dir: at("lock"),
            cgroup_root: at("cg"),
            proc: at("proc"),
            ..HostPaths::default()
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
                    let order = fs::read_to_string(inner.join("cgroup.freeze")).unwrap_or_default();
                    if let Some(order @ ('0' | '1')) = order.chars().next() {
                        let fresh = inner.join("events.new");
                        let text = format!("populated 1\nfrozen {order}\n");
                        if fs::write(&fresh, text).is_ok() {
                            drop(fs::rename(&fresh, inner.join("cgroup.events")));
                        }
                    }
                    std::thread::yield_now();
                }
            });
        }
        let runner = Runner::new(at("out"), at("proc"), worker::is_task, 1).expect("a directory");
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
async fn container_is_frozen_and_thawed_by_files_alone() {
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

/// Sets each state by hand, because a plain file keeps the written text.
#[tokio::test]
async fn container_is_frozen_and_thawed_on_v1() {
    let tree = Tree::new(true, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    assert!(pct.frozen(vmid()).await && tree.state().starts_with("FROZEN"));
    pct.thaw(vmid(), &owner).await.expect("thawed");
    assert!(!pct.frozen(vmid()).await);
}

#[tokio::test]
async fn container_that_does_not_freeze_is_thawed_again() {
    let tree = Tree::new(false, false);
    let short = Duration::from_millis(50);
    let error = tree.pct.freeze(vmid(), &mark().sandbox_id, short).await.expect_err("stuck");
    assert!(matches!(error.kind, ErrorKind::Deadline(_)), "{error}");
    assert!(tree.state().starts_with('0'));
}

#[tokio::test]
async fn pause_refuses_a_container_of_another_owner() {
    let tree = Tree::new(false, true);
    let (pct, other) = (&tree.pct, SandboxId::new(2, &[2; 10]));
    let before = tree.config().await;
    let results = [
        pct.freeze(vmid(), &other, THAW).await,
        pct.thaw(vmid(), &other).await,
        pct.acquire_pause_lock(vmid(), &other).await,
        pct.release_pause_lock(vmid(), &other).await,
    ];
    for result in results {
        let error = result.expect_err("not its");
        assert!(matches!(error.kind, ErrorKind::NotOurs(_)), "{error}");
    }
    assert_eq!(tree.config().await, before);
    assert!(tree.state().starts_with('0'));
}

#[tokio::test]
async fn hold_and_release_change_only_the_lock() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    let before = tree.config().await;
    for _ in 0..2 {
        pct.acquire_pause_lock(vmid(), &owner).await.expect("held");
        assert!(pause_lock::is_held(&tree.config().await));
    }
    assert_eq!(tree.config().await.mark(), Some(mark()));
    for _ in 0..2 {
        pct.release_pause_lock(vmid(), &owner).await.expect("given back");
        assert_eq!(tree.config().await, before);
    }
    let dir = fs::read_dir(tree.dir.path().join("pve/nodes/n1/lxc")).expect("readable");
    assert_eq!(dir.count(), 1, "no half-written file is left");
}

#[tokio::test]
async fn container_is_frozen_but_not_locked_without_quorum() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    let members = tree.dir.path().join("pve/.members");
    let quorate = fs::read_to_string(&members).expect("readable");
    fs::write(&members, quorate.replace("\"quorate\":1", "\"quorate\":0")).expect("written");
    let error = pct.acquire_pause_lock(vmid(), &owner).await.expect_err("no quorum");
    assert!(matches!(error.kind, ErrorKind::NoQuorum(_)), "{error}");
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    pct.release_pause_lock(vmid(), &owner).await.expect("there is nothing to give back");
    pct.thaw(vmid(), &owner).await.expect("thawed");
}

/// Hierarchies of this machine, v1's freezer and cgroup2, in a cgroup of this test. Removed when
/// dropped, with its content.
struct Kernel {
    tree: Tree,
    top: PathBuf,
    child: std::process::Child,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let vmid_dir = self.top.join(VMID.to_string());
        for freezer in Freezer::of(&self.tree.dir.path().join("cg"), vmid()) {
            drop(freezer.set(false));
        }
        drop(self.child.kill());
        drop(self.child.wait());
        // The kernel releases an ended process a moment after it is gone.
        let until = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(vmid_dir.join("ns")).is_err() && Instant::now() < until {
            std::thread::yield_now();
        }
        drop((fs::remove_dir(&vmid_dir), fs::remove_dir(&self.top)));
    }
}

/// Returns the hierarchies of this machine with whether each is v1's: at least one. None, with a message, unless
/// they are asked for; `make test-fast` leaves these tests out.
fn hierarchies() -> Vec<(bool, &'static Path)> {
    if std::env::var_os("PVE_SANDBOX_CGROUP_TESTS").is_none() {
        println!("SKIPPED: PVE_SANDBOX_CGROUP_TESTS=1 runs this as root, in a cgroup of its own");
        return Vec::new();
    }
    let known = [
        (false, "/sys/fs/cgroup/unified", "cgroup.controllers"),
        (false, "/sys/fs/cgroup", "cgroup.controllers"),
        (true, "/sys/fs/cgroup/freezer", "cgroup.clone_children"),
    ];
    let found = known.into_iter().map(|(v1, root, probe)| (v1, Path::new(root), probe));
    let found: Vec<_> = found
        .filter(|(_, root, probe)| root.join(probe).exists())
        .map(|(v1, root, _)| (v1, root))
        .collect();
    assert!(!found.is_empty(), "this machine has no hierarchy of cgroups");
    found
}

impl Kernel {
    #[expect(clippy::disallowed_methods, reason = "a test starts what is frozen")]
    fn with((v1, root): (bool, &Path), program: &str, arguments: &[&str]) -> Self {
        let top = root.join(format!("pve-sandbox-test-{}", std::process::id()));
        let ns = top.join(VMID.to_string()).join("ns");
        fs::create_dir_all(&ns).expect("cgroups");
        let tree = Tree::new(v1, false);
        let lxc = tree.dir.path().join("cg").join(if v1 { "freezer/lxc" } else { "lxc" });
        fs::remove_dir_all(&lxc).expect("the tree's own");
        std::os::unix::fs::symlink(&top, &lxc).expect("linked");
        let mut command = std::process::Command::new(program);
        let child = command.args(arguments).spawn().expect("it starts");
        fs::write(ns.join("cgroup.procs"), child.id().to_string()).expect("joined");
        Self { tree, top, child }
    }
}

#[tokio::test]
async fn kernel_freezes_and_thaws_a_real_process() {
    for (v1, root) in hierarchies() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("n");
        let count = format!("i=0; while :; do i=$((i+1)); echo $i >{}; done", file.display());
        let kernel = Kernel::with((v1, root), "/bin/sh", &["-c", &count]);
        let read = || -> u64 {
            fs::read_to_string(&file).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
        };
        let counts_past = async |number: u64| {
            let until = Instant::now() + Duration::from_secs(10);
            while read() <= number {
                assert!(Instant::now() < until, "it does not count");
                tokio::task::yield_now().await;
            }
        };
        let (pct, owner) = (&kernel.tree.pct, mark().sandbox_id);
        counts_past(10).await;
        let begun = Instant::now();
        pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
        let froze = begun.elapsed();
        assert!(pct.frozen(vmid()).await);
        let stood = fs::read_to_string(&file).expect("readable");
        for _ in 0..1000 {
            assert_eq!(fs::read_to_string(&file).expect("readable"), stood, "it runs");
        }
        let begun = Instant::now();
        pct.thaw(vmid(), &owner).await.expect("thawed");
        println!("v1 {v1}: frozen in {froze:?}, thawed in {:?}", begun.elapsed());
        assert!(!pct.frozen(vmid()).await);
        counts_past(read()).await;
    }
}

/// A process that waits for a FUSE file system does not freeze, and must not stay half-frozen.
#[expect(clippy::disallowed_methods, reason = "a test starts what gets stuck")]
#[tokio::test]
async fn process_that_the_kernel_cannot_freeze_is_thawed_again() {
    use std::{
        io::{Read as _, Write as _},
        os::fd::AsRawFd as _,
    };

    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    for hierarchy in hierarchies() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = dir.path().join("never");
        fs::create_dir(&at).expect("mkdir");
        let name = at.join("x");
        let mut kernel = Kernel::with(hierarchy, "/usr/bin/sleep", &["60"]);
        drop(kernel.child.kill());
        drop(kernel.child.wait());
        let mut fuse = fs::File::options().read(true).write(true).open("/dev/fuse").expect("fuse");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
        mount(Some("never"), &at, Some("fuse"), MsFlags::empty(), Some(options.as_str()))
            .expect("mount");
        // Answers INIT and reads nothing after it.
        let mut request = vec![0; 16 * 1024];
        let read = fuse.read(&mut request).expect("INIT");
        assert!(read >= 40);
        let mut answer: Vec<u8> = [80_u32, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        answer.extend(&request[8..16]);
        answer.extend([7_u32, 31, 0, 0, 0, 4096].into_iter().flat_map(u32::to_ne_bytes));
        answer.resize(80, 0);
        fuse.write_all(&answer).expect("answer");
        let mut command = std::process::Command::new("/usr/bin/stat");
        kernel.child = command.arg(&name).spawn().expect("it starts");
        let pid = kernel.child.id().to_string();
        let until = Instant::now() + Duration::from_secs(10);
        while !fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|w| w.contains("wait")) {
            assert!(Instant::now() < until, "it does not get stuck");
            tokio::task::yield_now().await;
        }
        let procs = kernel.top.join(VMID.to_string()).join("ns/cgroup.procs");
        fs::write(procs, &pid).expect("joined");
        let short = Duration::from_millis(300);
        let error = kernel.tree.pct.freeze(vmid(), &mark().sandbox_id, short).await;
        let error = error.expect_err("it does not freeze");
        assert!(matches!(error.kind, ErrorKind::Deadline(_)), "{error}");
        let root = kernel.tree.dir.path().join("cg");
        assert!(Freezer::of(&root, vmid()).iter().all(|freezer| !freezer.freezing()));
        drop(kernel);
        umount2(&at, MntFlags::MNT_DETACH).expect("umount");
    }
}

impl Tree {
    /// Creates the container's init in the fake /proc and cgroup; an earlier one has ended.
    fn run_init(&self, pid: u32, start: u64) {
        let at = |path: &str| self.dir.path().join(path);
        drop(fs::remove_dir_all(at("proc/72")));
        write(&inner(self.dir.path(), self.v1).join("cgroup.procs"), &format!("{pid}\n"));
        write(&at(&format!("proc/{pid}/status")), &format!("Name:\tinit\nNSpid:\t{pid}\t1\n"));
        let stat = format!("{pid} (init) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {start} 0 0\n");
        write(&at(&format!("proc/{pid}/stat")), &stat);
    }

    /// Plays a restart of pve-cluster: /etc/pve is an empty directory meanwhile.
    fn unmount(&self) {
        fs::rename(self.dir.path().join("pve"), self.dir.path().join("away")).expect("renamed");
        fs::create_dir(self.dir.path().join("pve")).expect("mkdir");
    }
}

#[tokio::test]
async fn known_container_is_frozen_and_entered_without_pmxcfs() {
    let tree = Tree::new(false, true);
    let (pct, owner) = (&tree.pct, mark().sandbox_id);
    tree.run_init(72, 5000);
    assert!(pct.carries(&mark()).await.expect("read"));
    assert_eq!(pct.configs().await.expect("read").len(), 1);
    tree.unmount();
    assert!(pct.carries(&mark()).await.expect("known by its init"));
    let other = Mark { attempt: 2, ..mark() };
    assert!(!pct.carries(&other).await.expect("known, and another's"));
    pct.freeze(vmid(), &owner, THAW).await.expect("frozen");
    assert!(pct.frozen(vmid()).await);
    pct.thaw(vmid(), &owner).await.expect("thawed");
    let error = pct.acquire_pause_lock(vmid(), &owner).await.expect_err("the lock is in /etc/pve");
    assert!(matches!(error.kind, ErrorKind::NoQuorum(_)), "{error}");
    let another = SandboxId::new(2, &[2; 10]);
    let error = pct.freeze(vmid(), &another, THAW).await.expect_err("not this one's");
    assert!(matches!(error.kind, ErrorKind::NoQuorum(_)), "{error}");
}

#[tokio::test]
async fn unknown_init_is_refused_without_pmxcfs() {
    // Tries the same pid with another start, and another pid.
    for (pid, start) in [(72, 9000), (99, 5000)] {
        let tree = Tree::new(false, true);
        tree.run_init(72, 5000);
        drop(tree.config().await);
        tree.unmount();
        tree.run_init(pid, start);
        let error = tree.pct.carries(&mark()).await.expect_err("who knows");
        assert!(matches!(error.kind, ErrorKind::NoQuorum(_)), "{error}");
        let frozen = tree.pct.freeze(vmid(), &mark().sandbox_id, THAW).await;
        assert!(frozen.is_err() && !tree.pct.frozen(vmid()).await);
    }
}
