//! Storages: `storage.cfg`, their space, and their volumes. Pure except for reading directories;
//! programs are run by `super::pct`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use proto::{id::Vmid, name::NodeName};

use super::{StorageRoom, volume};

/// One storage of `storage.cfg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Name of the storage.
    pub name: String,
    /// Type: `dir`, `zfspool`, `lvmthin`, ...
    pub kind: String,
    /// Other properties.
    pub properties: BTreeMap<String, String>,
}

/// Source of a storage's volumes and free space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Volumes are entries of this directory; space is that of its file system.
    Flat(PathBuf),
    /// Volumes of ID are entries of `images/ID` below this directory.
    Images(PathBuf),
    /// Volumes are logical volumes of this group; space is that of the thin pool.
    Thin {
        /// Volume group.
        group: String,
        /// Thin pool.
        pool: String,
    },
    /// Only PVE can tell.
    Other,
}

/// Parses `storage.cfg`.
pub fn parse(text: &str) -> Vec<Storage> {
    let mut storages: Vec<Storage> = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let (key, value) = line.trim().split_once([' ', '\t']).unwrap_or((line.trim(), "1"));
            if let Some(storage) = storages.last_mut() {
                storage.properties.insert(key.to_owned(), value.trim().to_owned());
            }
        } else if let Some((kind, name)) = line.split_once(':') {
            let (kind, name) = (kind.trim().to_owned(), name.trim().to_owned());
            storages.push(Storage { name, kind, properties: BTreeMap::new() });
        }
    }
    storages
}

impl Storage {
    /// True when the storage can hold containers' volumes on this node.
    pub fn holds_containers(&self, node: &NodeName) -> bool {
        let listed = |key, word: &str| {
            self.properties.get(key).map(|list| list.split(',').any(|item| item.trim() == word))
        };
        let disabled = self.properties.get("disable").is_some_and(|value| value != "0");
        !disabled
            && listed("content", "rootdir").unwrap_or(false)
            && listed("nodes", node.as_str()).unwrap_or(true)
    }

    /// True when a container's template on this storage is cloned linked: the clone shares its volume.
    pub fn links_clones(&self) -> bool {
        matches!(self.kind.as_str(), "zfspool" | "lvmthin" | "rbd" | "btrfs")
    }

    /// True when all nodes with this storage see the same volumes on it.
    pub fn is_shared(&self) -> bool {
        // PVE treats these types as shared, whatever the config says.
        let by_nature = ["cephfs", "cifs", "glusterfs", "nfs", "rbd"];
        by_nature.contains(&self.kind.as_str())
            || self.properties.get("shared").is_some_and(|value| value != "0")
    }

    /// Location on this host.
    pub fn place(&self) -> Place {
        let property = |key| self.properties.get(key).cloned();
        match (self.kind.as_str(), property("path"), property("pool")) {
            ("dir" | "btrfs", Some(path), _) => Place::Images(path.into()),
            ("nfs" | "cifs" | "cephfs", path, _) => {
                let path = path.unwrap_or_else(|| format!("/mnt/pve/{}", self.name));
                Place::Images(path.into())
            }
            // ZFS mounts each container's dataset below the pool's.
            ("zfspool", _, Some(pool)) => {
                let path = property("mountpoint").unwrap_or_else(|| format!("/{pool}"));
                Place::Flat(path.into())
            }
            ("lvmthin", ..) => match (property("vgname"), property("thinpool")) {
                (Some(group), Some(pool)) => Place::Thin { group, pool },
                _ => Place::Other,
            },
            _ => Place::Other,
        }
    }

    /// Volume of an entry of this storage, as PVE names it; `None` when it is not a volume of this
    /// container.
    pub fn volume(&self, vmid: Vmid, entry: &str) -> Option<String> {
        if volume::owner(entry) != Some(vmid) {
            return None;
        }
        let name = &self.name;
        Some(match (self.kind.as_str(), self.place()) {
            // On btrfs a volume is a directory whose name omits the format.
            ("btrfs", _) if entry.starts_with("subvol-") => format!("{name}:{vmid}/{entry}.subvol"),
            ("btrfs", _) if !entry.ends_with(".raw") => format!("{name}:{vmid}/{entry}.raw"),
            (_, Place::Images(_)) => format!("{name}:{vmid}/{entry}"),
            (_, Place::Flat(_) | Place::Thin { .. } | Place::Other) => format!("{name}:{entry}"),
        })
    }

