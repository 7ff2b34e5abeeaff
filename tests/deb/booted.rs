//! A node of PVE as far as the packages can tell: a Debian root that runs its own systemd as pid 1, with
//! the stand-in for `pct`, a pool of btrfs, and a directory for /etc/pve.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

use super::root::{Base, Root, said, target};

/// Longest boot.
const BOOT: Duration = Duration::from_secs(90);
/// Longest run of a command inside, in seconds.
const COMMAND_S: &str = "300";
/// Cgroup on the machine below which the roots run.
const CGROUP: &str = "pve-sandbox-deb";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Storages of a node: the templates' archives, and the pool.
pub(crate) const STORAGE: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,vztmpl,backup\n\n\
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
    /// Makes a node that is in no cluster, and boots it.
    pub(crate) fn start(base: Base, name: &str) -> Self {
        Self::boot(base, name, 1, None)
    }

    /// Makes the node `pveN` of a cluster and boots it. Its /etc/pve is what is mounted at `pve`.
    pub(crate) fn of_cluster(base: Base, number: u8, pve: &Path) -> Self {
        Self::boot(base, &format!("cluster-pve{number}"), number, Some(pve))
    }

    fn boot(base: Base, name: &str, number: u8, pve: Option<&Path>) -> Self {
        let cgroup = cgroup_of(name);
        // A machine of a run that was killed would hold the root.
        end_cgroup(&cgroup);
        let root = Root::of(base, name);
        furnish(&root, number);
        if pve.is_none() {
            stand_alone(&root, number);
        }
        let pool = root.dir().with_extension("pool");
        let image = fs::File::create(&pool).expect("an image");
        image.set_len(8 << 30).expect("its size");
        let made = Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&pool).output();
        assert!(made.expect("btrfs-progs").status.success(), "a file system");

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
            .arg(address(number))
            .args(pve)
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

    /// Prepares a program of this machine that runs in the node's network.
    pub(crate) fn outside(&self, program: &str) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--signal=KILL", COMMAND_S, "nsenter", "--target", &self.init.to_string()])
            .args(["--net", program])
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
        end_cgroup(&self.cgroup);
        drop(fs::remove_file(&self.pool));
    }
}

/// Returns the address of a node by its number.
pub(crate) fn address(number: u8) -> String {
    format!("192.0.2.{}", 10 + number)
}

/// Gives a root the /etc/pve of a node that is in no cluster.
fn stand_alone(root: &Root, number: u8) {
    let (name, pve) = (format!("pve{number}"), root.path("/etc/pve"));
    fs::create_dir_all(pve.join("nodes").join(&name).join("lxc")).expect("made");
    let members = format!("{{\"nodename\":\"{name}\",\"version\":0}}");
    fs::write(pve.join(".members"), members).expect("written");
    fs::write(pve.join("storage.cfg"), STORAGE).expect("written");
    symlink(format!("nodes/{name}"), pve.join("local")).expect("linked");
    symlink("local/lxc", pve.join("lxc")).expect("linked");
}

/// Puts into a root what a PVE node has and Debian has not, but for /etc/pve.
fn furnish(root: &Root, number: u8) {
    let write = |path: &str, text: &str| {
        let path = root.path(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    };
    for dir in ["/etc/pve", "/rpool", "/var/log/pve/tasks", "/run"] {
        fs::create_dir_all(root.path(dir)).expect("made");
    }
    // udev gives the interfaces of two machines with one id the same addresses of Ethernet.
    write("/etc/machine-id", &format!("{number:032x}\n"));
    write(
        "/etc/network/interfaces",
        "source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n",
    );
    write("/etc/hostname", &format!("pve{number}\n"));
    write("/etc/hosts", &format!("127.0.0.1 localhost\n{} pve{number}\n", address(number)));
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

/// Returns the cgroup of a root: the same in each run of this checkout, and another in each checkout of the machine.
fn cgroup_of(name: &str) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    target().hash(&mut hasher);
    cgroup2().join(CGROUP).join(format!("{:016x}-{name}", hasher.finish()))
}

/// Kills the processes of a cgroup, if there is one, and removes it.
fn end_cgroup(cgroup: &Path) {
    drop(fs::write(cgroup.join("cgroup.kill"), "1"));
    let deadline = Instant::now() + Duration::from_secs(10);
    while cgroup.exists() && remove_tree(cgroup).is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
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
