//! The grammar of a container's config, `ID.conf`. Pure: text in, text out.
//!
//! A config has a main part, then sections (`[pve:pending]`, one per snapshot). In the main part
//! `#` lines are the description, each %-encoded, and the rest is `key: value`. Only the main part
//! is changed, and every other line stays the same, byte for byte: it may be someone else's
//! setting, or one of a later PVE. Of the sections only the changes that wait for a boot are read, by
//! what must hold then, too.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr};

use proto::id::Vmid;

use super::{Mark, volume};

/// Longest description that PVE accepts, characters.
pub(super) const DESCRIPTION_CHARS_MAX: usize = 8192;

/// Error: the text is not one valid setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {why}")]
pub struct Unfit {
    /// Name of the setting.
    pub key: String,
    /// Rule that the text breaks.
    pub why: &'static str,
}

/// One container's config.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ContainerConfig {
    /// Lines with their line ends.
    lines: Vec<Vec<u8>>,
    /// Number of lines of the main part.
    main: usize,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name of the bridge.
    pub bridge: String,
    /// MAC address as written in the config.
    pub mac: String,
    /// IPv4 address.
    pub ip: Ip,
    /// IPv4 gateway.
    pub gateway: Option<Ipv4Addr>,
}

/// Source of an interface's IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ip {
    /// Fixed address with the prefix length.
    Static(Ipv4Addr, u8),
    /// Address by DHCP.
    Dhcp,
    /// Address not set by PVE.
    Manual,
}

impl ContainerConfig {
    /// Parses a file. Accepts and keeps any content.
    pub fn parse(bytes: &[u8]) -> Self {
        let lines: Vec<Vec<u8>> =
            bytes.split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
        let main = lines.iter().position(|line| line.starts_with(b"[")).unwrap_or(lines.len());
        Self { lines, main }
    }

