//! The tree behind /etc/pve: names, bytes and versions. Pure: no FUSE, no clock and no disk;
//! `take_changes` returns what the caller has to write to disk.
//!
//! The tree refuses what pmxcfs refuses: a second `ID.conf` anywhere in the cluster, a file over 1
//! MiB, more than 128 MiB in all.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use nix::errno::Errno;

/// Largest file that pmxcfs accepts, in bytes.
pub const FILE_BYTES_MAX: usize = 1024 * 1024;
/// Largest size of all files together, in bytes.
pub const TREE_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Largest number of files and directories.
pub const INODES_MAX: usize = 256 * 1024;

/// Number of an inode. The root is 1; numbers below `FIRST` are reserved for virtual files.
pub type Ino = u64;
/// Inode of the root directory.
pub const ROOT: Ino = 1;
/// First inode number that the tree assigns.
pub const FIRST: Ino = 1000;

/// A file or a directory.
#[derive(Debug)]
pub struct Inode {
    /// Directory that holds the inode.
    pub parent: Ino,
    /// Name in that directory.
    pub name: String,
    pub body: Body,
    /// Time of the last write.
    pub mtime: SystemTime,
    /// Number of open handles, over all mounts.
    open: u32,
    /// False once removed or replaced; the inode lives until its last handle is closed.
    linked: bool,
}

/// Content of an inode.
#[derive(Debug)]
pub enum Body {
    /// Names to inodes.
    Dir(BTreeMap<String, Ino>),
    File(Vec<u8>),
}

/// The guest to which an `ID.conf` belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Node whose directory holds the config.
    pub node: String,
    /// Kind of guest: `lxc` or `qemu`.
    pub kind: &'static str,
    /// Number of the config's last change.
    pub version: u64,
}

/// A change that has to be written to disk; paths are relative to the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The file's bytes or time changed.
    Write(String),
    /// The directory was made.
    Mkdir(String),
    /// The file or the empty directory is gone.
    Remove(String),
    /// The file or directory moved from the first path to the second and replaced what was there.
    Rename(String, String),
}

/// The tree, with the counters that `.version` and `.vmlist` show.
#[derive(Debug)]
pub struct Tree {
    inodes: HashMap<Ino, Inode>,
    next: Ino,
    bytes: usize,
    guests: BTreeMap<u32, Guest>,
    vmlist_version: u64,
    guest_version: u64,
    versions: BTreeMap<String, u64>,
    changes: Vec<Change>,
}

