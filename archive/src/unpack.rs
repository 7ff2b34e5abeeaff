//! Unpacking: entry by entry, each whole or not at all.

use std::{
    cell::Cell,
    ffi::{OsStr, OsString},
    io::{self, Read, Write},
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::{
        stat::{
            FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, utimensat,
        },
        time::TimeSpec,
    },
    unistd::{fchownat, geteuid, linkat, symlinkat},
};
use tar::{Archive, Entry, EntryType};

use crate::{
    LEFT_OUT, LEFT_OUT_MAX,
    error::{At, Error},
    new_file::{Attributes, MODE, NewFile, ids, kind, look, not_owned, put},
    tree::Tree,
};

/// Size of the buffer for the content of files, in bytes.
const CHUNK: usize = 64 * 1024;
/// Longest comment that is read, in bytes: a path, and what it is.
const COMMENT_BYTES_MAX: u64 = 8 * 1024;
/// Permission bits that a file keeps with its owner only: as somebody else's program it must not
/// become ours.
const SET_ID: u32 = 0o6000;
/// Longest header of an entry, with its long names and extensions, and what is passed over before it.
const HEADER_BYTES_MAX: u64 = 1024 * 1024;
/// Longest path of an entry, bytes: no file has a longer one. Its parts are made one by one, so a header of nothing
/// but names would make half a million directories.
const PATH_BYTES_MAX: usize = 4096;
/// Refusal of a sparse file.
const SPARSE: &str = "is a sparse file: pack it without `--sparse`";

/// Rules for what is written.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Owner of what is written.
    pub owner: Owner,
    /// Whether what is written over keeps its permission bits.
    pub keep_mode: bool,
    /// A directory goes into the target of a link to a directory that stands in its place, and the
    /// link stays. Never a link that the archive itself brought.
    pub follow: bool,
}

/// Owner of what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The owner of what is written over; for what is new, the user who unpacks.
    Kept,
    /// As the archive says, where root unpacks; `Kept` otherwise.
    Archive,
    /// User and group of everything that is written.
    Given(u32, u32),
}

/// First entry of an archive, by which its destination is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct First {
    /// First part of its path; `None` for the directory itself (`./`).
    pub name: Option<OsString>,
    /// True for a directory.
    pub is_dir: bool,
}

/// Place of the entries of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// Directory, which exists.
    pub dir: PathBuf,
    /// First part of the entries' paths in it.
    pub root: Root,
    /// True when the directory was made for this archive: it gets the attributes of the root.
    pub is_new: bool,
}

/// Change of the first part of the entries' paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// Paths stay as they are.
    Kept,
    /// All paths begin with the same part, which becomes this one.
    Named(OsString),
    /// All paths begin with the same part, which is dropped.
    Dropped,
}

/// Result of unpacking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Number of entries.
    pub entries: u64,
    /// Files that the archive could not hold, and why: at most [`LEFT_OUT_MAX`] lines.
    pub left_out: Vec<String>,
}

/// Unpacks an archive; `place` chooses the destination by the first entry.
///
/// # Errors
/// When the archive is not valid or not whole, or something cannot be written. What was unpacked
/// before stays; each file is whole.
pub fn unpack<E: From<Error>>(
    input: impl Read,
    rules: &Rules,
    place: impl FnOnce(&First) -> Result<Destination, E>,
) -> Result<Report, E> {
    let state = Rc::new(Cell::new(State::Flows));
    let left = Rc::new(Cell::new(u64::MAX));
    let source = Source { input, state: Rc::clone(&state), left: Rc::clone(&left) };
    let mut archive = Archive::new(source);
    let broken = |error: io::Error| match state.get() {
        State::Failed => Error::Stream(error),
        State::Ended => Error::Invalid("it breaks off".into()),
        State::Flows => Error::Invalid(error.to_string()),
    };
    let mut place = Some(place);
    let mut unpacker: Option<Unpacker> = None;
    let mut report = Report { entries: 0, left_out: Vec::new() };
    let mut entries = archive.entries().map_err(broken)?;
    loop {
        // The reader keeps a header in memory, whatever length it has.
        left.set(HEADER_BYTES_MAX);
        let Some(entry) = entries.next() else { break };
        left.set(u64::MAX);
        let mut entry = entry.map_err(broken)?;
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            if report.left_out.len() < LEFT_OUT_MAX {
                report.left_out.extend(left_out(&mut entry));
            }
            continue;
        }
        let path = relative(&entry.path().map_err(broken)?)?;
        if let Some(place) = place.take() {
            let name = path.iter().next().map(OsStr::to_owned);
            let is_dir = entry.header().entry_type() == EntryType::Directory;
            let first = First { name, is_dir };
            unpacker = Some(Unpacker::new(*rules, place(&first)?, first)?);
        }
        if let Some(unpacker) = &mut unpacker {
            unpacker.entry(&mut entry, &path, &broken)?;
        }
        report.entries += 1;
    }
    // Without its mark at the end, some of the archive may be missing.
    if state.get() == State::Ended {
        return Err(Error::Invalid("it breaks off".into()).into());
    }
    if let Some(unpacker) = unpacker {
        unpacker.finish()?;
    }
    Ok(report)
}