    /// Content of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.lines.concat()
    }

    /// Value of a setting. If PVE finds a setting twice, the later one counts.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines[..self.main].iter().rev().find_map(|line| value(line, key))
    }

    /// Lines of the main part with their line ends, the description's too, and those that are to hold
    /// from the next boot on.
    pub(super) fn lines_with_pending(&self) -> impl Iterator<Item = &[u8]> {
        self.lines[..self.main].iter().map(Vec::as_slice).chain(self.pending_lines())
    }

    /// Lines that PVE applies when the container boots next: those of `[pve:pending]`. A section that
    /// this version does not know counts, too; only snapshots, which no boot applies, do not.
    fn pending_lines(&self) -> impl Iterator<Item = &[u8]> {
        let mut is_snapshot = false;
        self.lines[self.main..].iter().map(Vec::as_slice).filter(move |line| {
            let is_header = line.starts_with(b"[");
            if is_header {
                is_snapshot = begins_snapshot(line);
            }
            !is_header && !is_snapshot
        })
    }

    /// Settings of the main part, in the order of the file.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(self.lines[..self.main].iter().map(Vec::as_slice))
    }

    /// Settings of the main part, and those that are to hold from the next boot on.
    pub fn settings_with_pending(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(self.lines_with_pending())
    }

    /// Sets a setting of the main part.
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), Unfit> {
        let unfit = |why| Unfit { key: key.to_owned(), why };
        if !is_key(key) {
            return Err(unfit("is no name of a setting"));
        }
        if text.trim().is_empty() || text.chars().any(char::is_control) {
            return Err(unfit("must be one line that is not empty"));
        }
        self.remove(key);
        // PVE writes the settings sorted, but reads them in any order.
        let after = |line: &Vec<u8>| !line.starts_with(b"#") && line.as_slice() > key.as_bytes();
        let at = self.lines[..self.main].iter().position(after).unwrap_or_else(|| self.end());
        self.insert(at, format!("{key}: {}\n", text.trim()).into_bytes());
        Ok(())
    }

    /// Replaces the value of an existing setting in its line. Does nothing if the setting is absent
    /// or the value is not one line.
    pub fn replace(&mut self, key: &str, text: &str) {
        if text.chars().any(char::is_control) {
            return;
        }
        let main = self.lines[..self.main].iter_mut().rev();
        let Some(line) = main.into_iter().find(|line| value(line, key).is_some()) else { return };
        let Some(known) = value(line, key).map(str::to_owned) else { return };
        // Keeps the text around the value: blanks and the line end.
        let whole = String::from_utf8_lossy(line).into_owned();
        let head = key.len() + 1;
        if let Some(at) = whole[head..].find(&known) {
            let (before, after) = (&whole[..head + at], &whole[head + at + known.len()..]);
            *line = format!("{before}{text}{after}").into_bytes();
        }
    }

    /// Removes a setting of the main part.
    pub fn remove(&mut self, key: &str) {
        self.remove_main(|line| value(line, key).is_some());
    }

    /// Description, decoded, without its last line end; `None` when there is none.
    pub fn description(&self) -> Option<String> {
        let lines = self.lines[..self.main].iter().filter_map(|line| line.strip_prefix(b"#"));
        let lines: Vec<String> = lines.map(|line| decode(trim_end(line))).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }

    /// Replaces the description. An empty text removes it.
    pub fn set_description(&mut self, text: &str) -> Result<(), Unfit> {
        if text.chars().count() > DESCRIPTION_CHARS_MAX {
            let why = "must be at most 8192 characters long";
            return Err(Unfit { key: "description".to_owned(), why });
        }
        self.remove_main(|line| line.starts_with(b"#"));
        if text.is_empty() {
            return Ok(());
        }
        for (at, line) in text.split('\n').enumerate() {
            self.insert(at, format!("#{}\n", encode(line)).into_bytes());
        }
        Ok(())
    }

    /// True when the description has this line.
    pub fn has_note(&self, line: &str) -> bool {
        self.lines[..self.main].iter().any(|known| is_note(known, line))
    }

    /// Adds a line to the description. The others stay the same, byte for byte.
    pub fn add_note(&mut self, line: &str) {
        if !self.has_note(line) {
            let last = self.lines[..self.main].iter().rposition(|known| known.starts_with(b"#"));
            self.insert(
                last.map_or(0, |last| last + 1),
                format!("#{}\n", encode(line)).into_bytes(),
            );
        }
    }

    /// Removes a line from the description.
    pub fn remove_note(&mut self, line: &str) {
        self.remove_main(|known| is_note(known, line));
    }

    /// Mark in the description. The caller must check the owner: a vmid in the mark that is not the
    /// container's own means that somebody cloned ours.
    pub fn mark(&self) -> Option<Mark> {
        Mark::find(&self.description()?)
    }

    /// True when the description has the mark of a sandbox, of whatever version.
    pub fn has_mark(&self) -> bool {
        self.description().is_some_and(|text| text.lines().any(Mark::resembles))
    }

    /// Host name, which PVE shows as the container's name.
    pub fn hostname(&self) -> Option<&str> {
        self.get("hostname")
    }

    /// Reason of PVE's lock on the container: `create`, `disk`, `backup`, ...
    pub fn lock(&self) -> Option<&str> {
        self.get("lock")
    }

    /// True for a template, which can be cloned but not started.
    pub fn is_template(&self) -> bool {
        self.get("template") == Some("1")
    }

    /// True when PVE refuses to remove it.
    pub fn is_protected(&self) -> bool {
        self.get("protection") == Some("1")
    }

    /// True when root in the container is an unprivileged user of the host.
    pub fn is_unprivileged(&self) -> bool {
        self.get("unprivileged") == Some("1")
    }

    /// True when it is unprivileged, and no change that waits for the next boot makes it privileged.
    pub fn stays_unprivileged(&self) -> bool {
        let ends = |(key, value): (&str, &str)| match key {
            "unprivileged" => value != "1",
            // Names of settings, each with a `!` where the change is to be forced.
            "delete" => value
                .split([',', ';', ' '])
                .any(|name| name.trim_start_matches('!') == "unprivileged"),
            _ => false,
        };
        self.is_unprivileged() && !pairs(self.pending_lines()).any(ends)
    }

    /// Tags of the container.
    pub fn tags(&self) -> impl Iterator<Item = &str> {
        self.get("tags").unwrap_or("").split([';', ',', ' ']).filter(|tag| !tag.is_empty())
    }

    /// Root volume, such as `local-zfs:subvol-100-disk-0`; `None` while it is being cloned.
    pub fn rootfs(&self) -> Option<&str> {
        self.get("rootfs").map(first)
    }

    /// Size of the root volume, GiB, rounded down; 0 when the config does not say.
    pub fn rootfs_gib(&self) -> u32 {
        let options = self.get("rootfs").unwrap_or("").split(',');
        options.filter_map(|option| option.strip_prefix("size=")).find_map(gib).unwrap_or(0)
    }

    /// True when the root volume can grow while the container runs. PVE tells the kernel, which
    /// grows a file system that is mounted for writing, and sets a quota in any case.
    pub fn grows_running(&self) -> bool {
        !self.get("rootfs").unwrap_or("").split(',').any(|option| option == "ro=1")
    }

    /// Volumes and paths of the root and the mount points.
    pub fn mounts(&self) -> impl Iterator<Item = &str> {
        let is_mount = |key: &str| {
            let number = key.strip_prefix("mp").or_else(|| key.strip_prefix("unused"));
            key == "rootfs"
                || number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        self.settings().filter(move |(key, _)| is_mount(key)).map(|(_, value)| first(value))
    }

    /// Volumes of this vmid that the config names, as `volume::key` writes them.
    pub fn own_volumes(&self, vmid: Vmid) -> Vec<String> {
        let owned = |key: &String| {
            let name = key.split_once(':').map_or("", |(_, name)| name);
            volume::owner(name) == Some(vmid)
        };
        self.mounts().filter_map(volume::key).filter(owned).collect()
    }

    /// Storages of the volumes that the config names, each once.
    pub fn storages(&self) -> Vec<String> {
        let volumes = self.mounts().filter_map(volume::key);
        let storages = volumes.filter_map(|key| Some(key.split_once(':')?.0.to_owned()));
        storages.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Storage of the root volume.
    pub fn storage(&self) -> Option<&str> {
        self.rootfs()?.split_once(':').map(|(storage, _)| storage)
    }

    /// Memory, MiB; PVE's default is 512.
    pub fn memory_mib(&self) -> u32 {
        self.get("memory").and_then(|text| text.parse().ok()).unwrap_or(512)
    }

    /// Cores; `None` when the container may use all of the host.
    pub fn cores(&self) -> Option<u32> {
        self.get("cores")?.parse().ok()
    }

    /// First network interface.
    pub fn net0(&self) -> Option<Interface> {
        let text = self.get("net0")?;
        let field =
            |key| text.split(',').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        let fixed = |text: &str| {
            let (ip, prefix) = text.split_once('/')?;
            Some(Ip::Static(ip.parse().ok()?, prefix.parse().ok()?))
        };
        Some(Interface {
            bridge: field("bridge").unwrap_or("").to_owned(),
            mac: field("hwaddr").unwrap_or("").to_owned(),
            ip: match field("ip") {
                Some("dhcp") => Ip::Dhcp,
                Some(text) => fixed(text).unwrap_or(Ip::Manual),
                None => Ip::Manual,
            },
            gateway: field("gw").and_then(|text| text.parse().ok()),
        })
    }

    /// Static IPv4 addresses of all interfaces.
    pub fn static_addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.static_interfaces().map(|(_, ip)| ip)
    }

    /// Static IPv4 addresses of the interfaces beside `net0`, in their order.
    pub fn further_addresses(&self) -> Vec<Ipv4Addr> {
        let mut further: Vec<_> = self.static_interfaces().filter(|(net, _)| *net != 0).collect();
        further.sort_by_key(|(net, _)| *net);
        further.into_iter().map(|(_, ip)| ip).collect()
    }

    /// Numbers of the interfaces with static IPv4 addresses, and the addresses.
    fn static_interfaces(&self) -> impl Iterator<Item = (u32, Ipv4Addr)> {
        let number = |key: &str| {
            let number = key.strip_prefix("net")?;
            let number = Some(number).filter(|n| n.bytes().all(|b| b.is_ascii_digit()))?;
            number.parse::<u32>().ok()
        };
        let settings = self.lines[..self.main]
            .iter()
            .filter_map(|line| std::str::from_utf8(line).ok()?.split_once(':'));
        settings.filter_map(move |(key, value)| {
            let number = number(key)?;
            let ip = value.trim().split(',').find_map(|pair| pair.strip_prefix("ip="))?;
            Some((number, ip.split_once('/')?.0.parse().ok()?))
        })
    }

    /// True when any line, of any section, names this volume.
    pub fn mentions(&self, volume: &str) -> bool {
        !volume.is_empty()
            && self.lines.iter().any(|line| {
                line.windows(volume.len()).enumerate().any(|(at, window)| {
                    let next = line.get(at + volume.len());
                    window == volume.as_bytes() && !next.is_some_and(u8::is_ascii_alphanumeric)
                })
            })
    }

    /// End of the main part's settings: before the blank lines that separate a section.
    fn end(&self) -> usize {
        let last = self.lines[..self.main].iter().rposition(|line| !trim_end(line).is_empty());
        last.map_or(0, |last| last + 1)
    }

    fn insert(&mut self, at: usize, line: Vec<u8>) {
        // A file may lack a line end; the next line must not join its last line.
        if let Some(before) = at.checked_sub(1).and_then(|before| self.lines.get_mut(before))
            && before.last() != Some(&b'\n')
        {
            before.push(b'\n');
        }
        self.lines.insert(at, line);
        self.main += 1;
    }

    fn remove_main(&mut self, unwanted: impl Fn(&[u8]) -> bool) {
        let rest = self.lines.split_off(self.main);
        self.lines.retain(|line| !unwanted(line));
        self.main = self.lines.len();
        self.lines.extend(rest);
    }
}

