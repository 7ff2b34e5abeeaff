//! A Debian root for the installation of packages. It has no network: everything that a package needs
//! must be in it or in its base.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
};

use super::built;

/// Longest time of a step, in seconds.
const DEADLINE_S: &str = "600";
/// Kinds of root. Each is built once, and copied for a test.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Base {
    /// Debian 12 with the packages alone that PVE hosts have and a minimal root has not.
    Bare,
    /// Debian 12 as PVE 8 has it, which can be booted.
    Bookworm,
    /// Debian 13 as PVE 9 has it, which can be booted.
    Trixie,
}

/// Packages of the bases that can be booted. `ifupdown2` and what it needs is PVE's way to set up a
/// network; the others are what `pct`, the agent and the tests use.
const BOOTED: &str = "systemd,systemd-sysv,dbus,udev,caddy,lxc,nftables,dnsmasq-base,ifupdown2,iproute2,\
    btrfs-progs,uidmap,procps,ca-certificates";

impl Base {
    const fn name(self) -> &'static str {
        match self {
            Self::Bare => "base",
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    const fn suite(self) -> &'static str {
        match self {
            Self::Bare | Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    const fn include(self) -> &'static str {
        match self {
            Self::Bare => "systemd,caddy,nftables",
            Self::Bookworm | Self::Trixie => BOOTED,
        }
    }
}

/// A root, which is removed at the end.
pub(crate) struct Root {
    dir: PathBuf,
}

impl Root {
    /// Creates a copy of the bare base.
    pub(crate) fn new(name: &str) -> Self {
        Self::of(Base::Bare, name)
    }

    /// Creates a copy of a base.
    pub(crate) fn of(base: Base, name: &str) -> Self {
        let all = target().join("deb-root");
        let base = ensure(base, &all);
        let dir = all.join(name);
        remove(&dir);
        let copied =
            Command::new("cp").arg("-a").arg("--reflink=auto").arg(&base).arg(&dir).status();
        assert!(copied.expect("cp").success(), "cannot copy the base");
        Self { dir }
    }

    /// Returns the directory of the root.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns a path of the root, as seen from outside.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// Copies a package of `make deb` into the root; returns its path inside.
    #[track_caller]
    pub(crate) fn package(&self, name: &str) -> String {
        let inside = format!("/tmp/{name}.deb");
        let package = built::file(&built::dir(), name, ".deb");
        fs::copy(package, self.path(&inside)).expect("copied");
        inside
    }

    /// Prepares a command in the root, in its own namespaces: processes that it starts end with it.
    pub(crate) fn command(&self, argv: &[&str]) -> Command {
        let mut command = limited(&["unshare", "--mount", "--net", "--ipc", "--uts"]);
        command
            .args(["--pid", "--fork", "--kill-child=KILL"])
            .arg(format!("--mount-proc={}", self.path("/proc").display()))
            .arg("chroot")
            .arg(&self.dir)
            .args(argv)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end; returns exit code and output.
    pub(crate) fn run(&self, argv: &[&str]) -> (Option<i32>, String) {
        said(&self.command(argv).output().expect("unshare"))
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, argv: &[&str]) -> String {
        let (code, text) = self.run(argv);
        assert_eq!(code, Some(0), "{argv:?}: {text}");
        text
    }

    /// Starts a command that keeps running.
    pub(crate) fn start(&self, argv: &[&str], notify: &str) -> Child {
        self.command(argv).env("NOTIFY_SOCKET", notify).spawn().expect("unshare")
    }

    /// Returns whether a path exists inside.
    pub(crate) fn has(&self, inside: &str) -> bool {
        self.path(inside).symlink_metadata().is_ok()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// Prepares a command with a deadline.
pub(crate) fn limited(argv: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", DEADLINE_S]).args(argv);
    command
}

/// Returns exit code and output of a program.
pub(crate) fn said(output: &Output) -> (Option<i32>, String) {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

pub(crate) fn target() -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a folder of it");
    top.join("target")
}

fn ensure(base: Base, all: &Path) -> PathBuf {
    // The tests of one run share the bases.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock();
    let name = base.name();
    let (made, half) = (all.join(name), all.join(format!("{name}.new")));
    // A base with other packages is of another version of this file.
    let stamp = all.join(format!("{name}.packages"));
    if made.is_dir() && fs::read_to_string(&stamp).is_ok_and(|old| old == base.include()) {
        return made;
    }
    remove(&half);
    remove(&made);
    fs::create_dir_all(all).expect("folder");
    eprintln!("making a Debian root in {} (some minutes)", made.display());
    let mirror = lab::sources::mirror(Path::new("/etc/apt"));
    let include = format!("--include={}", base.include());
    let output = limited(&["debootstrap", "--variant=minbase", &include])
        .arg(base.suite())
        .arg(&half)
        .arg(mirror)
        .output()
        .expect("debootstrap must be installed");
    let (code, text) = said(&output);
    assert_eq!(code, Some(0), "debootstrap: {text}");
    fs::write(&stamp, base.include()).expect("written");
    fs::rename(&half, &made).expect("renamed");
    made
}

/// Removes a root, if nothing is mounted in it: the removal would delete files in the mount.
fn remove(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let inside = format!("{}/", dir.display());
    let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let left: Vec<_> = mounted.filter(|at| at.starts_with(&inside)).collect();
    assert!(left.is_empty(), "still mounted: {left:?}");
    match fs::remove_dir_all(dir) {
        // The end of a test that fails says why it fails.
        Err(error) if error.kind() != io::ErrorKind::NotFound && !std::thread::panicking() => {
            panic!("a machine of an earlier run may hold {}: {error}", dir.display());
        }
        Ok(()) | Err(_) => {}
    }
}