/// State of the stream of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Flows,
    /// Its end was read, which is past the end of a whole archive.
    Ended,
    Failed,
}

/// Stream of an archive, which notes how it ended.
struct Source<R> {
    input: R,
    state: Rc<Cell<State>>,
    /// Bytes that may be read now.
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 && !buffer.is_empty() {
            return Err(io::Error::other("a header is too long"));
        }
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let read = self.input.read(&mut buffer[..most]);
        if let Ok(read) = &read
            && left < u64::MAX
        {
            self.left.set(left - *read as u64);
        }
        match &read {
            Ok(0) if !buffer.is_empty() => self.state.set(State::Ended),
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.state.set(State::Failed);
            }
            _ => {}
        }
        read
    }
}

/// Returns the path of an entry without `.`; refuses one that leads elsewhere, or is too long for a file.
fn relative(path: &Path) -> Result<PathBuf, Error> {
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(Error::Invalid(format!("a path in it has more than {PATH_BYTES_MAX} bytes")));
    }
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::ParentDir => {
                let why = "leads out of the destination";
                return Err(Error::Invalid(format!("{} {why}", path.display())));
            }
        }
    }
    Ok(plain)
}

/// Reads the comment that names a file which is not in the archive.
fn left_out(entry: &mut Entry<'_, impl Read>) -> Option<String> {
    let mut bytes = Vec::new();
    entry.take(COMMENT_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let comment =
        tar::PaxExtensions::new(&bytes).flatten().find(|e| e.key_bytes() == b"comment")?;
    let text = String::from_utf8_lossy(comment.value_bytes()).into_owned();
    text.strip_prefix(LEFT_OUT).map(str::to_owned)
}

/// Whether an entry is a sparse file in the way of pax, whose content is not that of the file.
fn is_sparse(entry: &mut Entry<'_, impl Read>) -> io::Result<bool> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(false) };
    for extension in extensions {
        if extension?.key_bytes().starts_with(b"GNU.sparse.") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Attributes of an entry.
#[derive(Debug, Clone, Copy)]
struct Header {
    mode: u32,
    owner: Option<(u32, u32)>,
    modified: i64,
}

/// Directory that gets its attributes last: a read-only one must not block its content.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    header: Header,
    is_new: bool,
}

struct Unpacker {
    rules: Rules,
    root: Root,
    is_new: bool,
    first: First,
    tree: Tree,
    directories: Vec<Directory>,
}

impl Unpacker {
    fn new(mut rules: Rules, to: Destination, first: First) -> Result<Self, Error> {
        if rules.owner == Owner::Archive && !geteuid().is_root() {
            rules.owner = Owner::Kept;
        }
        let tree = Tree::open(&to.dir, rules.follow)?;
        let Destination { root, is_new, .. } = to;
        Ok(Self { rules, root, is_new, first, tree, directories: Vec::new() })
    }

    /// Maps the path of an entry to its place below the destination.
    fn placed(&self, path: &Path) -> Result<PathBuf, Error> {
        let name = match (&self.root, &self.first.name) {
            (Root::Kept, _) => return Ok(path.to_owned()),
            (Root::Named(name), _) => Some(name),
            (Root::Dropped, _) => None,
        };
        let rest = match &self.first.name {
            Some(first) => path.strip_prefix(first).map_err(|_| {
                let why = "does not belong to what was asked for";
                Error::Invalid(format!("{} {why}", path.display()))
            })?,
            None => path,
        };
        // Joined with nothing, a path would end with a slash.
        Ok(name
            .map(PathBuf::from)
            .into_iter()
            .chain([rest.to_owned()])
            .filter(|part| part != "")
            .collect())
    }

    fn header(&self, entry: &Entry<'_, impl Read>) -> Result<Header, Error> {
        let broken = |error: io::Error| Error::Invalid(error.to_string());
        let header = entry.header();
        let id = |id: io::Result<u64>| {
            u32::try_from(id.map_err(broken)?).map_err(|_| Error::Invalid("an owner".into()))
        };
        let owner = match self.rules.owner {
            Owner::Kept => None,
            Owner::Archive => Some((id(header.uid())?, id(header.gid())?)),
            Owner::Given(uid, gid) => Some((uid, gid)),
        };
        let mode = header.mode().map_err(broken)? & MODE;
        let is_file = header.entry_type() != EntryType::Directory;
        let mode =
            if is_file && self.rules.owner != Owner::Archive { mode & !SET_ID } else { mode };
        let modified = header.mtime().map_err(broken)?;
        Ok(Header { mode, owner, modified: i64::try_from(modified).unwrap_or_default() })
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "what is not known is refused")]
    fn entry(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        path: &Path,
        broken: &impl Fn(io::Error) -> Error,
    ) -> Result<(), Error> {
        let path = self.placed(path)?;
        let header = self.header(entry)?;
        let invalid = |why: &str| Error::Invalid(format!("{} {why}", path.display()));
        let kind = entry.header().entry_type();
        let Some(name) = path.file_name() else {
            if kind != EntryType::Directory {
                return Err(invalid("has no name"));
            }
            let is_new = self.is_new;
            self.directories.push(Directory { path, header, is_new });
            return Ok(());
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        match kind {
            EntryType::Directory => self.directory(&path, parent, name, header),
            // A line of a sparse map may stand for any number of zeros.
            EntryType::GNUSparse => Err(invalid(SPARSE)),
            EntryType::Regular | EntryType::Continuous => {
                if is_sparse(entry).map_err(broken)? {
                    return Err(invalid(SPARSE));
                }
                self.file(entry, (&path, parent, name), header, broken)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or_else(|| invalid("has no target"))?;
                let target = std::os::unix::ffi::OsStrExt::from_bytes(&target);
                self.symlink(target, (&path, parent, name), header)
            }
            EntryType::Link => {
                let target = entry.link_name().map_err(broken)?;
                let target = target.ok_or_else(|| invalid("has no target"))?;
                let target = self.placed(&relative(&target)?)?;
                self.link(&target, (&path, parent, name))
            }
            _ => Err(invalid("is a device, a pipe or something unknown")),
        }
    }

    fn directory(
        &mut self,
        path: &Path,
        parent: &Path,
        name: &OsStr,
        header: Header,
    ) -> Result<(), Error> {
        let at = self.tree.enter(parent, true)?;
        let is_new = match mkdirat(&*at, name, Mode::S_IRWXU) {
            Ok(()) => {
                // Whoever unpacks may write into it until the end. The rest it gets at once: a copy
                // that is repeated takes it for one that was there.
                let mode = Mode::from_bits_truncate(header.mode & 0o777) | Mode::S_IRWXU;
                fchmodat(&*at, name, mode, FchmodatFlags::NoFollowSymlink)
                    .at(&self.tree.whole(path))?;
                true
            }
            Err(Errno::EEXIST) => {
                let about = look(at.as_fd(), name).at(&self.tree.whole(path))?;
                let is_dir = about.as_ref().is_some_and(|about| kind(about) == SFlag::S_IFDIR);
                let is_new = about.as_ref().is_some_and(|about| self.tree.has_made(about));
                if about.is_some_and(|about| self.tree.leads_on(at.as_fd(), name, &about)) {
                    // The link stays, and so does what it leads to.
                    return Ok(());
                }
                if !is_dir {
                    let why = "a directory does not replace what is none";
                    let path = self.tree.whole(path);
                    return Err(Error::refused(&path, io::ErrorKind::NotADirectory, why));
                }
                is_new
            }
            Err(errno) => return Err(errno).at(&self.tree.whole(path)),
        };
        self.directories.push(Directory { path: path.to_owned(), header, is_new });
        Ok(())
    }

    fn file(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        (path, parent, name): (&Path, &Path, &OsStr),
        header: Header,
        broken: &impl Fn(io::Error) -> Error,
    ) -> Result<(), Error> {
        let at = self.tree.enter(parent, true)?;
        let whole = self.tree.whole(path);
        // Before its bytes are written for nothing.
        self.no_directory(look(at.as_fd(), name).at(&whole)?.as_ref(), &whole)?;
        let mut file = NewFile::create(at.as_fd()).at(&whole)?;
        let (mut buffer, mut left) = (vec![0; CHUNK], entry.size());
        while left > 0 {
            let read = entry.read(&mut buffer).map_err(broken)?;
            if read == 0 {
                return Err(broken(io::ErrorKind::UnexpectedEof.into()));
            }
            file.write_all(&buffer[..read]).at(&whole)?;
            left = left.saturating_sub(read as u64);
        }
        let attributes = Attributes {
            mode: header.mode,
            keep_mode: self.rules.keep_mode,
            owner: header.owner,
            modified: Some(header.modified),
        };
        file.place(name, &attributes).at(&whole)
    }

    /// Refuses to replace a directory, or something that is no file.
    fn no_directory(&self, about: Option<&FileStat>, path: &Path) -> Result<(), Error> {
        if about.is_some_and(|about| {
            !matches!(kind(about), SFlag::S_IFDIR | SFlag::S_IFREG | SFlag::S_IFLNK)
        }) {
            let why = "it is a device, a pipe or a socket, which is not replaced";
            return Err(Error::refused(path, io::ErrorKind::PermissionDenied, why));
        }
        if about.is_some_and(|about| kind(about) == SFlag::S_IFDIR) {
            let why = "it is a directory, which only a directory can be copied onto";
            return Err(Error::refused(path, io::ErrorKind::IsADirectory, why));
        }
        Ok(())
    }

    fn symlink(
        &mut self,
        target: &OsStr,
        (path, parent, name): (&Path, &Path, &OsStr),
        header: Header,
    ) -> Result<(), Error> {
        let at = self.tree.enter(parent, true)?;
        let whole = self.tree.whole(path);
        let before = look(at.as_fd(), name).at(&whole)?;
        self.no_directory(before.as_ref(), &whole)?;
        put(at.as_fd(), name, |name| symlinkat(target, &*at, name)).at(&whole)?;
        let Some(made) = look(at.as_fd(), name).at(&whole)? else { return Ok(()) };
        self.tree.bring(&made);
        let nofollow = AtFlags::AT_SYMLINK_NOFOLLOW;
        if let Some(owner) = header.owner {
            let (uid, gid) = ids(owner);
            let owned = fchownat(&*at, name, uid, gid, nofollow);
            owned.map_err(|errno| not_owned(owner, errno)).at(&whole)?;
        } else if let Some(before) = before.filter(|before| kind(before) == SFlag::S_IFLNK) {
            let (uid, gid) = ids((before.st_uid, before.st_gid));
            // As with files: only root gives them away.
            fchownat(&*at, name, uid, gid, nofollow).ok();
        }
        let modified = TimeSpec::new(header.modified, 0);
        let flag = UtimensatFlags::NoFollowSymlink;
        utimensat(&*at, name, &TimeSpec::UTIME_OMIT, &modified, flag).at(&whole)
    }

    fn link(
        &mut self,
        target: &Path,
        (path, parent, name): (&Path, &Path, &OsStr),
    ) -> Result<(), Error> {
        let whole = self.tree.whole(path);
        let Some(target_name) = target.file_name() else {
            return Err(Error::Invalid(format!("{} is a link to a directory", path.display())));
        };
        let from = self.tree.enter(target.parent().unwrap_or(Path::new("")), false)?;
        let at = self.tree.enter(parent, true)?;
        let there = look(from.as_fd(), target_name).at(&whole)?;
        let before = look(at.as_fd(), name).at(&whole)?;
        self.no_directory(before.as_ref(), &whole)?;
        if let (Some(there), Some(before)) = (&there, &before)
            && (there.st_dev, there.st_ino) == (before.st_dev, before.st_ino)
        {
            return Ok(());
        }
        put(at.as_fd(), name, |name| linkat(&*from, target_name, &*at, name, AtFlags::empty()))
            .at(&whole)
    }

    /// Gives the directories their attributes, the deepest first.
    fn finish(mut self) -> Result<(), Error> {
        let directories = std::mem::take(&mut self.directories);
        for Directory { path, header, is_new } in directories.iter().rev() {
            let whole = self.tree.whole(path);
            let at = self.tree.enter(path.parent().unwrap_or(Path::new("")), false)?;
            let name = path.file_name().unwrap_or(OsStr::new("."));
            if let Some(owner) = header.owner {
                let (uid, gid) = ids(owner);
                let owned = fchownat(&*at, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW);
                owned.map_err(|errno| not_owned(owner, errno)).at(&whole)?;
            }
            if *is_new || !self.rules.keep_mode {
                let mode = Mode::from_bits_truncate(header.mode);
                fchmodat(&*at, name, mode, FchmodatFlags::NoFollowSymlink).at(&whole)?;
                let modified = TimeSpec::new(header.modified, 0);
                let flag = UtimensatFlags::NoFollowSymlink;
                utimensat(&*at, name, &TimeSpec::UTIME_OMIT, &modified, flag).at(&whole)?;
            }
        }
        Ok(())
    }
}
