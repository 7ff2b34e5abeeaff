//! A node of PVE as far as the packages can tell: a Debian root that runs its own systemd as pid 1, with
//! the stand-in for `pct`, a pool of btrfs, and a directory for /etc/pve.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

use super::root::{Base, Root, said};

/// Longest boot.
const BOOT: Duration = Duration::from_secs(90);
/// Longest run of a command inside, in seconds.
const COMMAND_S: &str = "300";
/// Cgroup on the machine below which the roots run.
const CGROUP: &str = "pve-sandbox-deb";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const STORAGE: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,vztmpl,backup\n\n\
     zfspool: local-zfs\n\tpool rpool/data\n\tsparse 1\n\tcontent images,rootdir\n";

/// A root that has been booted; it ends with this.
pub(crate) struct Booted {
    root: Root,
    /// `unshare`, which takes everything down with itself.
    boot: Child,
    /// Its systemd, as the machine numbers it.
    init: u32,
    cgroup: PathBuf,
    pool: PathBuf,
}

impl Booted {
    /// Makes a node and boots it.
    pub(crate) fn start(base: Base, name: &str) -> Self {
        let root = Root::of(base, name);
        furnish(&root);
        let pool = root.dir().with_extension("pool");
        let image = fs::File::create(&pool).expect("an image");
        image.set_len(8 << 30).expect("its size");
        let made = Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&pool).output();
        assert!(made.expect("btrfs-progs").status.success(), "a file system");