    /// Volumes of a container in the directories of the storage; `None` when it has none.
    pub fn volumes_seen(&self, vmid: Vmid) -> Option<std::io::Result<Vec<String>>> {
        let dirs = match self.place() {
            Place::Flat(dir) => self.flat(dir),
            Place::Images(dir) => vec![dir.join("images").join(vmid.to_string())],
            Place::Thin { .. } | Place::Other => return None,
        };
        let volumes = |dir: &PathBuf| {
            let names = entries(dir)?;
            Ok(names.iter().filter_map(|name| self.volume(vmid, name)).collect::<Vec<_>>())
        };
        Some(dirs.iter().map(volumes).collect::<std::io::Result<Vec<_>>>().map(|all| all.concat()))
    }

    /// Volumes of all vmids in the directories of the storage; `None` when it has none.
    pub fn all_volumes_seen(&self) -> Option<std::io::Result<BTreeMap<Vmid, Vec<String>>>> {
        let names = match self.place() {
            Place::Flat(dir) => {
                let names =
                    self.flat(dir).iter().map(|dir| entries(dir)).collect::<Result<Vec<_>, _>>();
                names.map(|names| names.concat())
            }
            Place::Images(dir) => images(&dir.join("images")),
            Place::Thin { .. } | Place::Other => return None,
        };
        Some(names.map(|names| self.by_number(names.iter().map(String::as_str))))
    }

    /// Volumes of all vmids among these entries.
    pub fn by_number<'a>(
        &self,
        entries: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<Vmid, Vec<String>> {
        let mut found = BTreeMap::<Vmid, Vec<String>>::new();
        for entry in entries {
            let Some(vmid) = volume::owner(entry) else { continue };
            found.entry(vmid).or_default().extend(self.volume(vmid, entry));
        }
        found
    }

    /// Directories of a storage whose volumes are entries of one. On ZFS, volumes that are no
    /// datasets appear as devices; volumes allocated by hand are mostly of that kind.
    fn flat(&self, dir: PathBuf) -> Vec<PathBuf> {
        let pool = self.properties.get("pool").filter(|_| self.kind == "zfspool");
        let devices = pool.map(|pool| Path::new("/dev/zvol").join(pool));
        [dir].into_iter().chain(devices).collect()
    }
}

/// Entries of the directories `ID` below `dir` that carry that vmid.
fn images(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    for id in entries(dir)?.iter().filter_map(|name| name.parse::<Vmid>().ok()) {
        let of_it = |name: &String| volume::owner(name) == Some(id);
        found.extend(entries(&dir.join(id.to_string()))?.into_iter().filter(of_it));
    }
    Ok(found)
}

fn entries(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                names.extend(entry?.file_name().into_string());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(names)
}

