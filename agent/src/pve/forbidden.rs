//! Lines of a container's config with which root inside could harm the node or other sandboxes.
//! Pure. A template that has one is not cloned, and a container that has one is not adopted.
//!
//! PVE copies a template's lines to its clones, and runs some of them as root of the node:
//! `hookscript` and `lxc.hook.*` are programs, a bind mount and a device are the node's own. Lines that
//! wait in `[pve:pending]` hold from the next boot on, so they are read like the others.

use std::{borrow::Cow, fmt, path::PathBuf};

use super::ContainerConfig;

/// Features that a sandbox may have. `fuse` is none of them: a frozen FUSE server stops whoever reads
/// its files. `mknod`, `mount` and `force_rw_sys` give away parts of the node's kernel.
const FEATURES: [&str; 2] = ["nesting", "keyctl"];
/// Raw keys that PVE itself writes for containers made of OCI images (PVE 9.1). They name the first
/// program inside, its directory, user, environment and halt signal.
const OCI: [&str; 2] = ["lxc.signal.halt", "lxc.environment.runtime"];
const OCI_INIT: &str = "lxc.init.";

/// Exceptions that an operator makes for one template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// True when the template may be privileged.
    pub privileged: bool,
    /// True when every other line is allowed.
    pub unsafe_lines: bool,
    /// Directories of the node that may be mounted, read-only and with an id map.
    pub caches: Vec<PathBuf>,
}

/// A line that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forbidden {
    /// Line as it stands in the config, shortened.
    pub line: String,
    /// Reason, and what to do instead.
    pub why: &'static str,
}

/// Longest part of a line that is shown, characters.
const SHOWN: usize = 120;

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.line, self.why)
    }
}

/// Lists the lines of a config that are not allowed, in the order of the file.
pub fn lines(config: &ContainerConfig, allowed: &Allowed) -> Vec<Forbidden> {
    let mut found = Vec::new();
    if !allowed.privileged && !config.stays_unprivileged() {
        found.push(Forbidden {
            line: "unprivileged: 0".to_owned(),
            why: "makes it privileged: root in it is close to root on the node. To convert it, back \
                  it up with `vzdump` and restore it with `pct restore NEW_ID ARCHIVE --unprivileged 1`",
        });
    }
    if allowed.unsafe_lines {
        return found;
    }
    let all = config.lines().filter_map(|line| {
        let why = why_forbidden(&line, allowed)?;
        Some(Forbidden { line: line.chars().take(SHOWN).collect(), why })
    });
    found.extend(all);
    found
}

/// Joins what [`lines`] found into one text.
pub fn text(found: &[Forbidden]) -> String {
    found.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn why_forbidden(line: &str, allowed: &Allowed) -> Option<&'static str> {
    // PVE reads raw lines with `=` as well as with `:`, all others with `:` only.
    if line.starts_with("lxc.") {
        let key = line.split([':', '=']).next().unwrap_or(line).trim();
        let of_an_image = OCI.contains(&key) || key.starts_with(OCI_INIT);
        let why =
            "is passed to LXC as it is, which can run programs as root on the node: remove it";
        return (!of_an_image).then_some(why);
    }
    let (key, value) = line.split_once(':')?;
    match key.trim() {
        "hookscript" => Some("runs a program as root on the node: remove it"),
        "features" => {
            let mut names = value.split([',', ';']).map(|part| match part.split_once('=') {
                Some((_, "0")) => "",
                Some((name, _)) => name.trim(),
                None => part.trim(),
            });
            let has_other = names.any(|name| !name.is_empty() && !FEATURES.contains(&name));
            has_other.then_some("has a feature other than nesting and keyctl: remove it")
        }
        key if is_numbered(key, "dev") => Some("gives it a device of the node: remove it"),
        key if key == "rootfs" || is_numbered(key, "mp") => {
            let path = bind(value)?;
            let why = "mounts a directory or device of the node: remove it, or name a directory in \
                       read_only_caches of its [[template]] and mount it with ro=1 and idmap=";
            let is_cache = key != "rootfs"
                && has(value, "ro", |value| value == "1")
                && has(value, "idmap", |value| !value.is_empty())
                && allowed.caches.iter().any(|cache| cache.as_os_str() == path);
            (!is_cache).then_some(why)
        }
        _ => None,
    }
}