impl fmt::Debug for ContainerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.to_bytes()))
    }
}

/// True for the first line of a snapshot. Its name has two letters at least, and no `:`.
fn begins_snapshot(line: &[u8]) -> bool {
    let name = trim_end(line).strip_prefix(b"[").and_then(|line| line.strip_suffix(b"]"));
    name.is_some_and(|name| {
        let rest = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        name.len() > 1 && name[0].is_ascii_alphabetic() && name.iter().all(rest)
    })
}

/// Splits lines into settings, and leaves out the description.
fn pairs<'a>(lines: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = (&'a str, &'a str)> {
    let lines = lines.filter(|line| !line.starts_with(b"#"));
    let pairs = lines.filter_map(|line| std::str::from_utf8(line).ok()?.split_once(':'));
    pairs.map(|(key, value)| (key.trim(), value.trim()))
}

fn value<'a>(line: &'a [u8], key: &str) -> Option<&'a str> {
    let text = line.strip_prefix(key.as_bytes())?.strip_prefix(b":")?;
    Some(std::str::from_utf8(text).ok()?.trim())
}

/// True for the description's line with this text.
fn is_note(line: &[u8], text: &str) -> bool {
    line.strip_prefix(b"#").is_some_and(|line| decode(trim_end(line)) == text)
}

