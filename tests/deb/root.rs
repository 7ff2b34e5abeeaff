//! A Debian 12 root for the installation of packages. Its PID 1 is not systemd, and it has no
//! network: everything that a package needs must be in it or in the base.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
};

/// Longest time of a step, in seconds.
const DEADLINE_S: &str = "600";
/// Packages that PVE hosts have and a minimal root has not.
const INCLUDE: &str = "--include=systemd,caddy";

/// A root, which is removed at the end.
pub(crate) struct Root {
    dir: PathBuf,
}

impl Root {
    /// Creates a copy of the base, which is built once.
    pub(crate) fn new(name: &str) -> Self {
        let all = target().join("deb-root");
        let base = base(&all);
        let dir = all.join(name);
        remove(&dir);
        let copied =
            Command::new("cp").arg("-a").arg("--reflink=auto").arg(&base).arg(&dir).status();
        assert!(copied.expect("cp").success(), "cannot copy the base");
        Self { dir }
    }

    /// Returns a path of the root, as seen from outside.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// Returns the package that `make deb` built.
    #[track_caller]
    pub(crate) fn package(&self, name: &str) -> String {
        let dir = target().join("debian");
        let found = fs::read_dir(&dir).into_iter().flatten().flatten().find(|entry| {
            let file = entry.file_name().to_string_lossy().into_owned();
            file.starts_with(&format!("{name}_")) && file.ends_with(".deb")
        });
        let found =
            found.unwrap_or_else(|| panic!("no package {name} in {}: make deb", dir.display()));
        let inside = format!("/tmp/{name}.deb");
        fs::copy(found.path(), self.path(&inside)).expect("copied");
        inside
    }

    /// Prepares a command in the root, in its own namespaces: processes that it starts end with it.
    pub(crate) fn command(&self, argv: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--signal=KILL", DEADLINE_S, "unshare", "--mount", "--net", "--ipc", "--uts"])
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

pub(crate) fn said(output: &Output) -> (Option<i32>, String) {
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn target() -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a folder of it");
    top.join("target")
}

fn base(all: &Path) -> PathBuf {
    // The tests of one run share the base.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock();
    let (base, half) = (all.join("base"), all.join("base.new"));
    if base.is_dir() {
        return base;
    }
    remove(&half);
    fs::create_dir_all(all).expect("folder");
    eprintln!("making a Debian 12 root in {} (a minute or two)", base.display());
    let mirror = lab::sources::mirror(Path::new("/etc/apt"));
    let made = Command::new("timeout")
        .args([
            "--signal=KILL",
            DEADLINE_S,
            "debootstrap",
            "--variant=minbase",
            INCLUDE,
            "bookworm",
        ])
        .arg(&half)
        .arg(mirror)
        .output()
        .expect("debootstrap must be installed");
    let (code, text) = said(&made);
    assert_eq!(code, Some(0), "debootstrap: {text}");
    fs::rename(&half, &base).expect("renamed");
    base
}

/// Removes a root, if nothing is mounted in it: the removal would delete files in the mount.
fn remove(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let inside = format!("{}/", dir.display());
    let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let left: Vec<_> = mounted.filter(|at| at.starts_with(&inside)).collect();
    assert!(left.is_empty(), "still mounted: {left:?}");
    fs::remove_dir_all(dir).ok();
}
