//! Open files and directories of one SFTP session, and what a request does to them.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions, Permissions, ReadDir},
    io,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag},
    sys::{
        stat::{UtimensatFlags, futimens, utimensat},
        statvfs::Statvfs,
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat},
};

use super::wire::{Attributes, Code, DATA_BYTES_MAX, Packet, answer, long_name};

/// Most files and directories that a session may have open.
pub(super) const HANDLES_MAX: usize = 256;
/// Bytes of names after which a packet of a directory ends: well below the largest packet.
const NAMES_BYTES: usize = 32 * 1024;

/// Flags of an open.
mod flag {
    pub(super) const READ: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const APPEND: u32 = 4;
    pub(super) const CREATE: u32 = 8;
    pub(super) const TRUNCATE: u32 = 16;
    pub(super) const EXCLUSIVE: u32 = 32;
}

/// Refusal of a request.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) Code, pub(super) String);

impl From<io::Error> for Refusal {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the standard library's, and many")]
    fn from(error: io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Code::NoSuchFile,
            io::ErrorKind::PermissionDenied => Code::PermissionDenied,
            io::ErrorKind::Unsupported => Code::Unsupported,
            _ => Code::Failure,
        };
        Self(code, error.to_string())
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        io::Error::from(errno).into()
    }
}

pub(super) type Result<T> = std::result::Result<T, Refusal>;

enum Handle {
    File(File),
    Directory {
        path: PathBuf,
        entries: ReadDir,
        /// Whether `.` and `..` were listed.
        begun: bool,
    },
}

/// Open files and directories, by their numbers.
#[derive(Default)]
pub(super) struct Handles {
    next: u32,
    open: BTreeMap<u32, Handle>,
}

/// Returns the path of a request; an empty one is the working directory.
pub(super) fn path(bytes: &[u8]) -> PathBuf {
    if bytes.is_empty() { PathBuf::from(".") } else { PathBuf::from(OsStr::from_bytes(bytes)) }
}

impl Handles {
    fn keep(&mut self, handle: Handle) -> Result<[u8; 4]> {
        if self.open.len() >= HANDLES_MAX {
            let message = format!("{HANDLES_MAX} files are open already");
            return Err(Refusal(Code::Failure, message));
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.open.insert(number, handle);
        Ok(number.to_be_bytes())
    }

    fn find(&mut self, name: &[u8]) -> Result<&mut Handle> {
        let none = || Refusal(Code::Failure, "there is no such handle".to_owned());
        let number = name.try_into().map(u32::from_be_bytes).map_err(|_| none())?;
        self.open.get_mut(&number).ok_or_else(none)
    }

    fn file(&mut self, name: &[u8]) -> Result<&mut File> {
        match self.find(name)? {
            Handle::File(file) => Ok(file),
            Handle::Directory { .. } => {
                Err(Refusal(Code::Failure, "the handle is a directory".to_owned()))
            }
        }
    }

    /// Opens a regular file; never blocks on any other kind.
    pub(super) fn open(&mut self, path: &Path, flags: u32, new: &Attributes) -> Result<[u8; 4]> {
        let has = |flag: u32| flags & flag != 0;
        let writes = has(flag::WRITE) || has(flag::APPEND);
        let mut options = OpenOptions::new();
        options.read(has(flag::READ)).write(writes).append(has(flag::APPEND));
        if writes {
            let create = has(flag::CREATE);
            options.create(create).create_new(create && has(flag::EXCLUSIVE));
            // The standard library refuses both; an append after the cut is what it means.
            options.truncate(has(flag::TRUNCATE) && !has(flag::APPEND));
        }
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        options.custom_flags(flags.bits()).mode(new.mode.unwrap_or(0o666) & 0o7777);
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            let message = format!("{} is no regular file", path.display());
            return Err(Refusal(Code::Failure, message));
        }
        if has(flag::TRUNCATE) && has(flag::APPEND) {
            file.set_len(0)?;
        }
        self.keep(Handle::File(file))
    }

    pub(super) fn open_directory(&mut self, path: PathBuf) -> Result<[u8; 4]> {
        let entries = fs::read_dir(&path)?;
        self.keep(Handle::Directory { path, entries, begun: false })
    }

    pub(super) fn close(&mut self, name: &[u8]) -> Result<()> {
        self.find(name)?;
        let number = name.try_into().map(u32::from_be_bytes).unwrap_or_default();
        self.open.remove(&number);
        Ok(())
    }