/// Volume of a mount point's value, without the options behind it.
fn first(text: &str) -> &str {
    let first = text.split(',').next().unwrap_or("");
    first.strip_prefix("volume=").unwrap_or(first)
}

/// Parses a size as PVE writes it: a number, and K, M, G or T where it is not in bytes.
fn gib(size: &str) -> Option<u32> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &size[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    // Rounds 4.5G, written by hand, down to 4.
    let whole = digits.split('.').next()?;
    let bytes = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    u32::try_from(bytes >> 30).ok()
}

fn is_key(key: &str) -> bool {
    key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && key.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
}

fn trim_end(line: &[u8]) -> &[u8] {
    line.trim_ascii_end()
}

/// Encodes one line of a description as PVE does: control characters, `%`, `:` and non-ASCII bytes
/// as `%XX`. The result never ends a line.
fn encode(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    for byte in line.bytes() {
        if !(0x20..0x7f).contains(&byte) || byte == b'%' || byte == b':' {
            text.push_str(&format!("%{byte:02X}"));
        } else {
            text.push(char::from(byte));
        }
    }
    text
}

/// Decodes a line; a `%` that starts no code stays.
fn decode(line: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some((&first, behind)) = rest.split_first() {
        let code = behind.get(..2).filter(|_| first == b'%');
        let code = code.filter(|code| code.iter().all(u8::is_ascii_hexdigit));
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
