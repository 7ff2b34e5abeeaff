//! The templates of the sandboxes: small Debians that boot in a fraction of a second. Each is built
//! once and kept as a tar; the stamp beside it is the hash of its recipe.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, ErrorKind};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use data_encoding::HEXLOWER;
use nix::mount::{MntFlags, umount2};
use sha2::{Digest as _, Sha256};

use crate::image::{IMAGES, Image};
use crate::layout::Layout;
use crate::mounts;
use crate::progress::{Step, step};
use crate::run::{run, run_command};
use crate::sources;

/// The release of Debian in the templates.
const SUITE: &str = "bookworm";
const MASKED: &str = include_str!("../template/masked.txt");

/// Files that are written into each template: path, mode, text.
const FILES: [(&str, u32, &str); 10] = [
    ("etc/systemd/system/www.service", 0o644, include_str!("../template/www.service")),
    (
        "etc/systemd/system/networking.service",
        0o644,
        include_str!("../template/networking.service"),
    ),
    ("etc/systemd/journald.conf.d/lab.conf", 0o644, include_str!("../template/journald.conf")),
    ("usr/local/sbin/interfaces-up", 0o755, include_str!("../template/interfaces-up")),
    ("etc/udhcpc/default.script", 0o755, include_str!("../template/udhcpc.script")),
    ("usr/local/bin/probe", 0o755, include_str!("../template/probe")),
    ("srv/www/index.html", 0o644, include_str!("../template/index.html")),
    // Empty, not missing: each clone makes its own, and no first-boot work is done.
    ("etc/machine-id", 0o444, ""),
    ("etc/hostname", 0o644, "debian\n"),
    ("etc/resolv.conf", 0o644, ""),
];
/// Files that no sandbox reads and every clone would carry.
const REMOVED: [&str; 9] = [
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/cache/debconf",
    "var/lib/apt/lists",
    "var/log/bootstrap.log",
];

/// Builds each template unless one of the same recipe exists.
pub fn ensure_all(layout: &Layout) -> Result<()> {
    let mirror = sources::mirror(Path::new("/etc/apt"));
    for image in &IMAGES {
        let stamp = stamp(image, &mirror);
        let stamp_file = layout.template_stamp(image);
        let built = fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp);
        if built && layout.template_tar(image).exists() {
            continue;
        }
        let what = format!("building the template `{}`: Debian {SUITE} from {mirror}", image.name);
        step(&what, |step| build(layout, image, &mirror, step))?;
        fs::write(stamp_file, stamp).context("cannot write the template's stamp")?;
    }
    // The archives of the packages serve both builds, and no later one.
    match fs::remove_dir_all(archives(layout)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Returns the directory that keeps downloaded packages between two builds.
fn archives(layout: &Layout) -> PathBuf {
    layout.cache().join("archives")
}

fn build(layout: &Layout, image: &Image, mirror: &str, step: &Step) -> Result<()> {
    let root = layout.cache().join("template-root");
    clear(&root)?;
    fs::create_dir_all(&root)?;
    debootstrap(layout, image, mirror, &root, step)?;
    step.note("trimming");
    customise(&root)?;
    step.note("packing");
    let new = layout.template_tar(image).with_extension("new");
    let mut tar = Command::new("tar");
    // A container has its own devices; a user namespace could not create them anyway.
    tar.args(["--numeric-owner", "--exclude=./dev/*", "-C"]).arg(&root).arg("-cf").arg(&new);
    run_command(tar.arg("."))?;
    fs::rename(&new, layout.template_tar(image))?;
    clear(&root)
}

fn debootstrap(
    layout: &Layout,
    image: &Image,
    mirror: &str,
    root: &Path,
    step: &Step,
) -> Result<()> {
    let log = layout.logs().join(format!("debootstrap-{}.log", image.name));
    let include = image.package_names().collect::<Vec<_>>().join(",");
    let archives = archives(layout);
    fs::create_dir_all(&archives)?;
    let mut child = Command::new("debootstrap")
        .arg("--variant=minbase")
        .arg(format!("--cache-dir={}", archives.display()))
        .arg(format!("--include={include}"))
        .arg(SUITE)
        .arg(root)
        .arg(mirror)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?)
        .spawn()
        .context("cannot run debootstrap")?;
    let stdout = child.stdout.take().context("debootstrap has no output")?;
    let mut last = String::new();
    for line in BufReader::new(stdout).lines() {
        last = line?;
        step.note(last.trim_start_matches("I: "));
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("debootstrap failed ({status}) after {last:?}; see {}", log.display());
    }
    Ok(())
}

