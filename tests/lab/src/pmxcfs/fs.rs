//! Answers the kernel for one node's mount: forced modes, no links, no special files, direct I/O,
//! and the virtual files and symlinks in the root.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use nix::errno::Errno as Unix;
use nix::libc;

use super::shared::Shared;
use super::tree::{Body, FIRST, ROOT, is_private};

/// Cache time for the kernel: zero, because another node may change a file at any moment.
const NO_CACHE: Duration = Duration::ZERO;
const WWW_DATA: u32 = 33;
const BLOCK: u32 = 4096;

/// Virtual files of the root and their modes, from inode 2 on.
const VIRTUAL_FILES: [(&str, u16); 6] = [
    (".clusterlog", 0o440),
    (".debug", 0o640),
    (".members", 0o440),
    (".rrd", 0o440),
    (".version", 0o440),
    (".vmlist", 0o440),
];
/// Symlinks of the root and their targets below the node's directory, from inode 20 on.
const LINKS: [(&str, &str); 4] =
    [("local", ""), ("lxc", "/lxc"), ("openvz", "/openvz"), ("qemu-server", "/qemu-server")];
const FIRST_FILE: u64 = 2;
const FIRST_LINK: u64 = 20;

/// One node's mount.
#[derive(Debug)]
pub(super) struct NodeFs {
    pub(super) shared: Arc<Shared>,
    pub(super) node: String,
}

fn unix(errno: Unix) -> Errno {
    Errno::from_i32(errno as i32)
}

fn text(name: &OsStr) -> Result<&str, Unix> {
    name.to_str().ok_or(Unix::EINVAL)
}

fn virtual_name(ino: u64) -> Option<(&'static str, u16)> {
    let index = usize::try_from(ino.checked_sub(FIRST_FILE)?).ok()?;
    VIRTUAL_FILES.get(index).copied()
}

fn link_target(ino: u64) -> Option<&'static str> {
    let index = usize::try_from(ino.checked_sub(FIRST_LINK)?).ok()?;
    LINKS.get(index).map(|(_, target)| *target)
}

fn virtual_ino(name: &str) -> Option<u64> {
    let at = |first: u64, index: usize| first + index as u64;
    let file = VIRTUAL_FILES.iter().position(|(file, _)| *file == name);
    let link = LINKS.iter().position(|(link, _)| *link == name);
    file.map(|i| at(FIRST_FILE, i)).or(link.map(|i| at(FIRST_LINK, i)))
}

fn attr(ino: u64, kind: FileType, perm: u16, size: u64, mtime: SystemTime) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind,
        perm,
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        uid: 0,
        gid: WWW_DATA,
        rdev: 0,
        blksize: BLOCK,
        flags: 0,
    }
}

impl NodeFs {
    fn stopped(&self) -> bool {
        self.shared.state().cluster.members.get(&self.node).is_some_and(|m| m.stopped)
    }

    fn attr_of(&self, ino: u64) -> Result<FileAttr, Unix> {
        if let Some((name, perm)) = virtual_name(ino) {
            let size = self.shared.virtual_file(&self.node, name).len() as u64;
            return Ok(attr(ino, FileType::RegularFile, perm, size, UNIX_EPOCH));
        }
        if let Some(target) = link_target(ino) {
            let size = "nodes/".len() + self.node.len() + target.len();
            return Ok(attr(ino, FileType::Symlink, 0o755, size as u64, UNIX_EPOCH));
        }
        let state = self.shared.state();
        let inode = state.tree.get(ino)?;
        let private = is_private(&state.tree.path(ino));
        // Without quorum pmxcfs shows its files without w bits, but not the mount itself.
        let writable = ino == ROOT || state.cluster.quorate(&self.node);
        let shown = |perm: u16| if writable { perm } else { perm & !0o222 };
        Ok(match &inode.body {
            Body::Dir(_) => {
                let perm = if private { 0o700 } else { 0o755 };
                attr(ino, FileType::Directory, shown(perm), 0, inode.mtime)
            }
            Body::File(bytes) => {
                let perm = if private { 0o600 } else { 0o640 };
                attr(ino, FileType::RegularFile, shown(perm), bytes.len() as u64, inode.mtime)
            }
        })
    }

    fn find(&self, parent: u64, name: &OsStr) -> Result<FileAttr, Unix> {
        let name = text(name)?;
        if self.stopped() {
            return Err(Unix::ENOENT);
        }
        if parent == ROOT
            && let Some(ino) = virtual_ino(name)
        {
            return self.attr_of(ino);
        }
        let ino = self.shared.state().tree.lookup(parent, name)?;
        self.attr_of(ino)
    }