    /// Reads at most `length` bytes; an empty answer is the end of the file.
    pub(super) fn read(&mut self, name: &[u8], offset: u64, length: u32) -> Result<Vec<u8>> {
        let file = self.file(name)?;
        let mut bytes = vec![0; length.min(DATA_BYTES_MAX) as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read_at(&mut bytes[filled..], offset.saturating_add(filled as u64)) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    pub(super) fn write(&mut self, name: &[u8], offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.file(name)?.write_all_at(bytes, offset)?)
    }

    pub(super) fn sync(&mut self, name: &[u8]) -> Result<()> {
        Ok(self.file(name)?.sync_all()?)
    }

    pub(super) fn attributes(&mut self, name: &[u8]) -> Result<Attributes> {
        match self.find(name)? {
            Handle::File(file) => Ok((&file.metadata()?).into()),
            Handle::Directory { path, .. } => Ok((&fs::metadata(path)?).into()),
        }
    }

    /// Changes the attributes of an open file.
    pub(super) fn set(&mut self, name: &[u8], to: &Attributes) -> Result<()> {
        let path = match self.find(name)? {
            Handle::File(file) => return set_open(file, to),
            Handle::Directory { path, .. } => path.clone(),
        };
        set(&path, to, true)
    }

    pub(super) fn statvfs(&mut self, name: &[u8]) -> Result<Statvfs> {
        match self.find(name)? {
            Handle::File(file) => Ok(nix::sys::statvfs::fstatvfs(file)?),
            Handle::Directory { path, .. } => Ok(nix::sys::statvfs::statvfs(path.as_path())?),
        }
    }

    /// Returns the next names of a directory; `None` after the last one.
    pub(super) fn names(&mut self, name: &[u8], id: u32) -> Result<Option<Packet>> {
        let Handle::Directory { path, entries, begun } = self.find(name)? else {
            return Err(Refusal(Code::Failure, "the handle is a file".to_owned()));
        };
        let (mut count, mut fields) = (0, Packet::new(0));
        let dots = if std::mem::replace(begun, true) { &[][..] } else { &[".", ".."] };
        let dots = dots.iter().map(|dot| Ok(OsString::from(dot)));
        let rest = entries.by_ref().map(|entry| entry.map(|entry| entry.file_name()));
        for found in dots.chain(rest) {
            let found = found?;
            // The entry may have gone since the directory was read.
            let Ok(metadata) = fs::symlink_metadata(path.join(&found)) else { continue };
            let bytes = found.as_bytes();
            fields = fields
                .string(bytes)
                .string(&long_name(bytes, &metadata))
                .attributes(&(&metadata).into());
            count += 1;
            if fields.fields().len() > NAMES_BYTES {
                break;
            }
        }
        let packet = Packet::answer(answer::NAME, id).u32(count).append(fields.fields());
        Ok((count > 0).then_some(packet))
    }
}

fn time((accessed, modified): (u32, u32)) -> (TimeSpec, TimeSpec) {
    (TimeSpec::new(accessed.into(), 0), TimeSpec::new(modified.into(), 0))
}

fn set_open(file: &File, to: &Attributes) -> Result<()> {
    if let Some(size) = to.size {
        file.set_len(size)?;
    }
    if let Some((uid, gid)) = to.owner {
        fchown(file.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    // After the owner, whose change clears the bits of set-uid.
    if let Some(mode) = to.mode {
        file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
    }
    if let Some(times) = to.times {
        let (accessed, modified) = time(times);
        futimens(file.as_fd(), &accessed, &modified)?;
    }
    Ok(())
}

/// Changes the attributes of a path; `follow`: of what a symbolic link at its end points to.
pub(super) fn set(path: &Path, to: &Attributes, follow: bool) -> Result<()> {
    if let Some(size) = to.size.filter(|_| follow) {
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        OpenOptions::new().write(true).custom_flags(flags.bits()).open(path)?.set_len(size)?;
    }
    if let Some((uid, gid)) = to.owner {
        let flags = if follow { AtFlags::empty() } else { AtFlags::AT_SYMLINK_NOFOLLOW };
        fchownat(AT_FDCWD, path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), flags)?;
    }
    // A link has no permission bits of its own.
    if let Some(mode) = to.mode.filter(|_| follow) {
        fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))?;
    }
    if let Some(times) = to.times {
        let (accessed, modified) = time(times);
        let flags =
            if follow { UtimensatFlags::FollowSymlink } else { UtimensatFlags::NoFollowSymlink };
        utimensat(AT_FDCWD, path, &accessed, &modified, flags)?;
    }
    Ok(())
}

pub(super) fn make_directory(path: &Path, new: &Attributes) -> Result<()> {
    Ok(DirBuilder::new().mode(new.mode.unwrap_or(0o777) & 0o7777).create(path)?)
}

/// Removes what is no directory.
pub(super) fn remove(path: &Path) -> Result<()> {
    Ok(fs::remove_file(path)?)
}

/// Renames, unless something has the new name.
pub(super) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
    match nix::fcntl::renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) {
        // A file system that does not know the flag.
        Err(Errno::EINVAL) if fs::symlink_metadata(to).is_err() => Ok(fs::rename(from, to)?),
        done => Ok(done?),
    }
}

/// Returns the absolute path without links; its last part need not exist.
pub(super) fn real_path(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error.into());
            };
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(fs::canonicalize(parent)?.join(name))
        }
        done => Ok(done?),
    }
}