/// True for `dev0`, `mp12`, ...
fn is_numbered(key: &str, word: &str) -> bool {
    let number = key.strip_prefix(word);
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Path of the node that a mount point names instead of a volume of a storage.
fn bind(value: &str) -> Option<&str> {
    let parts = value.split(',').map(str::trim);
    let volumes = parts.filter_map(|part| match part.split_once('=') {
        Some(("volume", volume)) => Some(volume),
        Some(_) => None,
        None => Some(part),
    });
    volumes.into_iter().find(|volume| volume.starts_with('/'))
}

fn has(value: &str, name: &str, fits: impl Fn(&str) -> bool) -> bool {
    let mut pairs = value.split(',').filter_map(|part| part.trim().split_once('='));
    pairs.any(|(key, value)| key == name && fits(value))
}

impl ContainerConfig {
    /// Lines that hold now or from the next boot on, without the description, trimmed. Bytes that are no
    /// UTF-8 are replaced, so that no line is left out.
    fn lines(&self) -> impl Iterator<Item = Cow<'_, str>> {
        self.lines_with_pending().filter(|line| !line.starts_with(b"#")).map(|line| {
            match String::from_utf8_lossy(line) {
                Cow::Borrowed(text) => Cow::Borrowed(text.trim()),
                Cow::Owned(text) => Cow::Owned(text.trim().to_owned()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &[u8], allowed: &Allowed) -> Vec<String> {
        let text =
            [b"#mp0: /etc\nunprivileged: 1\n".as_slice(), text, b"\n[old]\nmp0: /etc,mp=/e\n"];
        let config = ContainerConfig::parse(&text.concat());
        lines(&config, allowed).into_iter().map(|forbidden| forbidden.line).collect()
    }

    #[test]
    fn lines_that_reach_the_node_are_forbidden() {
        for line in [
            "hookscript: local:snippets/x.pl",
            "features: nesting=1,mount=nfs;cifs",
            "features: fuse=1",
            "features: mknod=1,keyctl=1",
            "features: force_rw_sys=1",
            "dev0: /dev/kvm,mode=0666",
            "dev12: /dev/net/tun",
            "mp0: /srv/data,mp=/data",
            "mp3: mp=/data,volume=/srv/data",
            "mp3: mp=/data,/srv/data",
            "mp0: /dev/sda1,mp=/data,ro=1",
            "rootfs: /srv/root",
            "lxc.hook.pre-start: /bin/sh",
            "lxc.hook.pre-start = /bin/sh",
            "lxc.mount.entry=/ host none bind",
            "lxc.apparmor.profile: unconfined",
            "lxc.idmap: u 0 0 65536",
            "lxc.cgroup2.devices.allow: a",
            "lxc.cap.drop:",
            "lxc.include: /etc/x",
            "lxc.environment: A=1",
            "lxc.initial: no key that PVE writes",
            "  lxc.hook.start: /bin/sh",
        ] {
            assert_eq!(found(line.as_bytes(), &Allowed::default()), [line.trim()], "{line}");
            let all = Allowed { unsafe_lines: true, ..Allowed::default() };
            assert_eq!(found(line.as_bytes(), &all), [""; 0], "{line}");
            let waiting = format!("memory: 512\n\n[pve:pending]\ndelete: swap\n{line}");
            let seen = found(waiting.as_bytes(), &Allowed::default());
            assert_eq!(seen, [line.trim()], "{line}, from the next boot on");
        }
    }

    #[test]
    fn usual_lines_are_allowed() {
        for line in [
            "features: nesting=1",
            "features: keyctl=1,nesting=1",
            "features: fuse=0,nesting=1",
            "mp0: btr:310/vm-310-disk-1.raw,mp=/data,size=1G",
            "rootfs: local-zfs:subvol-310-disk-0,size=2G",
            "lxc.init.cmd: /bin/nginx",
            "lxc.init.cwd: /srv",
            "lxc.signal.halt: SIGQUIT",
            "lxc.environment.runtime: A=/dev/kvm",
            "devices: none",
            "mpx: /etc",
            "net0: name=eth0,bridge=vmbr0",
            "tags: lxc.hook",
        ] {
            assert_eq!(found(line.as_bytes(), &Allowed::default()), [""; 0], "{line}");
        }
    }

    #[test]
    fn line_that_is_no_text_is_not_overlooked() {
        let bytes = b"lxc.mount.entry: /srv/\xff x none bind";
        assert_eq!(found(bytes, &Allowed::default()).len(), 1);
    }

    #[test]
    fn named_cache_is_allowed_read_only_and_with_an_id_map() {
        let allowed = Allowed { caches: vec!["/srv/cache".into()], ..Allowed::default() };
        let line = |line: &str| found(line.as_bytes(), &allowed).is_empty();
        assert!(line("mp0: /srv/cache,mp=/cache,ro=1,idmap=u:0:100000:1"));
        for bad in [
            "mp0: /srv/cache,mp=/cache,idmap=u:0:100000:1",
            "mp0: /srv/cache,mp=/cache,ro=0,idmap=u:0:100000:1",
            "mp0: /srv/cache,mp=/cache,ro=1",
            "mp0: /srv/cache/..,mp=/cache,ro=1,idmap=x",
            "mp0: /srv/cache/more,mp=/cache,ro=1,idmap=x",
            "mp0: /srv/other,mp=/cache,ro=1,idmap=x",
            "rootfs: /srv/cache,ro=1,idmap=x",
        ] {
            assert!(!line(bad), "{bad}");
        }
    }

    #[test]
    fn privileged_container_is_forbidden_with_the_way_to_convert_it() {
        let pending = b"unprivileged: 1\n[pve:pending]\ndelete: unprivileged\n";
        let config = ContainerConfig::parse(pending);
        assert_eq!(lines(&config, &Allowed::default()).len(), 1, "from the next boot on");
        let config = ContainerConfig::parse(b"hostname: x\nhookscript: a:b\n");
        let all = lines(&config, &Allowed::default());
        assert_eq!(all.len(), 2, "{all:?}");
        let text = text(&all);
        assert!(text.contains("pct restore") && text.contains("hookscript: a:b"), "{text}");
        let allowed = Allowed { privileged: true, ..Allowed::default() };
        assert_eq!(lines(&config, &allowed).len(), 1);
        let allowed = Allowed { unsafe_lines: true, ..Allowed::default() };
        assert_eq!(lines(&config, &allowed).len(), 1, "privileged is another exception");
    }
}