        let cgroup = cgroup2().join(CGROUP).join(name);
        fs::create_dir_all(&cgroup).expect("a cgroup");
        // The process enters the cgroup before its namespace begins, so that it sees nothing above.
        let enter = "echo $$ >\"$1\"; shift; exec \"$@\"";
        let boot = Command::new("bash")
            .args(["-c", enter, "bash"])
            .arg(cgroup.join("cgroup.procs"))
            // A test that is killed leaves no machine behind, which would hold the root.
            .args(["setpriv", "--pdeathsig", "KILL"])
            .args(["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--cgroup", "--fork"])
            .args(["--kill-child=KILL", "--propagation=private", "bash", "-c"])
            .args([include_str!("boot.sh"), "bash"])
            .arg(root.dir())
            .arg(&pool)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("bash");
        let mut booted = Self { root, boot, init: 0, cgroup, pool };
        booted.until_up();
        booted
    }

    fn until_up(&mut self) {
        let deadline = Instant::now() + BOOT;
        loop {
            assert!(Instant::now() < deadline, "{} does not boot", self.root.dir().display());
            let ended = self.boot.try_wait().expect("a child");
            assert!(ended.is_none(), "the boot ended: {ended:?}");
            if let Some(init) = child(self.boot.id()) {
                self.init = init;
                // Degraded, too: a unit of Debian's own may need more than this root has.
                let (_, state) = self.run(&["systemctl", "is-system-running", "--wait"]);
                if matches!(state.trim(), "running" | "degraded") {
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Returns a path of the root, as seen from outside.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.root.path(inside)
    }

    /// Copies a package of `make deb` into the root.
    pub(crate) fn package(&self, name: &str) -> String {
        let copied = self.root.package(name);
        // What is in the root's /tmp is hidden under the one of the boot.
        let inside = format!("/root/{name}.deb");
        fs::rename(self.root.path(&copied), self.root.path(&inside)).expect("moved");
        inside
    }

    /// Prepares a command inside.
    pub(crate) fn command(&self, argv: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--signal=KILL", COMMAND_S, "nsenter", "--target", &self.init.to_string()])
            .args(["--mount", "--net", "--ipc", "--uts", "--pid", "--cgroup", "--root", "--wd"])
            .args(["env", "-i", PATH, "HOME=/root", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command inside to its end; returns exit code and output.
    pub(crate) fn run(&self, argv: &[&str]) -> (Option<i32>, String) {
        said(&self.command(argv).output().expect("nsenter"))
    }

    /// Runs a command inside that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, argv: &[&str]) -> String {
        let (code, text) = self.run(argv);
        assert_eq!(code, Some(0), "{argv:?}: {text}");
        text
    }

    /// Connects to an address inside.
    pub(crate) fn connect(&self, address: SocketAddr) -> TcpStream {
        self.in_network(move || TcpStream::connect(address).expect("connected"))
    }

    /// Listens on an address inside.
    pub(crate) fn listen(&self, address: SocketAddr) -> TcpListener {
        self.in_network(move || TcpListener::bind(address).expect("bound"))
    }

    fn in_network<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.init)).expect("its network");
        let enter_and_work = move || {
            setns(network, CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        };
        // A thread of its own, which stays in there until it ends.
        std::thread::spawn(enter_and_work).join().expect("a socket")
    }

    /// Returns a property of a unit.
    #[track_caller]
    pub(crate) fn unit(&self, unit: &str, property: &str) -> String {
        let text = self.ok(&["systemctl", "show", "--value", "--property", property, unit]);
        text.trim().to_owned()
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        drop(self.boot.kill());
        drop(self.boot.wait());
        // What left systemd's tree, as a container's monitor does.
        drop(fs::write(self.cgroup.join("cgroup.kill"), "1"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while remove_tree(&self.cgroup).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(fs::remove_file(&self.pool));
    }
}

/// Puts into a root what a PVE node has and Debian has not.
fn furnish(root: &Root) {
    let write = |path: &str, text: &str| {
        let path = root.path(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    };
    for dir in ["/etc/pve/nodes/pve1/lxc", "/rpool", "/var/log/pve/tasks", "/run"] {
        fs::create_dir_all(root.path(dir)).expect("made");
    }
    write("/etc/pve/.members", "{\"nodename\":\"pve1\",\"version\":0}");
    write("/etc/pve/storage.cfg", STORAGE);
    symlink("nodes/pve1", root.path("/etc/pve/local")).expect("linked");
    symlink("local/lxc", root.path("/etc/pve/lxc")).expect("linked");
    write(
        "/etc/network/interfaces",
        "source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n",
    );
    write("/etc/hostname", "pve1\n");
    write("/etc/hosts", "127.0.0.1 localhost\n192.0.2.11 pve1\n");
    write("/etc/resolv.conf", "nameserver 192.0.2.53\n");
    for file in ["/etc/subuid", "/etc/subgid"] {
        write(file, "root:100000:65536\n");
    }
    // Debian's units of LXC, which PVE has others for, only delay the boot.
    for unit in ["lxc.service", "lxc-net.service", "lxc-monitord.service"] {
        let at = root.path("/etc/systemd/system").join(unit);
        drop(fs::remove_file(&at));
        symlink("/dev/null", at).expect("masked");
    }
    // The stand-in has the place of Debian's program and calls it.
    let real = root.path(standin::REAL_LXC_ATTACH);
    fs::create_dir_all(real.parent().expect("a folder")).expect("made");
    fs::rename(root.path("/usr/bin/lxc-attach"), &real).expect("moved");
    // Of the same profile as this program.
    let beside = std::env::current_exe().expect("a program");
    let mut dirs = beside.ancestors().skip(1).take(2).map(|dir| dir.join("pct"));
    let standin = dirs.find(|pct| pct.exists()).expect("the stand-in for pct: make build");
    for at in ["/usr/sbin/pct", "/usr/sbin/pvesm", "/usr/bin/lxc-attach"] {
        fs::copy(&standin, root.path(at)).expect("the stand-in: make build");
        fs::set_permissions(root.path(at), fs::Permissions::from_mode(0o755)).expect("executable");
    }
}

/// Returns where the machine's v2 hierarchy is mounted.
fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = lines.find(|fields| fields.get(2) == Some(&"cgroup2"));
    found.and_then(|fields| fields.get(1).map(PathBuf::from)).expect("a hierarchy of cgroup v2")
}

/// Returns the only child of a process.
fn child(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}
