//! File operations, in a process of their own and as the requested user: the permission checks of
//! the sandbox's kernel decide what may be accessed, and a hanging file system blocks nothing else.
//!
//! Paths are resolved inside the sandbox and cannot lead out of it. Opening never blocks (a FIFO
//! without a writer), and only regular files are read or written.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    os::{
        fd::AsFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use archive::{Attributes, Destination, NewFile, Owner, Root, Rules};
use data_encoding::HEXLOWER;
use helper::{FileEntry, FileError, FileErrorKind, FileHead, FileKind, FileTask, More};
use nix::fcntl::OFlag;

use crate::users;

/// Longest line of a [`FileHead`], in bytes.
const HEAD_BYTES_MAX: u64 = 32 * 1024;
/// Bytes after which a list ends early: half of what the agent takes.
const LIST_BYTES: usize = 2 * 1024 * 1024;
/// Most bytes after the end of an archive. GNU tar pads to 10 KiB, or to what `--blocking-factor` says.
const PADDING_BYTES_MAX: u64 = 1024 * 1024;
/// Size of the I/O buffers, in bytes.
const CHUNK: usize = 64 * 1024;

/// Flags that open a directory without the permission to list it.
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY);

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
        FileTask::List { path, limit, after } => list(Path::new(path), *limit, after, out),
        FileTask::Remove { path, recursive } => remove(Path::new(path), *recursive, out),
        FileTask::Unpack { path, owner, keep_existing } => {
            unpack(Path::new(path), owner, *keep_existing, out)
        }
        FileTask::Pack { path } => pack(Path::new(path), out),
    }
}

struct Failure(FileError);

impl Failure {
    fn new(kind: FileErrorKind, message: impl Into<String>) -> Self {
        Self(FileError { kind, message: message.into(), written: None })
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

impl From<archive::Error> for Failure {
    fn from(error: archive::Error) -> Self {
        let message = error.to_string();
        match error {
            archive::Error::File { error, .. } => {
                let Self(failure) = error.into();
                Self(FileError { message, ..failure })
            }
            archive::Error::Invalid(_) => Self::new(FileErrorKind::Invalid, message),
            archive::Error::Stream(_) => Self::new(FileErrorKind::Failed, message),
        }
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

/// Writes file by file, each in one step. An error tells how many were written before it.
fn write_all(out: &mut impl Write) -> Result<(), Failure> {
    let mut input = BufReader::with_capacity(CHUNK, io::stdin().lock());
    let mut written = 0;
    loop {
        match write_next(&mut input) {
            Ok(true) => written += 1,
            Ok(false) => return line(out, &written),
            Err(Failure(error)) => {
                return Err(Failure(FileError { written: Some(written), ..error }));
            }
        }
    }
}

/// Writes the next file; false when there is none.
fn write_next(input: &mut impl BufRead) -> Result<bool, Failure> {
    let mut head = Vec::new();
    input.by_ref().take(HEAD_BYTES_MAX).read_until(b'\n', &mut head)?;
    if head.is_empty() {
        return Ok(false);
    }
    let head: FileHead = serde_json::from_slice(&head).map_err(io::Error::from)?;
    write_one(&head, input).at(Path::new(&head.path))?;
    Ok(true)
}

fn write_one(head: &FileHead, input: &mut impl Read) -> io::Result<()> {
    let path = Path::new(&head.path);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::IsADirectory.into());
    };
    fs::create_dir_all(dir)?;
    // A directory cannot be replaced; fail before its bytes are written for nothing.
    if fs::symlink_metadata(path).is_ok_and(|there| there.is_dir()) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let dir = OpenOptions::new().read(true).custom_flags(DIRECTORY.bits()).open(dir)?;
    let mut file = NewFile::create(dir.as_fd())?;
    let copied = io::copy(&mut input.take(head.size), &mut file)?;
    if copied < head.size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (mode, keep_mode) = (head.mode, head.keep_mode);
    file.place(name, &Attributes { mode, keep_mode, owner: None, modified: None })
}

/// Opens a regular file; never blocks on any other kind.
fn open(path: &Path) -> Result<(File, Metadata), Failure> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).at(path)?;
    let metadata = file.metadata().at(path)?;
    if metadata.is_file() {
        return Ok((file, metadata));
    }
    let what = if metadata.is_dir() { "a directory" } else { "a device, a pipe or a socket" };
    Err(Failure::new(FileErrorKind::Refused, format!("{} is {what}", path.display())))
}

