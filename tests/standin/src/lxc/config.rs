//! `/var/lib/lxc/ID/config`, written from `ID.conf` by `pct start` and `pct set`.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use super::cgroup;
use crate::conf::Section;
use crate::conf::net::Net;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::storage::volume::MountPoint;

/// First host id of an unprivileged container.
pub(crate) const FIRST_ID: u32 = 100_000;

/// Filter of system calls, as the real `pct` writes it.
const SECCOMP: &str = "2\ndenylist\nreject_force_umount\n[all]\nkexec_load errno 1\n\
    open_by_handle_at errno 1\ninit_module errno 1\nfinit_module errno 1\ndelete_module errno 1\n\
    ioctl errno 1 [1,0x9400,SCMP_CMP_MASKED_EQ,0xff00]\nkeyctl errno 38\n";

/// Devices of every container: null, zero, full, random, urandom, tty, console, ptmx, pts.
const DEVICES: [&str; 11] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:1 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
];

/// Returns a container's directory.
pub(crate) fn dir(ctx: &Ctx, vmid: u32) -> PathBuf {
    ctx.roots.lxc_dir.join(vmid.to_string())
}

/// Returns the mount point of a container's volume.
pub(crate) fn rootfs(ctx: &Ctx, vmid: u32) -> PathBuf {
    dir(ctx, vmid).join("rootfs")
}

/// Writes a container's directory: configuration, filter, mount point.
pub(crate) fn write(ctx: &Ctx, vmid: u32, conf: &Section) -> Result {
    let dir = dir(ctx, vmid);
    for sub in ["passthrough", "rootfs"] {
        let path = dir.join(sub);
        fs::create_dir_all(&path).map_err(|e| Failure::io("create", &path, &e))?;
    }
    let text = render(ctx, vmid, conf)?;
    for (name, text) in [("rules.seccomp", SECCOMP), ("config", text.as_str())] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(|e| Failure::io("write", &path, &e))?;
    }
    Ok(())
}

fn render(ctx: &Ctx, vmid: u32, conf: &Section) -> Result<String> {
    let mut out = String::new();
    let mut line = |key: &str, value: &str| ignore(writeln!(out, "lxc.{key} = {value}"));
    line("cgroup.relative", "0");
    line("cgroup.dir.monitor", &format!("lxc.monitor/{vmid}"));
    line("cgroup.dir.container", &format!("lxc/{vmid}"));
    line("cgroup.dir.container.inner", "ns");
    line("arch", conf.get("arch").unwrap_or("amd64"));
    line("include", "/usr/share/lxc/config/common.conf");
    let unprivileged = conf.flag("unprivileged");
    if unprivileged {
        line("include", "/usr/share/lxc/config/userns.conf");
    }
    let dir = dir(ctx, vmid);
    line("seccomp.profile", &dir.join("rules.seccomp").to_string_lossy());
    line("mount.auto", "sys:mixed");
    line("monitor.unshare", "1");
    if unprivileged {
        line("idmap", &format!("u 0 {FIRST_ID} 65536"));
        line("idmap", &format!("g 0 {FIRST_ID} 65536"));
    }
    line("tty.max", "2");
    line("environment", "TERM=linux");
    line("uts.name", conf.get("hostname").unwrap_or(&format!("CT{vmid}")));
    if let Some(command) = conf.get("entrypoint") {
        line("init.cmd", command);
    }
    line("rootfs.path", &dir.join("rootfs").to_string_lossy());
    if unprivileged && !super::guest::is_shifted(ctx, conf) {
        // The volume holds unshifted ids: the kernel maps them in the mount.
        line("rootfs.options", "idmap=container");
    }
    for (name, value) in conf.numbered("mp") {
        let point = MountPoint::parse(value);
        let target = point.get("mp").unwrap_or(name).trim_start_matches('/');
        let mode = if point.get("ro") == Some("1") { ",ro" } else { "" };
        let entry = format!("{} {target} none bind{mode},create=dir 0 0", point.source);
        line("mount.entry", &entry);
    }
    for (key, value) in cgroup::lxc_lines(ctx, vmid, conf) {
        line(key.trim_start_matches("lxc."), &value);
    }
    hooks(&mut line);
    let set_addresses = !super::guest::has_ifupdown(ctx, conf);
    for (name, value) in conf.numbered("net") {
        net(&mut line, vmid, name, &Net::parse(value), set_addresses);
    }
    if conf.lxc.iter().any(|(key, _)| key.starts_with("lxc.cgroup2.devices.")) {
        // Debian's list for user namespaces is empty; with one rule in it, all other devices are
        // denied.
        line("cgroup2.devices.deny", "a");
        for device in DEVICES {
            line("cgroup2.devices.allow", device);
        }
    }
    for (key, value) in conf.lxc.iter().filter(|(key, _)| !key.starts_with("lxc.environment.")) {
        line(key.trim_start_matches("lxc."), value);
    }
    Ok(out)
}

fn hooks(line: &mut impl FnMut(&str, &str)) {
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/sbin/pct"));
    for hook in ["pre-start", "start-host", "post-stop"] {
        let command = format!("{} {} {hook}", program.display(), super::hooks::COMMAND);
        line(&format!("hook.{hook}"), &command);
    }
}

/// Adds an interface. The address is set from outside: a guest without a network service has it,
/// too.
fn net(line: &mut impl FnMut(&str, &str), vmid: u32, name: &str, net: &Net, set_addresses: bool) {
    let index = name.trim_start_matches("net");
    let mut line = |key: &str, value: &str| line(&format!("net.{index}.{key}"), value);
    line("type", "veth");
    line("veth.pair", &format!("veth{vmid}i{index}"));
    let pairs = [("hwaddr", "hwaddr"), ("name", "name"), ("bridge", "link"), ("mtu", "mtu")];
    for (key, lxc) in pairs {
        if let Some(value) = net.get(key) {
            line(lxc, value);
        }
    }
    if net.get("link_down") != Some("1") {
        line("flags", "up");
    }
    let fixed = |key: &str| net.get(key).filter(|v| set_addresses && v.contains('/'));
    for (key, gateway, lxc) in [("ip", "gw", "ipv4"), ("ip6", "gw6", "ipv6")] {
        if let Some(address) = fixed(key) {
            line(&format!("{lxc}.address"), address);
            if let Some(gateway) = net.get(gateway) {
                line(&format!("{lxc}.gateway"), gateway);
            }
        }
    }
}
