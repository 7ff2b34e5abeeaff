//! A cluster in a temporary directory: /etc/pve as plain files, and a pool as plain directories; or
//! a real pool and real containers if the environment provides them.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use standin::Roots;

/// Paths of a node that a command line may contain. `/usr/sbin/btrfs` is among them because a
/// recorded command puts a wrapper there, which must never replace the machine's own.
const MOVED: [&str; 11] = [
    "/etc/pve",
    "/var/lib/lxc",
    "/var/lib/vz",
    "/run/lock/lxc",
    "/var/lock/pve-manager",
    "/var/log/pve/tasks",
    "/run/pve",
    "/usr/sbin/pct",
    "/usr/sbin/btrfs",
    "/tmp/",
    "/rpool",
];

/// Output of a command.
#[derive(Debug)]
pub(crate) struct Said {
    pub out: Vec<String>,
    pub err: Vec<String>,
    pub exit: Option<i32>,
}

/// Environment in which real containers can run.
#[derive(Debug, Clone)]
pub(crate) struct RealLxc {
    /// Directory on btrfs, for pools.
    pub pool: PathBuf,
    /// Root file system with an init.
    pub rootfs: PathBuf,
}

impl RealLxc {
    /// Reads `STANDIN_LXC=1` with `STANDIN_POOL` and `STANDIN_ROOTFS`, which are set inside a node.
    pub(crate) fn from_env() -> Option<Self> {
        let on = std::env::var("STANDIN_LXC").is_ok_and(|v| v == "1");
        let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_default());
        on.then(|| Self { pool: path("STANDIN_POOL"), rootfs: path("STANDIN_ROOTFS") })
    }
}

/// A cluster of one or two nodes.
pub(crate) struct Cluster {
    pub dir: PathBuf,
    roots: Roots,
    env: Vec<(&'static str, PathBuf)>,
    real: Option<RealLxc>,
    /// Lock against other replays, whose containers would share one cgroup tree; the tests may be
    /// several processes.
    _alone: Option<File>,
    /// Process groups of started commands.
    groups: Mutex<Vec<u32>>,
    _temp: tempfile::TempDir,
}

impl Cluster {
    pub(crate) fn new(real: Option<RealLxc>) -> Self {
        let alone = real.as_ref().map(|real| {
            let pool = File::open(&real.pool).expect("a pool");
            pool.lock().expect("a lock");
            pool
        });
        let parent = real.as_ref().map_or_else(std::env::temp_dir, |real| real.pool.clone());
        let temp = tempfile::Builder::new().prefix("golden-").tempdir_in(parent);
        let temp = temp.expect("a temporary directory");
        let dir = temp.path().to_owned();
        let (roots, mut env) = Roots::below(&dir);
        if real.is_some() {
            env.retain(|(name, _)| *name != "PCT_SYS_NET");
        }
        let cluster =
            Self { dir, roots, env, real, _alone: alone, groups: Mutex::default(), _temp: temp };
        cluster.fill();
        cluster
    }

    fn fill(&self) {
        let make = |path: &Path| fs::create_dir_all(path).expect("a directory");
        for node in ["pve1", "pve2"] {
            make(&self.roots.etc_pve.join("nodes").join(node).join("lxc"));
        }
        for path in [&self.roots.pool, &self.roots.lxc_dir, &self.roots.template_cache] {
            make(path);
        }
        make(&self.roots.lock_dir);
        make(&self.roots.control_dir);
        make(&self.roots.sys_net.join("vmbr0"));
        make(&self.dir.join("tmp"));
        symlink("nodes/pve1/lxc", self.roots.etc_pve.join("lxc")).expect("a link");
        let bin = self.dir.join("usr/sbin");
        make(&bin);
        for name in ["pct", "pvesm"] {
            symlink(env!("CARGO_BIN_EXE_pct"), bin.join(name)).expect("a link");
        }
        if self.real.is_some() {
            for name in ["attach", "freeze", "info", "stop", "unfreeze", "wait"] {
                let lxc = self.roots.lxc_dir.display();
                let text = format!("#!/bin/sh\nexec /usr/bin/lxc-{name} -P {lxc} \"$@\"\n");
                let path = bin.join(format!("lxc-{name}"));
                fs::write(&path, text).expect("a file");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
            }
        }
        self.write("etc/pve/storage.cfg", "zfspool: btr\n\tpool rpool/data\n\tcontent rootdir\n");
        self.set_quorum(true);
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.dir.join(path), text).expect("a file");
    }