fn read(path: &Path, offset: u64, length: u64, out: &mut impl Write) -> Result<(), Failure> {
    let (mut file, metadata) = open(path)?;
    line(out, &entry(path, &metadata))?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).at(path)?;
    }
    let length = if length == 0 { u64::MAX } else { length };
    io::copy(&mut file.take(length), out).at(path)?;
    Ok(())
}

fn list(path: &Path, limit: u32, after: &str, out: &mut impl Write) -> Result<(), Failure> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let after = HEXLOWER.decode(after.as_bytes()).map_err(|error| {
        let what = format!("the name after which the list goes on is not in hex: {error}");
        Failure::new(FileErrorKind::Invalid, what)
    })?;
    let after = OsString::from_vec(after);
    // The first `limit` of those after `after`, and one more: the directory may have millions.
    let mut names = BTreeSet::new();
    for found in fs::read_dir(path).at(path)? {
        let name = found.at(path)?.file_name();
        if name > after {
            names.insert(name);
            if names.len() > limit.saturating_add(1) {
                names.pop_last();
            }
        }
    }
    let (mut listed, mut bytes) = (0, 0);
    let mut last = OsString::new();
    for name in &names {
        if listed == limit || bytes > LIST_BYTES {
            return line(out, &More { more: true, after: HEXLOWER.encode(last.as_bytes()) });
        }
        let path = path.join(name);
        // The entry may have gone since the directory was read.
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            let text = serde_json::to_vec(&entry(&path, &metadata)).map_err(io::Error::from)?;
            bytes += text.len();
            out.write_all(&text)?;
            out.write_all(b"\n")?;
        }
        listed += 1;
        last.clone_from(name);
    }
    Ok(())
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

fn unpack(dir: &Path, owner: &str, keep: bool, out: &mut impl Write) -> Result<(), Failure> {
    let owner = match users::owner(owner) {
        Some(Some((uid, gid))) => Owner::Given(uid, gid),
        Some(None) if keep => Owner::Kept,
        Some(None) => Owner::Archive,
        None => {
            let what =
                format!("the sandbox has no owner {owner}: neither a user nor a group of it");
            return Err(Failure::new(FileErrorKind::Invalid, what));
        }
    };
    fs::create_dir_all(dir).at(dir)?;
    let rules = Rules { owner, keep_mode: keep, follow: true };
    let to = Destination { dir: dir.to_owned(), root: Root::Kept, is_new: false };
    let mut input = io::stdin().lock();
    let report = archive::unpack(&mut input, &rules, |_| Ok::<_, Failure>(to))?;
    read_padding(input)?;
    line(out, &report.entries)
}

/// Reads what follows the end of an archive, so that its sender can send it. Padding has an end: without a
/// bound, a sender could keep node and controller busy for ever with bytes that lead to nothing.
fn read_padding(input: impl Read) -> Result<(), Failure> {
    let read = io::copy(&mut input.take(PADDING_BYTES_MAX + 1), &mut io::sink())?;
    if read > PADDING_BYTES_MAX {
        let what = format!("more than {PADDING_BYTES_MAX} bytes follow the end of the archive");
        return Err(Failure::new(FileErrorKind::Invalid, what));
    }
    Ok(())
}

fn pack(path: &Path, out: &mut impl Write) -> Result<(), Failure> {
    let name = path.file_name().unwrap_or(".".as_ref());
    // What is left out stands in the archive itself.
    archive::pack(path, Path::new(name), out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_after_a_name_that_is_not_hex_is_refused() {
        for after in ["6", "6g", "2F"] {
            let mut out = Vec::new();
            let listed = list(Path::new("/"), 1, after, &mut out);
            let Err(Failure(error)) = listed else { panic!("{after} was read") };
            assert_eq!(error.kind, FileErrorKind::Invalid, "{after}");
            assert!(out.is_empty());
        }
    }

    #[test]
    fn padding_of_an_archive_is_read_and_an_endless_one_is_refused() {
        let padding = |bytes| read_padding(io::repeat(0).take(bytes));
        assert!(padding(0).is_ok());
        assert!(padding(PADDING_BYTES_MAX).is_ok());
        let Err(Failure(error)) = read_padding(io::repeat(0)) else { panic!("read for ever") };
        assert_eq!(error.kind, FileErrorKind::Invalid);
    }
}
