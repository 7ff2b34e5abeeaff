//! File operations, in a process of their own and as the requested user: the permission checks of
//! the sandbox's kernel decide what may be accessed, and a hanging file system blocks nothing else.
//!
//! Paths are resolved inside the sandbox and cannot lead out of it. Opening never blocks (a FIFO
//! without a writer), and only regular files are read or written.

use std::{
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use helper::{FileEntry, FileError, FileErrorKind, FileHead, FileKind, FileTask};
use rustix::fs::OFlags;
use tar::EntryType;

/// Longest line of a [`FileHead`], in bytes.
const HEAD_BYTES_MAX: u64 = 32 * 1024;
/// Most entries of a directory that are read to find the first ones by name.
const ENTRIES_MAX: usize = 100_000;
/// Size of the I/O buffers, in bytes.
const CHUNK: usize = 64 * 1024;

/// Runs a file operation. Returns the exit code.
pub(crate) fn run(task: &FileTask) -> u8 {
    let mut out = BufWriter::with_capacity(CHUNK, io::stdout().lock());
    let done = dispatch(task, &mut out).and_then(|()| out.flush().map_err(Failure::from));
    let Err(Failure(error)) = done else { return 0 };
    let text = serde_json::to_vec(&error).unwrap_or_default();
    // The reader may have gone.
    drop(io::stderr().write_all(&text));
    1
}

fn dispatch(task: &FileTask, out: &mut impl Write) -> Result<(), Failure> {
    match task {
        FileTask::Write => write_all(out),
        FileTask::Read { path, offset, length } => read(Path::new(path), *offset, *length, out),
        FileTask::Stat { path } => {
            let path = Path::new(path);
            line(out, &entry(path, &fs::symlink_metadata(path)?))
        }
        FileTask::List { path, limit } => list(Path::new(path), *limit, out),
        FileTask::Remove { path, recursive } => remove(Path::new(path), *recursive, out),
        FileTask::Unpack { path } => unpack(Path::new(path), out),
        FileTask::Pack { path } => pack(Path::new(path), out),
    }
}

struct Failure(FileError);

impl Failure {
    fn new(kind: FileErrorKind, message: impl Into<String>) -> Self {
        Self(FileError { kind, message: message.into() })
    }
}

impl From<io::Error> for Failure {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the standard library's, and many")]
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as K;
        let kind = match error.kind() {
            K::NotFound => FileErrorKind::NotFound,
            K::StorageFull | K::QuotaExceeded => FileErrorKind::Full,
            K::PermissionDenied
            | K::IsADirectory
            | K::NotADirectory
            | K::DirectoryNotEmpty
            | K::AlreadyExists
            | K::ReadOnlyFilesystem
            | K::ResourceBusy => FileErrorKind::Refused,
            _ => FileErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

trait At<T> {
    /// Adds the path to the error message.
    fn at(self, path: &Path) -> Result<T, Failure>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, Failure> {
        self.map_err(|error| {
            let mut causes = String::new();
            let mut cause = error.get_ref().and_then(|inner| inner.source());
            while let Some(error) = cause {
                causes = format!("{causes}: {error}");
                cause = error.source();
            }
            let Failure(mut told) = Failure::from(error);
            told.message = format!("{}: {}{causes}", path.display(), told.message);
            Failure(told)
        })
    }
}

fn line(out: &mut impl Write, value: &impl serde::Serialize) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    Ok(out.write_all(b"\n")?)
}

fn entry(path: &Path, metadata: &Metadata) -> FileEntry {
    let kind = metadata.file_type();
    let name = path.file_name().unwrap_or(path.as_os_str());
    let target =
        if kind.is_symlink() { fs::read_link(path).unwrap_or_default() } else { PathBuf::new() };
    FileEntry {
        name: name.to_string_lossy().into_owned(),
        kind: if kind.is_file() {
            FileKind::File
        } else if kind.is_dir() {
            FileKind::Directory
        } else if kind.is_symlink() {
            FileKind::Symlink
        } else {
            FileKind::Special
        },
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_ms: metadata.mtime().saturating_mul(1000) + metadata.mtime_nsec() / 1_000_000,
        target: target.to_string_lossy().into_owned(),
    }
}

/// Writes each file under a temporary name in its directory, then renames it in one step.
fn write_all(out: &mut impl Write) -> Result<(), Failure> {
    let mut input = BufReader::with_capacity(CHUNK, io::stdin().lock());
    let mut written = 0u32;
    loop {
        let mut head = Vec::new();
        input.by_ref().take(HEAD_BYTES_MAX).read_until(b'\n', &mut head)?;
        if head.is_empty() {
            return line(out, &written);
        }
        let head: FileHead = serde_json::from_slice(&head).map_err(io::Error::from)?;
        write_one(&head, written, &mut input).at(Path::new(&head.path))?;
        written += 1;
    }
}

fn write_one(head: &FileHead, number: u32, input: &mut impl Read) -> io::Result<()> {
    let path = Path::new(&head.path);
    let dir = path.parent().ok_or(io::ErrorKind::IsADirectory)?;
    fs::create_dir_all(dir)?;
    // A directory cannot be replaced; fail before its bytes are written for nothing.
    if fs::symlink_metadata(path).is_ok_and(|there| there.is_dir()) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let beside = dir.join(format!(".pve-sandbox-{}-{number}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(flags(OFlags::NOFOLLOW))
        .open(&beside)?;
    let mut place = || {
        let copied = io::copy(&mut input.take(head.size), &mut file)?;
        if copied < head.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.set_permissions(Permissions::from_mode(head.mode))?;
        fs::rename(&beside, path)
    };
    place().inspect_err(|_| drop(fs::remove_file(&beside)))
}

fn flags(flags: OFlags) -> i32 {
    i32::try_from(flags.bits()).unwrap_or_default()
}

/// Opens a regular file; never blocks on any other kind.
fn open(path: &Path, more: OFlags) -> Result<(File, Metadata), Failure> {
    let flags = flags(OFlags::NONBLOCK | OFlags::NOCTTY | more);
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).at(path)?;
    let metadata = file.metadata().at(path)?;
    if metadata.is_file() {
        return Ok((file, metadata));
    }
    let what = if metadata.is_dir() { "a directory" } else { "a device, a pipe or a socket" };
    Err(Failure::new(FileErrorKind::Refused, format!("{} is {what}", path.display())))
}

fn read(path: &Path, offset: u64, length: u64, out: &mut impl Write) -> Result<(), Failure> {
    let (mut file, metadata) = open(path, OFlags::empty())?;
    line(out, &entry(path, &metadata))?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).at(path)?;
    }
    let length = if length == 0 { u64::MAX } else { length };
    io::copy(&mut file.take(length), out).at(path)?;
    Ok(())
}

fn list(path: &Path, limit: u32, out: &mut impl Write) -> Result<(), Failure> {
    let mut names = Vec::new();
    for found in fs::read_dir(path).at(path)?.take(ENTRIES_MAX) {
        names.push(found.at(path)?.file_name());
    }
    names.sort_unstable();
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = names.len() > limit;
    for name in names.into_iter().take(limit) {
        let path = path.join(name);
        // The entry may have gone since the directory was read.
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            line(out, &entry(&path, &metadata))?;
        }
    }
    if more { Ok(out.write_all(b"{\"more\":true}\n")?) } else { Ok(()) }
}

