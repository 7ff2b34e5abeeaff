//! Decides which volumes of a vmid belong to a sandbox. Pure.
//!
//! A volume's name holds a vmid, but that does not say who made it: an operator may have allocated
//! it by hand, or a failed restore may have left it. PVE's `--destroy-unreferenced-disks` removes
//! all of them, so it is never used.

use proto::id::Vmid;
use serde::{Deserialize, Serialize};

/// Volumes that are destroyed with a sandbox besides those that its config names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnVolumes {
    /// Storages that a running clone writes to. Right before the clone no storage had a volume of
    /// this vmid, so every such volume there now was made by the clone. Empty once the volumes are
    /// known by name.
    pub cloned_to: Vec<String>,
    /// Volumes that the finished clone's config named, as `key` writes them.
    pub named: Vec<String>,
}

impl OwnVolumes {
    /// Volumes of a clone that is about to write to these storages, under a vmid without a volume.
    pub fn cloned_to(storages: Vec<String>) -> Self {
        Self { cloned_to: storages, named: Vec::new() }
    }

    /// Keeps only the named volumes, whatever else exists under the vmid.
    #[must_use]
    pub fn named_alone(self) -> Self {
        Self { cloned_to: Vec::new(), ..self }
    }

    /// True when this volume, as PVE or a storage writes it, belongs to the sandbox.
    pub fn owns(&self, volume: &str) -> bool {
        let Some(key) = key(volume) else { return false };
        let storage = key.split(':').next().unwrap_or("");
        self.cloned_to.iter().any(|to| to == storage) || self.named.contains(&key)
    }

    /// Storages that may hold a volume of the sandbox.
    pub fn storages(&self) -> impl Iterator<Item = &str> {
        let named = self.named.iter().filter_map(|volume| volume.split(':').next());
        self.cloned_to.iter().map(String::as_str).chain(named)
    }
}

/// Volume in the normal form `STORAGE:NAME`: without the base of a linked clone, and without the
/// directory that some storages put in front. Some of PVE's tools write both, others omit them.
/// `None` for a value that is no volume, such as a path of the host.
pub fn key(volume: &str) -> Option<String> {
    let (storage, path) = volume.split_once(':').filter(|_| !volume.starts_with('/'))?;
    let name = path.rsplit('/').next().filter(|name| !name.is_empty())?;
    Some(format!("{storage}:{name}"))
}

/// Vmid in the name of a volume: `vm-100-disk-0`, `subvol-100-disk-0`, `base-100-disk-0`,
/// `basevol-100-disk-0`, with any suffix.
pub fn owner(name: &str) -> Option<Vmid> {
    let (stem, rest) = name.split_once('-')?;
    let (number, rest) = rest.split_once('-')?;
    let known = ["vm", "subvol", "base", "basevol"].contains(&stem);
    // A snapshot or a partition's device beside a volume is a part of that volume.
    if !known
        || rest.contains('@')
        || rest.contains("-part")
        || !number.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_of_a_volume_have_one_key() {
        for (volume, expected) in [
            ("local-zfs:subvol-100-disk-0", "local-zfs:subvol-100-disk-0"),
            ("local-zfs:basevol-9000-disk-0/subvol-100-disk-0", "local-zfs:subvol-100-disk-0"),
            ("local-lvm:vm-100-disk-0", "local-lvm:vm-100-disk-0"),
            ("ceph:base-9000-disk-0/vm-100-disk-0", "ceph:vm-100-disk-0"),
            ("local:100/vm-100-disk-0.raw", "local:vm-100-disk-0.raw"),
            ("local:9000/base-9000-disk-0.raw/100/vm-100-disk-0.raw", "local:vm-100-disk-0.raw"),
            ("btr:100/subvol-100-disk-0.subvol", "btr:subvol-100-disk-0.subvol"),
        ] {
            assert_eq!(key(volume).as_deref(), Some(expected), "{volume}");
        }
        for none in ["/srv/share", "", "local:", "/a:b", "nothing"] {
            assert_eq!(key(none), None, "{none}");
        }
    }

    #[test]
    fn owner_of_a_volume_is_parsed_from_its_name() {
        let number = |name| owner(name).map(Vmid::get);
        for name in [
            "vm-100-disk-0",
            "vm-100-disk-0.raw",
            "subvol-100-disk-3.subvol",
            "base-100-disk-0",
            "vm-100-cloudinit",
        ] {
            assert_eq!(number(name), Some(100), "{name}");
        }
        let others = [
            "vm-100",
            "100",
            "xvm-100-disk-0",
            "vm-1a0-disk-0",
            "vm--disk-0",
            "snap_vm-100-disk-0",
        ];
        for name in others.into_iter().chain(["vm-100-disk-0@before", "vm-100-disk-0-part1"]) {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn clone_owns_volumes_by_storage_and_sandbox_by_name() {
        let clone = OwnVolumes::cloned_to(vec!["local-zfs".into()]);
        assert!(clone.owns("local-zfs:subvol-100-disk-0"));
        assert!(clone.owns("local-zfs:basevol-9000-disk-0/subvol-100-disk-1"));
        assert!(!clone.owns("local-lvm:vm-100-disk-0"), "no clone of ours goes there");
        let named = vec!["local-zfs:subvol-100-disk-0".to_owned()];
        let whole = OwnVolumes { named, ..OwnVolumes::default() };
        assert!(whole.owns("local-zfs:basevol-9000-disk-0/subvol-100-disk-0"));
        for other in ["local-zfs:subvol-100-disk-1", "tank:subvol-100-disk-0", "/srv"] {
            assert!(!whole.owns(other), "{other}");
        }
        assert!(!OwnVolumes::default().owns("local-zfs:subvol-100-disk-0"));
        let both = OwnVolumes { cloned_to: vec!["local-zfs".into()], ..whole.clone() };
        assert_eq!(both.named_alone(), whole);
    }
}
