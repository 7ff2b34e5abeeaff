//! Names of volumes: `STORAGE:[BASE/]NAME`.

use crate::failure::{Failure, Result};

/// Id of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) storage: String,
    /// Base of a linked clone.
    pub(crate) base: Option<String>,
    /// Name, such as `subvol-101-disk-0`.
    pub(crate) name: String,
}

impl Volume {
    /// Parses a volume id, the first part of a `rootfs` line.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = || Failure::new(format!("unable to parse volume ID '{text}'"));
        let (storage, path) = text.split_once(':').ok_or_else(bad)?;
        let parts: Vec<&str> = path.split('/').collect();
        let good = |p: &&str| {
            !p.is_empty()
                && !p.starts_with('.')
                && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@".contains(&b))
        };
        if storage.is_empty() || !parts.iter().all(good) {
            return Err(bad());
        }
        let (base, name) = match parts.as_slice() {
            [name] => (None, (*name).to_owned()),
            [base, name] => (Some((*base).to_owned()), (*name).to_owned()),
            _ => return Err(bad()),
        };
        Ok(Self { storage: storage.to_owned(), base, name })
    }

    /// Returns the container to which the volume belongs by its name.
    pub(crate) fn owner(&self) -> Option<u32> {
        owner_of(&self.name)
    }

    /// Returns whether it is a template's volume.
    pub(crate) fn is_base(&self) -> bool {
        self.name.starts_with("basevol-")
    }
}

/// Returns the number in `subvol-101-disk-0`; `pvesm alloc` creates names like `vm-101-disk-0`.
pub(crate) fn owner_of(name: &str) -> Option<u32> {
    let stems = ["subvol-", "basevol-", "vm-"];
    let rest = stems.iter().find_map(|stem| name.strip_prefix(stem))?;
    let (vmid, disk) = rest.split_once("-disk-")?;
    let number = !disk.is_empty() && disk.bytes().all(|b| b.is_ascii_digit());
    if number { vmid.parse().ok() } else { None }
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.base {
            Some(base) => write!(f, "{}:{base}/{}", self.storage, self.name),
            None => write!(f, "{}:{}", self.storage, self.name),
        }
    }
}

/// A `rootfs` or `mpN` line: the volume or path, then properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPoint {
    pub(crate) source: String,
    pub(crate) properties: Vec<(String, String)>,
}

impl MountPoint {
    /// Parses a line.
    pub(crate) fn parse(text: &str) -> Self {
        let mut source = String::new();
        let mut properties = Vec::new();
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("volume", value)) => value.clone_into(&mut source),
                Some((key, value)) => properties.push((key.to_owned(), value.to_owned())),
                None => part.clone_into(&mut source),
            }
        }
        Self { source, properties }
    }

    /// Returns a property.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.properties.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Sets a property; an existing one keeps its place.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        match self.properties.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => value.clone_into(old),
            None => self.properties.push((key.to_owned(), value.to_owned())),
        }
    }

    /// Returns whether the source is a host path, not a volume.
    pub(crate) fn is_bind(&self) -> bool {
        self.source.starts_with('/')
    }

    /// Formats the same properties for another volume.
    pub(crate) fn on(&self, volume: &Volume) -> String {
        let properties = self.properties.iter().map(|(k, v)| format!(",{k}={v}"));
        format!("{volume}{}", properties.collect::<String>())
    }

    /// Returns the size in bytes, from a property such as `size=2G`.
    pub(crate) fn size_bytes(&self) -> u64 {
        let Some(size) = self.get("size") else { return 0 };
        let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor = match &size[digits.len()..] {
            "K" => 1 << 10,
            "M" => 1 << 20,
            "G" => 1 << 30,
            "T" => 1 << 40,
            _ => 1,
        };
        digits.parse::<u64>().map_or(0, |n| n.saturating_mul(factor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_ids_are_parsed() {
        let linked = Volume::parse("local-zfs:basevol-9000-disk-0/subvol-100000-disk-0").unwrap();
        assert_eq!(linked.owner(), Some(100_000));
        assert_eq!(linked.to_string(), "local-zfs:basevol-9000-disk-0/subvol-100000-disk-0");
        for bad in ["x", "a:", "a:../b", "a:b/c/d", "a:b c", ":b"] {
            assert!(Volume::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rootfs_lines_are_parsed() {
        let point = MountPoint::parse("local-zfs:subvol-101-disk-0,size=2G,mountoptions=noatime");
        assert_eq!(point.size_bytes(), 2 << 30);
        let other = Volume::parse("local-zfs:subvol-102-disk-0").unwrap();
        assert_eq!(point.on(&other), "local-zfs:subvol-102-disk-0,size=2G,mountoptions=noatime");
        assert!(MountPoint::parse("/var/tmp,mp=/host,ro=1").is_bind());
    }
}