/// Names in the output of `lvs --noheadings -o lv_name`.
pub fn parse_lvs(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Space of a thin pool, from `lvs --noheadings --units b --nosuffix -o
/// lv_size,data_percent,metadata_percent`.
pub fn parse_thin_room(text: &str) -> Option<StorageRoom> {
    let mut words = text.split_ascii_whitespace();
    let total: u64 = words.next()?.parse().ok()?;
    let mut share = || Some((words.next()?.parse::<f64>().ok()? / 100.0).clamp(0.0, 1.0));
    let (thin_data, thin_metadata) = (share()?, share()?);
    #[expect(clippy::cast_precision_loss, reason = "sizes of storages, to four digits")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of total")]
    let used = (total as f64 * thin_data) as u64;
    Some(StorageRoom { free: total.saturating_sub(used), total, thin_data, thin_metadata })
}

/// Space of a dataset, from `zfs list -Hp -o used,available`.
pub fn parse_zfs_room(text: &str) -> Option<StorageRoom> {
    let mut words = text.split_ascii_whitespace();
    let used: u64 = words.next()?.parse().ok()?;
    let free: u64 = words.next()?.parse().ok()?;
    Some(StorageRoom::new(free, used + free))
}

/// Space of a storage, from `pvesm status --storage NAME`: name, type, status, then KiB.
pub fn parse_pvesm_room(text: &str, name: &str) -> Option<StorageRoom> {
    let words = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let row = words
        .into_iter()
        .find(|row| row.first() == Some(&name) && row.get(2) == Some(&"active"))?;
    let bytes = |at: usize| Some(row.get(at)?.parse::<u64>().ok()? * 1024);
    Some(StorageRoom::new(bytes(5)?, bytes(3)?))
}

/// Whether a storage is active, from `pvesm status`; `None` when it is not listed.
pub fn is_active(text: &str, name: &str) -> Option<bool> {
    let mut rows = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.first() == Some(&name))?;
    row.get(2).map(|state| *state == "active")
}