fn remove(path: &Path, recursive: bool, out: &mut impl Write) -> Result<(), Failure> {
    let removed = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() && recursive => fs::remove_dir_all(path),
        Ok(there) if there.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => line(out, &true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => line(out, &false),
        Err(error) => Err(error).at(path),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "what is not known is refused")]
fn unpack(dir: &Path, out: &mut impl Write) -> Result<(), Failure> {
    fs::create_dir_all(dir).at(dir)?;
    let mut archive = tar::Archive::new(io::stdin().lock());
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    let mut entries = 0u64;
    let broken = |error: io::Error| Failure::new(FileErrorKind::Invalid, error.to_string());
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let invalid = |why: &str| {
            Failure::new(FileErrorKind::Invalid, format!("entry {}: {why}", path.display()))
        };
        if !stays_inside(&path) {
            return Err(invalid("its path leads out of the directory"));
        }
        match entry.header().entry_type() {
            EntryType::Link => {
                let target = entry.link_name().map_err(broken)?.unwrap_or_default();
                if !stays_inside(&target) {
                    return Err(invalid("a hard link that leads out of the directory"));
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {}
            EntryType::Directory | EntryType::Symlink => {}
            EntryType::XGlobalHeader | EntryType::XHeader => continue,
            _ => return Err(invalid("a device, a pipe, or something unknown")),
        }
        // Also refuses to write through a link that leads out.
        if !entry.unpack_in(dir).at(&path)? {
            return Err(invalid("its path leads out of the directory"));
        }
        entries += 1;
    }
    line(out, &entries)
}

fn stays_inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

fn pack(path: &Path, out: &mut impl Write) -> Result<(), Failure> {
    let name = PathBuf::from(path.file_name().unwrap_or(".".as_ref()));
    // Like `cp`, follow the path if it is a link. Do this first: once begun, an archive is always
    // completed, whatever fails later.
    let mut left = vec![(fs::canonicalize(path).at(path)?, name)];
    let mut archive = tar::Builder::new(out);
    while let Some((path, name)) = left.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // Gone since its directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).at(&path),
        };
        if metadata.is_dir() {
            for found in fs::read_dir(&path).at(&path)? {
                let found = found.at(&path)?.file_name();
                left.push((path.join(&found), name.join(&found)));
            }
        }
        append(&mut archive, &path, &name, &metadata)?;
    }
    archive.finish()?;
    Ok(())
}

fn append(
    archive: &mut tar::Builder<&mut impl Write>,
    path: &Path,
    name: &Path,
    metadata: &Metadata,
) -> Result<(), Failure> {
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    let kind = metadata.file_type();
    if kind.is_dir() {
        header.set_size(0);
        archive.append_data(&mut header, name, io::empty()).at(path)
    } else if kind.is_symlink() {
        header.set_size(0);
        let target = fs::read_link(path).at(path)?;
        archive.append_link(&mut header, name, target).at(path)
    } else if kind.is_file() {
        // The path is opened again: by now it may be something else, which `open` refuses.
        let (file, metadata) = open(path, OFlags::NOFOLLOW)?;
        header.set_metadata(&metadata);
        // A file that shrinks while it is read must not shift the entries after it.
        let size = metadata.len();
        archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(size)).at(path)
    } else {
        // Devices, pipes and sockets mean nothing elsewhere.
        Ok(())
    }
}