    pub(crate) fn set_quorum(&self, quorate: bool) {
        let bit = u8::from(quorate);
        let text = format!(
            "{{\n\"nodename\": \"pve1\",\n\"version\": 6,\n\"cluster\": {{ \"name\": \"testcl\", \
             \"version\": 2, \"nodes\": 2, \"quorate\": {bit} }},\n\"nodelist\": {{\n  \"pve1\": \
             {{ \"id\": 1, \"online\": 1, \"ip\": \"10.99.0.11\"}},\n  \"pve2\": {{ \"id\": 2, \
             \"online\": {bit}, \"ip\": \"10.99.0.12\"}}\n  }}\n}}\n"
        );
        self.write("etc/pve/.members", &text);
    }

    pub(crate) fn control_dir(&self) -> &Path {
        &self.roots.control_dir
    }

    /// Prepares a recorded command line, with its paths moved below our directory.
    pub(crate) fn command(&self, text: &str, node: &str) -> Command {
        let mut text = text.to_owned();
        // Marked first, because the directory itself is below one of these prefixes.
        for prefix in MOVED {
            text = text.replace(prefix, &format!("\u{1}{prefix}"));
        }
        let text = text.replace('\u{1}', &self.dir.display().to_string());
        let mut command = Command::new("bash");
        let path = format!("{}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin", self.dir.display());
        let functions = self.functions();
        command
            .arg("-c")
            .arg(format!("{functions}{text}"))
            .env_clear()
            .env("PATH", path)
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", "/root")
            .env("TERM", "linux")
            .env("PCT_NODE", node)
            .env("PCT_ANY_USER", "1")
            .envs(self.env.iter().map(|(k, v)| (*k, v.as_os_str())))
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Runs a recorded command line.
    pub(crate) fn run(&self, text: &str, node: &str) -> Said {
        let mut command = self.command(text, node);
        // Files, not pipes: a command's background processes may hold pipes open.
        let files = ["_o", "_e"].map(|name| self.dir.join("tmp").join(name));
        let [out, err] = files.each_ref().map(|path| File::create(path).expect("a file"));
        // Its own group, so that its background processes do not outlive the replay.
        command.stdout(out).stderr(err).process_group(0);
        let mut child = command.spawn().expect("bash runs");
        self.groups.lock().expect("a list").push(child.id());
        let deadline = Instant::now() + Duration::from_secs(120);
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child") {
                break Some(status);
            }
            if Instant::now() > deadline {
                drop(child.kill());
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let [out, err] = files.map(|path| {
            let bytes = fs::read(path).expect("a file");
            String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()
        });
        Said { out, err, exit: status.and_then(|s| s.code()) }
    }

    /// Returns shell functions for fixtures: a template or a container, without going through
    /// `pct`.
    fn functions(&self) -> String {
        let dir = self.dir.display();
        let fill = match &self.real {
            Some(real) => {
                format!("btrfs -q subvolume snapshot {} $v >/dev/null", real.rootfs.display())
            }
            None => "mkdir -p $v/etc; echo abc > $v/etc/machine-id".to_owned(),
        };
        let only = if self.real.is_some() { "\"$@\"" } else { ":" };
        format!(
            "lxc_only() {{ {only}; }}\n\
             running() {{ lxc_only pct start $1; }}\n\
             volume() {{ local v={dir}/rpool/$1; {fill}; }}\n\
             guest() {{ local f={dir}/etc/pve/nodes/${{5:-pve1}}/lxc/$1.conf; \
             printf '%s\\n' \"arch: amd64\" \"hostname: $2\" \"memory: $3\" \"net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,${{6:-ip=dhcp}},type=veth\" \"ostype: ${{8:-debian}}\" \"rootfs: $4,size=${{7:-2G}}\" \"swap: 512\" \"unprivileged: 1\" > $f; }}\n\
             put() {{ local f={dir}/etc/pve/nodes/pve1/lxc/$1.conf; printf '%s\\n' \"$2\" >> $f; sort -o $f $f; }}\n"
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for group in self.groups.lock().expect("a list").iter() {
            let group = format!("-{group}");
            let mut kill = Command::new("kill");
            drop(kill.args(["-KILL", "--", &group]).stderr(Stdio::null()).status());
        }
        // Removes mounts and containers of a failed replay.
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let ours = self.dir.display().to_string();
        for target in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            if target.starts_with(&ours) {
                drop(Command::new("umount").args(["-l", target]).status());
            }
        }
        if self.real.is_some() {
            for entry in fs::read_dir(&self.roots.lxc_dir).into_iter().flatten().flatten() {
                let mut stop = Command::new("lxc-stop");
                stop.arg("-P").arg(&self.roots.lxc_dir).arg("-k").arg("-n").arg(entry.file_name());
                drop(stop.stderr(Stdio::null()).status());
            }
            let pool = self.roots.pool.display();
            let script = format!("for v in {pool}/*; do btrfs -q subvolume delete \"$v\"; done");
            drop(Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status());
        }
    }
}
