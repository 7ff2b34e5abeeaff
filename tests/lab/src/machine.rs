//! Prepares the machine: packages, sub-ids, device nodes, file systems.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::run::run;

const PREPARE: &str = include_str!("../prepare");
const PACKAGES: &str = include_str!("../packages.txt");
/// Ids of the containers' users, as on PVE.
const SUBIDS: &str = "root:100000:65536";

/// Kernel limits that a few dozen containers reach, because to the kernel all of them are one user.
/// The values are those of PVE; limits are raised, never lowered.
const SYSCTLS: [(&str, u64); 5] = [
    ("fs/inotify/max_queued_events", 8_388_608),
    ("fs/inotify/max_user_instances", 65_536),
    ("fs/inotify/max_user_watches", 4_194_304),
    ("kernel/keys/maxkeys", 2_000),
    ("kernel/keys/maxbytes", 2_000_000),
];

/// Installs missing packages and creates the devices and settings that the kernel side needs.
pub fn prepare() -> Result<()> {
    packages()?;
    for file in ["/etc/subuid", "/etc/subgid"] {
        subids(Path::new(file))?;
    }
    devices()?;
    for (name, least) in SYSCTLS {
        sysctl(name, least)?;
    }
    for (fs_type, module) in [("btrfs", "btrfs"), ("overlay", "overlay"), ("fuse", "fuse")] {
        filesystem(fs_type, module)?;
    }
    Ok(())
}

fn packages() -> Result<()> {
    let names: Vec<&str> = PACKAGES
        .lines()
        .map(|line| line.split('#').next().unwrap_or("").trim())
        .filter(|name| !name.is_empty())
        .collect();
    let mut shell = Command::new("/bin/sh")
        .arg("-s")
        .env("PVE_LAB_PACKAGES", names.join(" "))
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run /bin/sh")?;
    let mut stdin = shell.stdin.take().context("no pipe to the shell")?;
    stdin.write_all(PREPARE.as_bytes())?;
    drop(stdin);
    let status = shell.wait()?;
    if !status.success() {
        bail!("the machine could not be made ready (see above)");
    }
    Ok(())
}

fn subids(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file).unwrap_or_default();
    if text.lines().any(|line| line.trim() == SUBIDS) {
        return Ok(());
    }
    let mut file = OpenOptions::new().create(true).append(true).open(file)?;
    let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    writeln!(file, "{newline}{SUBIDS}").context("cannot write the sub-ids")
}

fn sysctl(name: &str, least: u64) -> Result<()> {
    let file = Path::new("/proc/sys").join(name);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {name}"))?;
    if text.trim().parse::<u64>().is_ok_and(|now| now >= least) {
        return Ok(());
    }
    fs::write(&file, least.to_string()).with_context(|| format!("cannot raise {name}"))
}

/// Creates missing device nodes: a chroot's /dev may be a plain directory.
fn devices() -> Result<()> {
    let node = |path: &str, kind: SFlag, major: u64, minor: u64| -> Result<()> {
        if Path::new(path).exists() {
            return Ok(());
        }
        if let Some(dir) = Path::new(path).parent() {
            fs::create_dir_all(dir)?;
        }
        mknod(path, kind, Mode::from_bits_truncate(0o660), makedev(major, minor))
            .with_context(|| format!("cannot make {path}"))
    };
    node("/dev/fuse", SFlag::S_IFCHR, 10, 229)?;
    node("/dev/net/tun", SFlag::S_IFCHR, 10, 200)?;
    node("/dev/loop-control", SFlag::S_IFCHR, 10, 237)?;
    for minor in 0..16 {
        node(&format!("/dev/loop{minor}"), SFlag::S_IFBLK, 7, minor)?;
    }
    Ok(())
}

fn filesystem(fs_type: &str, module: &str) -> Result<()> {
    let known = || -> Result<bool> {
        let text = fs::read_to_string("/proc/filesystems")?;
        Ok(text.lines().any(|line| line.split_ascii_whitespace().last() == Some(fs_type)))
    };
    if known()? {
        return Ok(());
    }
    // Loading modules may be impossible; the check below then reports what is missing.
    let tried = run("modprobe", [module]);
    if !known()? {
        bail!("this kernel has no {fs_type}, which the lab needs ({tried:?})");
    }
    Ok(())
}