impl Tree {
    /// Creates an empty tree whose root has the time `now`.
    pub fn new(now: SystemTime) -> Tree {
        let root = Inode {
            parent: ROOT,
            name: String::new(),
            body: Body::Dir(BTreeMap::new()),
            mtime: now,
            open: 0,
            linked: true,
        };
        Tree {
            inodes: HashMap::from([(ROOT, root)]),
            next: FIRST,
            bytes: 0,
            guests: BTreeMap::new(),
            vmlist_version: 1,
            guest_version: 0,
            versions: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    /// Returns the inode, if it exists or is still open.
    pub fn get(&self, ino: Ino) -> Result<&Inode, Errno> {
        self.inodes.get(&ino).ok_or(Errno::ENOENT)
    }

    /// Returns the inode of that name in a directory.
    pub fn lookup(&self, dir: Ino, name: &str) -> Result<Ino, Errno> {
        self.dir(dir)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    /// Returns the inode at a path such as `nodes/node1/lxc`.
    pub fn at(&self, path: &str) -> Result<Ino, Errno> {
        path.split('/')
            .filter(|part| !part.is_empty())
            .try_fold(ROOT, |dir, part| self.lookup(dir, part))
    }

    /// Returns the path of an inode, without a leading slash.
    pub fn path(&self, ino: Ino) -> String {
        let mut parts = Vec::new();
        let mut at = ino;
        while at != ROOT {
            let Some(inode) = self.inodes.get(&at) else { break };
            parts.push(inode.name.clone());
            at = inode.parent;
        }
        parts.reverse();
        parts.join("/")
    }

    /// Returns the names in a directory.
    pub fn dir(&self, ino: Ino) -> Result<&BTreeMap<String, Ino>, Errno> {
        match &self.get(ino)?.body {
            Body::Dir(names) => Ok(names),
            Body::File(_) => Err(Errno::ENOTDIR),
        }
    }

    /// Returns the bytes of a file.
    pub fn file(&self, ino: Ino) -> Result<&[u8], Errno> {
        match &self.get(ino)?.body {
            Body::File(bytes) => Ok(bytes),
            Body::Dir(_) => Err(Errno::EISDIR),
        }
    }

    /// Creates a file. Fails if the name exists or a guest of that number is elsewhere.
    pub fn create(&mut self, dir: Ino, name: &str, now: SystemTime) -> Result<Ino, Errno> {
        self.vacant(dir, name)?;
        let path = join(&self.path(dir), name);
        self.no_such_guest_but(&path, None)?;
        let ino = self.insert(dir, name, Body::File(Vec::new()), now)?;
        self.written(&path);
        self.changes.push(Change::Write(path));
        Ok(ino)
    }

    /// Creates a directory.
    pub fn mkdir(&mut self, dir: Ino, name: &str, now: SystemTime) -> Result<Ino, Errno> {
        self.vacant(dir, name)?;
        let path = join(&self.path(dir), name);
        let ino = self.insert(dir, name, Body::Dir(BTreeMap::new()), now)?;
        self.changes.push(Change::Mkdir(path));
        Ok(ino)
    }

    /// Writes into a file; a gap before `offset` is filled with zeros.
    pub fn write(
        &mut self,
        ino: Ino,
        offset: u64,
        data: &[u8],
        now: SystemTime,
    ) -> Result<usize, Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let end = start.checked_add(data.len()).ok_or(Errno::EFBIG)?;
        let len = self.file(ino)?.len();
        self.room_for(len, end.max(len))?;
        let bytes = self.file_mut(ino, now)?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
        self.bytes += end.saturating_sub(len);
        self.touched(ino);
        Ok(data.len())
    }

    /// Truncates or extends a file.
    pub fn truncate(&mut self, ino: Ino, size: u64, now: SystemTime) -> Result<(), Errno> {
        let size = usize::try_from(size).map_err(|_| Errno::EFBIG)?;
        let len = self.file(ino)?.len();
        self.room_for(len, size)?;
        self.file_mut(ino, now)?.resize(size, 0);
        self.bytes = self.bytes + size - len;
        self.touched(ino);
        Ok(())
    }

    /// Sets the modification time, by which PVE keeps its own locks alive.
    pub fn set_mtime(&mut self, ino: Ino, mtime: SystemTime) -> Result<(), Errno> {
        self.inodes.get_mut(&ino).ok_or(Errno::ENOENT)?.mtime = mtime;
        let path = self.path(ino);
        if self.file(ino).is_ok() {
            self.changes.push(Change::Write(path));
        }
        Ok(())
    }

    /// Removes a file.
    pub fn unlink(&mut self, dir: Ino, name: &str, now: SystemTime) -> Result<(), Errno> {
        let ino = self.lookup(dir, name)?;
        self.file(ino)?;
        self.remove(dir, name, ino, now)
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, dir: Ino, name: &str, now: SystemTime) -> Result<(), Errno> {
        let ino = self.lookup(dir, name)?;
        if !self.dir(ino)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.remove(dir, name, ino, now)
    }

    /// Moves a file or directory and replaces a file at the new name. Refused if the guest of the
    /// new name's number has its config elsewhere, unless that config is what moves.
    pub fn rename(
        &mut self,
        dir: Ino,
        name: &str,
        new_dir: Ino,
        new_name: &str,
        now: SystemTime,
    ) -> Result<(), Errno> {
        let ino = self.lookup(dir, name)?;
        let from = join(&self.path(dir), name);
        let to = join(&self.path(new_dir), new_name);
        if from == to {
            return Ok(());
        }
        if to.starts_with(&format!("{from}/")) {
            return Err(Errno::EINVAL);
        }
        self.no_such_guest_but(&to, Some(&from))?;
        let over = self.dir(new_dir)?.get(new_name).copied();
        if let Some(over) = over {
            match (&self.get(ino)?.body, &self.get(over)?.body) {
                (Body::File(_), Body::Dir(_)) => return Err(Errno::EISDIR),
                (Body::Dir(_), Body::File(_)) => return Err(Errno::ENOTDIR),
                (_, Body::Dir(names)) if !names.is_empty() => return Err(Errno::ENOTEMPTY),
                (_, _) => {}
            }
            self.dir_mut(new_dir, now)?.remove(new_name);
            self.detach(over);
        }
        self.dir_mut(dir, now)?.remove(name);
        self.dir_mut(new_dir, now)?.insert(new_name.to_owned(), ino);
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.parent = new_dir;
            new_name.clone_into(&mut inode.name);
        }
        self.removed(&from);
        self.written(&to);
        self.changes.push(Change::Rename(from, to));
        Ok(())
    }

    /// Counts an opened handle; returns false if the file is gone.
    pub fn opened(&mut self, ino: Ino) -> bool {
        let inode = self.inodes.get_mut(&ino);
        inode.map(|inode| inode.open += 1).is_some()
    }

    /// Counts a closed handle; a removed file is freed with its last one.
    pub fn released(&mut self, ino: Ino) {
        let gone = match self.inodes.get_mut(&ino) {
            Some(inode) => {
                inode.open = inode.open.saturating_sub(1);
                inode.open == 0 && !inode.linked
            }
            None => false,
        };
        if gone {
            self.forget(ino);
        }
    }

    /// Returns the guests of the cluster by number.
    pub fn guests(&self) -> &BTreeMap<u32, Guest> {
        &self.guests
    }

    /// Returns the number of changes of `.vmlist`.
    pub fn vmlist_version(&self) -> u64 {
        self.vmlist_version
    }

    /// Returns how often a file such as `storage.cfg` changed since the start, for `.version`.
    pub fn file_version(&self, path: &str) -> u64 {
        self.versions.get(path).copied().unwrap_or(1)
    }

    /// Resets the counters, as pmxcfs does when it starts.
    pub fn restart_counters(&mut self) {
        self.versions.clear();
        self.vmlist_version = 1;
        self.guest_version = 0;
        for guest in self.guests.values_mut() {
            self.guest_version += 1;
            guest.version = self.guest_version;
        }
    }

    /// Returns the changes since the last call, for the disk.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn dir_mut(&mut self, ino: Ino, now: SystemTime) -> Result<&mut BTreeMap<String, Ino>, Errno> {
        let inode = self.inodes.get_mut(&ino).ok_or(Errno::ENOENT)?;
        inode.mtime = now;
        match &mut inode.body {
            Body::Dir(names) => Ok(names),
            Body::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn file_mut(&mut self, ino: Ino, now: SystemTime) -> Result<&mut Vec<u8>, Errno> {
        let inode = self.inodes.get_mut(&ino).ok_or(Errno::ENOENT)?;
        inode.mtime = now;
        match &mut inode.body {
            Body::File(bytes) => Ok(bytes),
            Body::Dir(_) => Err(Errno::EISDIR),
        }
    }

    fn vacant(&self, dir: Ino, name: &str) -> Result<(), Errno> {
        if name.is_empty() || name == "." || name == ".." || name.contains('/') {
            return Err(Errno::EINVAL);
        }
        if name.len() > 255 {
            return Err(Errno::ENAMETOOLONG);
        }
        match self.lookup(dir, name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(Errno::ENOENT) if self.get(dir)?.linked => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn room_for(&self, old: usize, new: usize) -> Result<(), Errno> {
        if new > FILE_BYTES_MAX {
            return Err(Errno::EFBIG);
        }
        if self.bytes + new.saturating_sub(old) > TREE_BYTES_MAX {
            return Err(Errno::ENOSPC);
        }
        Ok(())
    }

    fn no_such_guest_but(&self, path: &str, moving: Option<&str>) -> Result<(), Errno> {
        let Some((vmid, node, kind)) = guest_of(path) else { return Ok(()) };
        let Some(guest) = self.guests.get(&vmid) else { return Ok(()) };
        let same_place = guest.node == node && guest.kind == kind;
        let same_guest = moving.and_then(guest_of).is_some_and(|(id, _, _)| id == vmid);
        if same_place || same_guest { Ok(()) } else { Err(Errno::EEXIST) }
    }

    fn insert(&mut self, dir: Ino, name: &str, body: Body, now: SystemTime) -> Result<Ino, Errno> {
        if self.inodes.len() >= INODES_MAX {
            return Err(Errno::ENOSPC);
        }
        let ino = self.next;
        self.dir_mut(dir, now)?.insert(name.to_owned(), ino);
        self.next += 1;
        let name = name.to_owned();
        let inode = Inode { parent: dir, name, body, mtime: now, open: 0, linked: true };
        self.inodes.insert(ino, inode);
        Ok(ino)
    }

    fn remove(&mut self, dir: Ino, name: &str, ino: Ino, now: SystemTime) -> Result<(), Errno> {
        let path = join(&self.path(dir), name);
        self.dir_mut(dir, now)?.remove(name);
        self.detach(ino);
        self.removed(&path);
        self.changes.push(Change::Remove(path));
        Ok(())
    }

    fn detach(&mut self, ino: Ino) {
        let open = match self.inodes.get_mut(&ino) {
            Some(inode) => {
                inode.linked = false;
                inode.open
            }
            None => return,
        };
        if open == 0 {
            self.forget(ino);
        }
    }

    fn forget(&mut self, ino: Ino) {
        if let Some(Inode { body: Body::File(bytes), .. }) = self.inodes.remove(&ino) {
            self.bytes -= bytes.len();
        }
    }

    fn touched(&mut self, ino: Ino) {
        // A removed file that is still open must not overwrite the file that now has its name.
        if self.inodes.get(&ino).is_some_and(|inode| inode.linked) {
            let path = self.path(ino);
            self.written(&path);
            self.changes.push(Change::Write(path));
        }
    }

    fn written(&mut self, path: &str) {
        *self.versions.entry(path.to_owned()).or_insert(1) += 1;
        if let Some((vmid, node, kind)) = guest_of(path) {
            self.guest_version += 1;
            self.vmlist_version += 1;
            let version = self.guest_version;
            self.guests.insert(vmid, Guest { node, kind, version });
        }
    }

    fn removed(&mut self, path: &str) {
        *self.versions.entry(path.to_owned()).or_insert(1) += 1;
        if let Some((vmid, node, _)) = guest_of(path)
            && self.guests.get(&vmid).is_some_and(|guest| guest.node == node)
        {
            self.guests.remove(&vmid);
            self.vmlist_version += 1;
        }
    }
}

/// Returns the guest to which a path such as `nodes/node1/lxc/100.conf` belongs.
pub fn guest_of(path: &str) -> Option<(u32, String, &'static str)> {
    let mut parts = path.split('/');
    let (root, node, dir, file) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let kind = match dir {
        "lxc" => "lxc",
        "qemu-server" => "qemu",
        _ => return None,
    };
    let digits = file.strip_suffix(".conf")?;
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    let vmid: u32 = digits.parse().ok()?;
    (root == "nodes" && parts.next().is_none() && plain && (100..=999_999_999).contains(&vmid))
        .then(|| (vmid, node.to_owned(), kind))
}

/// Returns true below `priv/` and `nodes/NODE/priv/`, where only root may read files.
pub fn is_private(path: &str) -> bool {
    let mut parts = path.split('/');
    match parts.next() {
        Some("priv") => true,
        Some("nodes") => parts.nth(1) == Some("priv"),
        Some(_) | None => false,
    }
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: SystemTime = SystemTime::UNIX_EPOCH;

    fn cluster() -> (Tree, Ino, Ino) {
        let mut tree = Tree::new(T);
        let nodes = tree.mkdir(ROOT, "nodes", T).expect("nodes");
        let mut lxc = |name: &str| {
            let node = tree.mkdir(nodes, name, T).expect("node");
            tree.mkdir(node, "lxc", T).expect("lxc")
        };
        let (one, two) = (lxc("node1"), lxc("node2"));
        (tree, one, two)
    }

    #[test]
    fn second_config_of_a_vmid_is_refused_on_every_node() {
        let (mut tree, one, two) = cluster();
        tree.create(one, "100.conf", T).expect("first");
        assert_eq!(tree.create(one, "100.conf", T), Err(Errno::EEXIST));
        assert_eq!(tree.create(two, "100.conf", T), Err(Errno::EEXIST));
        tree.create(two, "100.conf.tmp.7", T).expect("a temporary name is free");
        assert_eq!(tree.rename(two, "100.conf.tmp.7", two, "100.conf", T), Err(Errno::EEXIST));
        assert_eq!(tree.guests().len(), 1);
    }

    #[test]
    fn config_replaced_by_rename_gets_a_new_version() {
        let (mut tree, one, _) = cluster();
        let old = tree.create(one, "100.conf", T).expect("create");
        let before = tree.guests()[&100].version;
        let new = tree.create(one, "100.conf.tmp.7", T).expect("tmp");
        tree.write(new, 0, b"arch: amd64\n", T).expect("write");
        assert!(tree.opened(old));
        tree.rename(one, "100.conf.tmp.7", one, "100.conf", T).expect("rename");
        assert_eq!(tree.lookup(one, "100.conf"), Ok(new));
        assert_eq!(tree.file(old), Ok(&b""[..]), "an open handle keeps what it had");
        tree.released(old);
        assert_eq!(tree.file(old), Err(Errno::ENOENT));
        assert!(!tree.opened(old), "whoever has only its number looks its name up again");
        assert!(tree.guests()[&100].version > before);
        assert_eq!(tree.path(new), "nodes/node1/lxc/100.conf");
    }

    #[test]
    fn a_config_moves_between_nodes() {
        let (mut tree, one, two) = cluster();
        tree.create(one, "100.conf", T).expect("create");
        tree.rename(one, "100.conf", two, "100.conf", T).expect("move");
        assert_eq!(tree.guests()[&100].node, "node2");
        assert_eq!(tree.guests().len(), 1);
        tree.unlink(two, "100.conf", T).expect("remove");
        assert!(tree.guests().is_empty());
    }

    #[test]
    fn file_sizes_are_limited() {
        let (mut tree, one, _) = cluster();
        let ino = tree.create(one, "big", T).expect("create");
        assert_eq!(tree.write(ino, 0, &vec![0; FILE_BYTES_MAX], T), Ok(FILE_BYTES_MAX));
        assert_eq!(tree.write(ino, 1, &vec![0; FILE_BYTES_MAX], T), Err(Errno::EFBIG));
        assert_eq!(tree.truncate(ino, FILE_BYTES_MAX as u64 + 1, T), Err(Errno::EFBIG));
    }

    #[test]
    fn config_paths_of_guests_are_recognized() {
        assert_eq!(guest_of("nodes/a/lxc/100.conf"), Some((100, "a".to_owned(), "lxc")));
        assert_eq!(guest_of("nodes/a/qemu-server/100.conf"), Some((100, "a".to_owned(), "qemu")));
        for path in [
            "nodes/a/lxc/99.conf",
            "nodes/a/lxc/0100.conf",
            "nodes/a/lxc/100.conf.tmp.1",
            "nodes/a/lxc/x/100.conf",
            "nodes/a/100.conf",
            "lxc/100.conf",
        ] {
            assert_eq!(guest_of(path), None, "{path}");
        }
        assert!(is_private("priv/lock/x") && is_private("nodes/a/priv/k"));
        assert!(!is_private("nodes/priv/lxc/1"));
    }
}
