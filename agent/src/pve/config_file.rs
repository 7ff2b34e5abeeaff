//! The grammar of a container's config, `ID.conf`. Pure: text in, text out.
//!
//! A config has a main part, then sections (`[pve:pending]`, one per snapshot). In the main part
//! `#` lines are the description, each %-encoded, and the rest is `key: value`. Only the main part
//! is read or changed, and every other line stays the same, byte for byte: it may be someone else's
//! setting, or one of a later PVE.

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

    /// Settings of the main part, in the order of the file.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        let lines = self.lines[..self.main].iter().filter(|line| !line.starts_with(b"#"));
        let pairs = lines.filter_map(|line| std::str::from_utf8(line).ok()?.split_once(':'));
        pairs.map(|(key, value)| (key.trim(), value.trim()))
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
        let is_interface = |key: &str| {
            let number = key.strip_prefix("net");
            number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        };
        let settings = self.lines[..self.main]
            .iter()
            .filter_map(|line| std::str::from_utf8(line).ok()?.split_once(':'));
        settings.filter(move |(key, _)| is_interface(key)).filter_map(|(_, value)| {
            let ip = value.trim().split(',').find_map(|pair| pair.strip_prefix("ip="))?;
            ip.split_once('/')?.0.parse().ok()
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RECORDED: &str = "\
## Sandbox
#
#{\"id\"%3A\"morphvm_ab12\",\"ports\"%3A[{\"name\"%3A\"vs code\",\"p\"%3A39378}],\"exp\"%3A1732000000}
#%09tab & <b>%C3%A4%C3%B6%C3%BC %F0%9F%99%82</b> 100%25
arch: amd64
features: nesting=1
hostname: c601
lock: create
memory: 600
net0: name=eth0,bridge=vmbr0,gw=10.99.0.11,hwaddr=BC:24:11:EB:A5:13,ip=10.99.2.1/16,type=veth
rootfs: btr:601/vm-601-disk-0.raw,size=2G
tags: a;b;c
template: 1
unprivileged: 1
lxc.mount.entry: /dev/net dev/net none bind,create=dir

[pve:pending]
hostname: later

[s1]
#first snap
lock: backup
rootfs: btr:601/vm-601-disk-0.raw@s1,size=2G
";

    #[test]
    fn the_size_of_a_disk_is_rounded_down() {
        let of = |size: &str| {
            let config = format!("rootfs: local:subvol-1-disk-0{size}\n");
            ContainerConfig::parse(config.as_bytes()).rootfs_gib()
        };
        for (size, gib) in [
            (",size=8G", 8),
            (",acl=1,size=2560M", 2),
            (",size=4.5G", 4),
            (",size=1T", 1024),
            (",size=4294967296", 4),
            (",size=3X", 0),
            (",size=99999999999T", 0),
            ("", 0),
        ] {
            assert_eq!(of(size), gib, "{size}");
        }
    }

    #[test]
    fn reads_what_pve_wrote() {
        let config = ContainerConfig::parse(RECORDED.as_bytes());
        assert_eq!(config.hostname(), Some("c601"));
        assert_eq!(config.lock(), Some("create"));
        assert_eq!(config.rootfs(), Some("btr:601/vm-601-disk-0.raw"));
        assert_eq!(config.storage(), Some("btr"));
        assert_eq!(config.tags().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!(config.is_template() && config.is_unprivileged() && !config.is_protected());
        assert_eq!((config.memory_mib(), config.cores()), (600, None));
        assert_eq!(config.get("swap"), None);
        assert_eq!(
            config.net0(),
            Some(Interface {
                bridge: "vmbr0".to_owned(),
                mac: "BC:24:11:EB:A5:13".to_owned(),
                ip: Ip::Static(Ipv4Addr::new(10, 99, 2, 1), 16),
                gateway: Some(Ipv4Addr::new(10, 99, 0, 11)),
            })
        );
        let description = "# Sandbox\n\n{\"id\":\"morphvm_ab12\",\"ports\":[{\"name\":\"vs code\",\
            \"p\":39378}],\"exp\":1732000000}\n\ttab & <b>äöü 🙂</b> 100%";
        assert_eq!(config.description().as_deref(), Some(description));
        let mut copy = config.clone();
        copy.set_description(description).expect("fits");
        assert_eq!(copy, config, "encoded as PVE does");
        assert!(config.mentions("btr:601/vm-601-disk-0.raw"));
        assert!(config.mentions("vm-601-disk-0") && !config.mentions("vm-601-disk-"));
    }

    #[test]
    fn a_root_that_is_mounted_read_only_does_not_grow_while_it_runs() {
        let grows = |line: &str| ContainerConfig::parse(line.as_bytes()).grows_running();
        for line in [
            "rootfs: local-zfs:subvol-1-disk-0,size=2G\n",
            "rootfs: local-lvm:vm-1-disk-0,mountoptions=noatime,ro=0,size=2G\n",
            "rootfs: ceph:vm-1-disk-0,size=2G\nmp0: ceph:vm-1-disk-1,mp=/x,ro=1\n",
        ] {
            assert!(grows(line), "{line}");
        }
        assert!(!grows("rootfs: btr:1/vm-1-disk-0.raw,ro=1,size=2G\n"));
    }

    #[test]
    fn names_its_own_volumes_and_no_others() {
        let config = ContainerConfig::parse(
            b"mp0: tank:601/vm-601-disk-1.raw,mp=/data\nmp1: /srv,mp=/srv\nmp2: tank:subvol-7-disk-0,mp=/x\n\
              rootfs: local-zfs:basevol-9000-disk-0/subvol-601-disk-0,size=2G\nunused0: tank:vm-601-disk-3\n\
              [s1]\nmp9: tank:vm-601-disk-9\n",
        );
        let vmid = "601".parse().expect("valid");
        assert_eq!(
            config.own_volumes(vmid),
            ["tank:vm-601-disk-1.raw", "local-zfs:subvol-601-disk-0", "tank:vm-601-disk-3"]
        );
        assert_eq!(config.storages(), ["local-zfs", "tank"]);
        assert_eq!(
            config.own_volumes("9000".parse().expect("valid")),
            [""; 0],
            "a base is no part"
        );
    }

    #[test]
    fn changes_one_line_only() {
        let mut config = ContainerConfig::parse(RECORDED.as_bytes());
        config.remove("lock");
        config.set("swap", "0").expect("fits");
        config.set("hostname", "new").expect("fits");
        let expected = RECORDED
            .replacen("lock: create\n", "", 1)
            .replacen("hostname: c601", "hostname: new", 1)
            .replacen("tags: ", "swap: 0\ntags: ", 1);
        assert_eq!(String::from_utf8(config.to_bytes()).expect("text"), expected);
    }

    #[test]
    fn a_file_without_a_last_line_end_is_extended() {
        let mut config = ContainerConfig::parse(b"arch: amd64");
        config.set("memory", "64").expect("fits");
        assert_eq!(config.to_bytes(), b"arch: amd64\nmemory: 64\n");
    }

    proptest! {
        #[test]
        fn any_file_comes_back_as_it_was(bytes: Vec<u8>) {
            let config = ContainerConfig::parse(&bytes);
            prop_assert_eq!(config.to_bytes(), bytes);
            let _ = (config.mark(), config.net0(), config.tags().count(), config.rootfs());
        }

        #[test]
        fn no_value_adds_a_line(text: String, key in "[a-z]{1,5}") {
            let mut config = ContainerConfig::parse(RECORDED.as_bytes());
            let foreign = |c: &ContainerConfig| {
                let mine = |line: &&Vec<u8>| !line.starts_with(format!("{key}:").as_bytes());
                c.lines.iter().filter(mine).cloned().collect::<Vec<_>>()
            };
            let before = foreign(&config);
            if config.set(&key, &text).is_ok() {
                let read = ContainerConfig::parse(&config.to_bytes());
                prop_assert_eq!(read.get(&key), Some(text.trim()));
                prop_assert_eq!(&read, &config);
            }
            prop_assert_eq!(foreign(&config), before);
        }

        #[test]
        fn no_description_adds_a_setting(text: String, more in "(\\PC|[\n\r%:#\\[]){0,40}") {
            for text in [text, more] {
                let mut config = ContainerConfig::parse(RECORDED.as_bytes());
                let settings = |c: &ContainerConfig| {
                    let no_comment = |line: &&Vec<u8>| !line.starts_with(b"#");
                    c.lines[..c.main].iter().filter(no_comment).cloned().collect::<Vec<_>>()
                };
                let before = settings(&config);
                config.set_description(&text).expect("short");
                let read = ContainerConfig::parse(&config.to_bytes());
                prop_assert_eq!(&read, &config);
                prop_assert_eq!(settings(&read), before);
                let expected = text.split('\n').map(|l| l.trim_end_matches(' ')).collect::<Vec<_>>().join("\n");
                prop_assert_eq!(read.description().unwrap_or_default(), expected);
            }
        }
    }
}
