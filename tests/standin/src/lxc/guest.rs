//! Writes files into a guest and mounts its volume.
//!
//! A guest is hostile: it may have put a symbolic link where its hostname belongs. Every path is
//! resolved by the kernel with the guest's root as the root.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, openat, openat2};

use super::config;
use crate::conf::Section;
use crate::conf::net::Net;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};

/// Returns whether the files of a container's volume already have the ids of its user namespace.
pub(crate) fn is_shifted(ctx: &Ctx, conf: &Section) -> bool {
    let owner =
        volume_path(ctx, conf).and_then(|path| fs::metadata(path).ok()).map(|meta| meta.uid());
    owner.is_some_and(|uid| uid >= config::FIRST_ID)
}

/// Mounts a volume where LXC expects it. Without the permission to mount, the volume itself serves.
pub(crate) fn mount_rootfs(ctx: &Ctx, vmid: u32, volume: &Path) -> Result {
    let target = config::rootfs(ctx, vmid);
    fs::create_dir_all(&target).map_err(|e| Failure::io("create", &target, &e))?;
    let none: Option<&str> = None;
    mount(Some(volume), &target, none, MsFlags::MS_BIND, none).map_err(|error| {
        let (from, to) = (volume.display(), target.display());
        Failure::new(format!("command 'mount -o bind {from} {to}' failed: {error}"))
    })
}

/// Unmounts such a volume; a missing mount is fine.
pub(crate) fn unmount_rootfs(ctx: &Ctx, vmid: u32) {
    ignore(umount2(&config::rootfs(ctx, vmid), MntFlags::MNT_DETACH));
}

/// Empties the machine id of a new clone, so that it makes its own.
pub(crate) fn forget_identity(root: &Path) -> Result {
    if root.join("etc/machine-id").symlink_metadata().is_ok() {
        write(root, "etc/machine-id", "")?;
    }
    Ok(())
}

/// Writes name, hosts and resolver of a guest, before each start.
pub(crate) fn configure(root: &Path, vmid: u32, conf: &Section) -> Result {
    if !root.join("etc").is_dir() {
        return Ok(());
    }
    let fallback = format!("CT{vmid}");
    let name = conf.get("hostname").unwrap_or(&fallback);
    write(root, "etc/hostname", &format!("{name}\n"))?;
    let net = conf.get("net0").map(Net::parse).unwrap_or_default();
    let address = net.get("ip").and_then(|ip| ip.split_once('/')).map(|(ip, _)| ip);
    let own = address.unwrap_or("127.0.1.1");
    write(root, "etc/hosts", &format!("127.0.0.1 localhost\n::1 localhost\n{own} {name}\n"))?;
    if let Some(servers) = conf.get("nameserver") {
        let mut text = String::new();
        if let Some(domain) = conf.get("searchdomain") {
            text.push_str(&format!("search {domain}\n"));
        }
        for server in servers.split([' ', ',', ';']).filter(|s| !s.is_empty()) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        write(root, "etc/resolv.conf", &text)?;
    }
    if root.join("etc/network").is_dir() {
        write(root, "etc/network/interfaces", &interfaces(conf))?;
    }
    Ok(())
}

/// Returns the file from which a Debian guest configures its interfaces.
fn interfaces(conf: &Section) -> String {
    let mut text = String::from("auto lo\niface lo inet loopback\n");
    for (_, value) in conf.numbered("net") {
        let net = Net::parse(value);
        let Some(name) = net.get("name") else { continue };
        match net.get("ip") {
            Some("dhcp") => text.push_str(&format!("\nauto {name}\niface {name} inet dhcp\n")),
            Some(address) if address.contains('/') => {
                text.push_str(&format!("\nauto {name}\niface {name} inet static\n"));
                text.push_str(&format!("\taddress {address}\n"));
                if let Some(gateway) = net.get("gw") {
                    text.push_str(&format!("\tgateway {gateway}\n"));
                }
            }
            Some(_) | None => text.push_str(&format!("\nauto {name}\niface {name} inet manual\n")),
        }
    }
    text
}

/// Returns whether a guest sets its addresses itself, which fails if they are set already.
pub(crate) fn has_ifupdown(ctx: &Ctx, conf: &Section) -> bool {
    let root = volume_path(ctx, conf);
    root.is_some_and(|root| ["sbin/ifup", "usr/sbin/ifup"].iter().any(|p| root.join(p).exists()))
}

fn volume_path(ctx: &Ctx, conf: &Section) -> Option<PathBuf> {
    let volume = Volume::parse(&MountPoint::parse(conf.get("rootfs")?).source).ok()?;
    pool::existing(ctx, &volume).ok()
}

/// Replaces a file below a guest's root; a symbolic link as last part is not followed.
fn write(root: &Path, path: &str, text: &str) -> Result {
    let fail = |error: std::io::Error| Failure::io("write", &root.join(path), &error);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW;
    let write = || -> rustix::io::Result<File> {
        let dir =
            openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mode = Mode::from_raw_mode(0o644);
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&dir, path, flags | OFlags::CLOEXEC, mode, resolve).map(File::from)
    };
    let mut file = match write() {
        // A link in place of the file was put there by the guest, and it stays.
        Err(rustix::io::Errno::LOOP) => return Ok(()),
        other => other.map_err(|e| fail(e.into()))?,
    };
    file.write_all(text.as_bytes()).map_err(fail)?;
    if let Ok(meta) = fs::metadata(root) {
        let owner = (Uid::from_raw(meta.uid()), Gid::from_raw(meta.gid()));
        ignore(fchown(&file, Some(owner.0), Some(owner.1)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::Conf;

    #[test]
    fn guest_interfaces_follow_the_configuration() {
        let conf = Conf::parse(
            "net0: name=eth0,bridge=vmbr0,gw=10.100.1.1,ip=10.100.1.9/24\nnet1: name=eth1,ip=dhcp\n",
        );
        let text = interfaces(&conf.main);
        assert!(
            text.contains(
                "iface eth0 inet static\n\taddress 10.100.1.9/24\n\tgateway 10.100.1.1\n"
            )
        );
        assert!(text.ends_with("auto eth1\niface eth1 inet dhcp\n"));
    }

    #[test]
    fn a_link_in_a_guest_is_not_followed_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "untouched").unwrap();
        std::os::unix::fs::symlink(&outside, root.join("etc/hostname")).unwrap();
        std::os::unix::fs::symlink("/../outside", root.join("etc/hosts")).unwrap();
        configure(&root, 101, &Conf::parse("hostname: a\n").main).unwrap();
        assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
    }
}