fn customise(root: &Path) -> Result<()> {
    for path in REMOVED {
        match fs::remove_dir_all(root.join(path)) {
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                fs::remove_file(root.join(path))?;
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
    }
    // apt needs its directories when somebody uses it.
    for dir in ["var/cache/apt/archives/partial", "var/lib/apt/lists/partial"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let units = root.join("etc/systemd/system");
    for unit in lines(MASKED) {
        link("/dev/null", &units.join(unit))?;
    }
    link("/lib/systemd/system/multi-user.target", &units.join("default.target"))?;
    for (path, mode, text) in FILES {
        let file = root.join(path);
        fs::create_dir_all(file.parent().unwrap_or(root))?;
        // Removed first, so that the write does not follow a symlink of the release.
        drop(fs::remove_file(&file));
        fs::write(&file, text).with_context(|| format!("cannot write {path}"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
    }
    for unit in ["www.service", "networking.service"] {
        let wants = units.join("multi-user.target.wants");
        fs::create_dir_all(&wants)?;
        link(&format!("/etc/systemd/system/{unit}"), &wants.join(unit))?;
    }
    // The host writes its interfaces file there.
    fs::create_dir_all(root.join("etc/network"))?;
    drop(fs::remove_file(root.join("var/lib/dbus/machine-id")));
    // A user other than root, to run commands as.
    let useradd = ["useradd", "--create-home", "--uid", "1000", "--shell", "/bin/bash", "user"];
    let mut chroot = Command::new("chroot");
    run_command(chroot.arg(root).args(useradd)).map(drop)
}

fn link(target: &str, at: &Path) -> Result<()> {
    if fs::symlink_metadata(at).is_ok() {
        fs::remove_file(at)?;
    }
    symlink(target, at).with_context(|| format!("cannot link {}", at.display()))
}

/// Removes a root and the mounts that an interrupted debootstrap left in it: a plain removal would
/// delete files in the machine's own /sys.
fn clear(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    for at in mounts::below(&mounts::here()?, root) {
        umount2(&at, MntFlags::empty())
            .with_context(|| format!("cannot unmount {}", at.display()))?;
    }
    run("rm", ["-rf".as_ref(), "--one-file-system".as_ref(), "--".as_ref(), root.as_os_str()])
        .map(drop)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Hashes everything that a template is built from.
fn stamp(image: &Image, mirror: &str) -> String {
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    };
    for part in [SUITE, mirror, MASKED, include_str!("template.rs")] {
        add(part);
    }
    image.package_names().for_each(&mut add);
    FILES.iter().for_each(|(_, _, text)| add(text));
    HEXLOWER.encode(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{MINIMAL, TOOLS};

    #[test]
    fn stamp_changes_with_the_packages_and_the_mirror() {
        let other = Image { packages: &["git"], ..MINIMAL };
        let stamps = [
            stamp(&MINIMAL, "http://a.example/debian"),
            stamp(&MINIMAL, "http://b.example/debian"),
            stamp(&TOOLS, "http://a.example/debian"),
            stamp(&other, "http://a.example/debian"),
        ];
        for (at, one) in stamps.iter().enumerate() {
            assert!(stamps[..at].iter().all(|before| before != one), "{at}");
        }
        let renamed = Image { name: "other", ..MINIMAL };
        assert_eq!(stamp(&renamed, "http://a.example/debian"), stamps[0]);
    }
}