/// Volumes in the output of `pvesm list STORAGE --vmid ID`.
pub fn parse_pvesm_volumes(text: &str, name: &str) -> Vec<String> {
    let first = text.lines().filter_map(|line| line.split_ascii_whitespace().next());
    first.filter(|word| word.starts_with(&format!("{name}:"))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "\
dir: local
\tpath /var/lib/vz
\tcontent iso,vztmpl,backup

zfspool: local-zfs
\tpool rpool/data
\tsparse
\tcontent images,rootdir

lvmthin: local-lvm
\tthinpool data
\tvgname pve
\tcontent rootdir,images

btrfs: btr
\tpath /var/lib/pve/local-btrfs
\tcontent rootdir
\tnodes pve1,pve3

# a comment
rbd: ceph
\tpool rbd
\tcontent rootdir
\tdisable 1
";

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    #[test]
    fn reads_storage_cfg() {
        let storages = parse(CONFIG);
        let holding = |node: &str| {
            let node = node.parse().expect("valid");
            let fit = storages.iter().filter(|storage| storage.holds_containers(&node));
            fit.map(|storage| storage.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(holding("pve1"), ["local-zfs", "local-lvm", "btr"]);
        assert_eq!(holding("pve2"), ["local-zfs", "local-lvm"]);
        let places: Vec<_> = storages.iter().map(Storage::place).collect();
        assert_eq!(
            places,
            [
                Place::Images("/var/lib/vz".into()),
                Place::Flat("/rpool/data".into()),
                Place::Thin { group: "pve".to_owned(), pool: "data".to_owned() },
                Place::Images("/var/lib/pve/local-btrfs".into()),
                Place::Other,
            ]
        );
    }

    #[test]
    fn storage_is_shared_by_its_kind_or_its_setting() {
        let shared: Vec<_> = parse(CONFIG).iter().map(Storage::is_shared).collect();
        assert_eq!(shared, [false, false, false, false, true]);
        let linked: Vec<_> = parse(CONFIG).iter().map(Storage::links_clones).collect();
        assert_eq!(linked, [false, true, true, true, true]);
        let marked =
            |value| parse(&format!("dir: d\n\tpath /d\n\tshared {value}\n"))[0].is_shared();
        assert_eq!((marked("1"), marked("0")), (true, false));
    }

    #[test]
    fn a_volume_is_named_as_pve_names_it() {
        let storages = parse(CONFIG);
        let name = |at: usize, entry| storages[at].volume(vmid(502), entry);
        assert_eq!(name(1, "subvol-502-disk-0").as_deref(), Some("local-zfs:subvol-502-disk-0"));
        assert_eq!(name(2, "vm-502-disk-0").as_deref(), Some("local-lvm:vm-502-disk-0"));
        assert_eq!(name(3, "vm-502-disk-0").as_deref(), Some("btr:502/vm-502-disk-0.raw"));
        assert_eq!(
            name(3, "subvol-502-disk-0").as_deref(),
            Some("btr:502/subvol-502-disk-0.subvol")
        );
        assert_eq!(name(0, "vm-502-disk-0.raw").as_deref(), Some("local:502/vm-502-disk-0.raw"));
        for entry in ["subvol-5020-disk-0", "subvol-50-disk-0", "vm-502", "502", "xvm-502-disk-0"] {
            assert_eq!(name(1, entry), None, "{entry}");
        }
    }

    #[test]
    fn volumes_are_listed_from_directories() {
        let root = tempfile::tempdir().expect("tempdir");
        let config = format!("zfspool: z\n\tpool p\n\tmountpoint {}\n", root.path().display());
        let storage = parse(&config).remove(0);
        let seen = || storage.volumes_seen(vmid(502)).expect("a directory").expect("readable");
        assert!(seen().is_empty());
        for entry in ["subvol-502-disk-0", "basevol-9000-disk-0", "subvol-5021-disk-0"] {
            std::fs::create_dir(root.path().join(entry)).expect("mkdir");
        }
        assert_eq!(seen(), ["z:subvol-502-disk-0"]);
        let all = storage.all_volumes_seen().expect("a directory").expect("readable");
        let all: Vec<_> = all.into_iter().map(|(vmid, volumes)| (vmid.get(), volumes)).collect();
        assert_eq!(
            all,
            [
                (502, vec!["z:subvol-502-disk-0".to_owned()]),
                (5021, vec!["z:subvol-5021-disk-0".to_owned()]),
                (9000, vec!["z:basevol-9000-disk-0".to_owned()]),
            ]
        );
    }

    #[test]
    fn images_are_listed_by_vmid_without_snapshots() {
        let root = tempfile::tempdir().expect("tempdir");
        let config = format!("btrfs: b\n\tpath {}\n", root.path().display());
        let storage = parse(&config).remove(0);
        let all = || storage.all_volumes_seen().expect("a directory").expect("readable");
        assert!(all().is_empty(), "nothing was ever made there");
        for entry in ["502/vm-502-disk-0", "502/vm-502-disk-0@before", "502/vm-7-disk-0", "x/y"] {
            std::fs::create_dir_all(root.path().join("images").join(entry)).expect("mkdir");
        }
        let expected = vec!["b:502/vm-502-disk-0.raw".to_owned()];
        assert_eq!(all().into_iter().collect::<Vec<_>>(), [(vmid(502), expected.clone())]);
        let seen = storage.volumes_seen(vmid(502)).expect("a directory").expect("readable");
        assert_eq!(seen, expected);
    }

    #[test]
    fn free_room_and_volumes_are_parsed() {
        let room = |free, total| Some(StorageRoom::new(free, total));
        let thin = parse_thin_room("  1000000 25.00 96.50\n").expect("a pool");
        assert_eq!((thin.free, thin.total), (750_000, 1_000_000));
        assert_eq!((thin.thin_data, thin.thin_metadata), (0.25, 0.965));
        assert_eq!(parse_thin_room("  1000000 25.00\n"), None, "a volume that is no pool");
        assert_eq!(parse_zfs_room("100\t900\n"), room(900, 1000));
        let status = "Name         Type     Status     Total (KiB)      Used (KiB) Available (KiB)        %\n\
            btr         btrfs     active        20971520          757456        19956576    3.61%\n\
            tiny        btrfs   inactive               0               0               0    0.00%\n";
        assert_eq!(parse_pvesm_room(status, "btr"), room(19_956_576 << 10, 20_971_520 << 10));
        assert_eq!(parse_pvesm_room(status, "tiny"), None);
        let active = ["btr", "tiny", "none"].map(|name| is_active(status, name));
        assert_eq!(active, [Some(true), Some(false), None]);
        let list = "Volid                            Format  Type            Size VMID\n\
            btr:502/vm-502-disk-0.raw        raw     images    2147483648 502\n";
        assert_eq!(parse_pvesm_volumes(list, "btr"), ["btr:502/vm-502-disk-0.raw"]);
    }
}