    fn reply_entry(&self, ino: Result<u64, Unix>, reply: ReplyEntry) {
        match ino.and_then(|ino| self.attr_of(ino)) {
            Ok(attr) => reply.entry(&NO_CACHE, &attr, Generation(0)),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    /// Accepts a request for the forced mode, which changes nothing; any other mode is refused.
    fn may_chmod(&self, ino: u64, mode: u32) -> Result<(), Unix> {
        let perm = self.attr_of(ino)?.perm;
        if mode & 0o7777 == u32::from(perm) { Ok(()) } else { Err(Unix::EPERM) }
    }

    fn set(&self, ino: u64, set: &Set) -> Result<(), Unix> {
        if let Some(mode) = set.mode {
            self.may_chmod(ino, mode)?;
        }
        if set.uid.is_some_and(|uid| uid != 0) || set.gid.is_some_and(|gid| gid != WWW_DATA) {
            return Err(Unix::EPERM);
        }
        if ino < FIRST && ino != ROOT && (set.size.is_some() || set.mtime.is_some()) {
            return Err(Unix::EACCES);
        }
        if let Some(size) = set.size {
            self.shared.change(&self.node, |tree, now| tree.truncate(ino, size, now))?;
        }
        match set.mtime {
            Some(TimeOrNow::SpecificTime(time)) => {
                self.shared.change(&self.node, |tree, _| tree.set_mtime(ino, time))
            }
            Some(TimeOrNow::Now) => {
                self.shared.change(&self.node, |tree, now| tree.set_mtime(ino, now))
            }
            None => Ok(()),
        }
    }
}

/// Fields of `setattr` that are used here.
struct Set {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    mtime: Option<TimeOrNow>,
}

fn reply_empty(answer: Result<(), Unix>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(unix(errno)),
    }
}

fn slice(bytes: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let end = start.saturating_add(size as usize).min(bytes.len());
    &bytes[start..end]
}

impl Filesystem for NodeFs {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent.0, name) {
            Ok(attr) => reply.entry(&NO_CACHE, &attr, Generation(0)),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr_of(ino.0) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            // As for `open`.
            Err(Unix::ENOENT) => reply.error(Errno::ESTALE),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = Set { mode, uid, gid, size, mtime };
        match self.set(ino.0, &set).and_then(|()| self.attr_of(ino.0)) {
            Ok(attr) => reply.attr(&NO_CACHE, &attr),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match link_target(ino.0) {
            Some(target) => reply.data(format!("nodes/{}{target}", self.node).as_bytes()),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = text(name).and_then(|name| {
            self.shared.change(&self.node, |tree, now| tree.mkdir(parent.0, name, now))
        });
        self.reply_entry(made, reply);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _link_name: &OsStr,
        _target: &std::path::Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let gone = text(name).and_then(|name| {
            self.shared.change(&self.node, |tree, now| tree.unlink(parent.0, name, now))
        });
        reply_empty(gone, reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let gone = text(name).and_then(|name| {
            self.shared.change(&self.node, |tree, now| tree.rmdir(parent.0, name, now))
        });
        reply_empty(gone, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            reply.error(Errno::EINVAL);
            return;
        }
        let moved = text(name).and_then(|name| {
            let to = text(newname)?;
            self.shared
                .change(&self.node, |tree, now| tree.rename(parent.0, name, newparent.0, to, now))
        });
        reply_empty(moved, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let virtual_file = virtual_name(ino.0).is_some();
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            let allowed = if virtual_file {
                Err(Unix::EACCES)
            } else {
                self.shared.change(&self.node, |_, _| Ok(()))
            };
            if let Err(errno) = allowed {
                reply.error(unix(errno));
                return;
            }
        }
        // Another file got this name since the kernel's lookup: the kernel must look it up again.
        if !virtual_file && !self.shared.state().tree.opened(ino.0) {
            reply.error(Errno::ESTALE);
            return;
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = text(name).and_then(|name| {
            self.shared.change(&self.node, |tree, now| match tree.create(parent.0, name, now) {
                // Another node created it since the kernel's lookup: fine unless O_EXCL was asked
                // for.
                Err(Unix::EEXIST) if flags & libc::O_EXCL == 0 => {
                    tree.lookup(parent.0, name).map_err(|_| Unix::EEXIST)
                }
                answer => answer,
            })
        });
        match made.and_then(|ino| self.attr_of(ino)) {
            Ok(attr) => {
                self.shared.state().tree.opened(attr.ino.0);
                let direct = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&NO_CACHE, &attr, Generation(0), FileHandle(0), direct);
            }
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if let Some((name, _)) = virtual_name(ino.0) {
            let text = self.shared.virtual_file(&self.node, name);
            reply.data(slice(text.as_bytes(), offset, size));
            return;
        }
        match self.shared.state().tree.file(ino.0) {
            Ok(bytes) => reply.data(slice(bytes, offset, size)),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written =
            self.shared.change(&self.node, |tree, now| tree.write(ino.0, offset, data, now));
        match written.map(u32::try_from) {
            Ok(Ok(bytes)) => reply.written(bytes),
            Ok(Err(_)) => reply.error(Errno::EFBIG),
            Err(errno) => reply.error(unix(errno)),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(&self, _r: &Request, _i: INodeNo, _f: FileHandle, _d: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.shared.state().tree.released(ino.0);
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut entries = vec![(ino.0, FileType::Directory, ".".to_owned())];
        if !self.stopped() {
            let state = self.shared.state();
            let names = match state.tree.dir(ino.0) {
                Ok(names) => names,
                Err(errno) => {
                    reply.error(unix(errno));
                    return;
                }
            };
            let parent = state.tree.get(ino.0).map_or(ROOT, |inode| inode.parent);
            entries.push((parent, FileType::Directory, "..".to_owned()));
            if ino.0 == ROOT {
                let virtual_names =
                    VIRTUAL_FILES.iter().map(|(name, _)| (*name, FileType::RegularFile));
                let links = LINKS.iter().map(|(name, _)| (*name, FileType::Symlink));
                for (name, kind) in virtual_names.chain(links) {
                    entries.push((virtual_ino(name).unwrap_or(ROOT), kind, name.to_owned()));
                }
            }
            for (name, child) in names {
                let kind = match state.tree.get(*child).map(|inode| &inode.body) {
                    Ok(Body::Dir(_)) => FileType::Directory,
                    Ok(Body::File(_)) | Err(_) => FileType::RegularFile,
                };
                entries.push((*child, kind, name.clone()));
            }
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, (child, kind, name)) in entries.iter().enumerate().skip(from) {
            if reply.add(INodeNo(*child), i as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let blocks = (super::tree::TREE_BYTES_MAX / BLOCK as usize) as u64;
        let inodes = super::tree::INODES_MAX as u64;
        reply.statfs(blocks, blocks, blocks, inodes, inodes, BLOCK, 255, BLOCK);
    }
}
