//! Packing: a file, or a directory with everything in it.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use tar::{Builder, EntryType, Header};

use crate::{
    LEFT_OUT,
    error::{At, Error},
    new_file::MODE,
};

/// Most files that are named as left out.
pub const LEFT_OUT_MAX: usize = 100;
/// Most bytes of a file that says that it is empty and is not: files of /proc, which are made while
/// they are read.
const UNSIZED_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Most bytes of a file that may have fewer than it says: files of /sys all have 4096.
const VAGUE_BYTES_MAX: u64 = 64 * 1024;
/// Longest target of a link that fits into the header of its entry.
const TARGET_BYTES_MAX: usize = 100;

/// Packs a path under a name into a tar archive. Returns what the archive cannot hold, and why; the
/// archive itself names these, too. A symbolic link is packed as a link, also at the path itself,
/// unless the path ends with a slash.
///
/// # Errors
/// When something cannot be read, or is no regular file, directory or link at the path itself. The
/// archive then has no end.
pub fn pack(from: &Path, name: &Path, out: impl Write) -> Result<Vec<String>, Error> {
    let archive = Builder::new(Gate { out, is_open: true });
    let mut packer = Packer { archive, links: HashMap::new(), left_out: Vec::new(), more: 0 };
    let packed = packer.tree(from, name).and_then(|()| packer.more());
    if let Err(error) = packed {
        // The builder writes the end of an archive when it is dropped.
        packer.archive.get_mut().is_open = false;
        return Err(error);
    }
    let mut out = packer.archive.into_inner().map_err(Error::Stream)?;
    out.flush().map_err(Error::Stream)?;
    Ok(packer.left_out)
}

/// Output that can be shut.
struct Gate<W> {
    out: W,
    is_open: bool,
}

impl<W: Write> Write for Gate<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_open { self.out.write(bytes) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.is_open { self.out.flush() } else { Ok(()) }
    }
}

/// Content of a file, which notes whether it was the file that failed.
struct Content<R> {
    file: R,
    left: u64,
    error: Option<io::Error>,
}

impl<R: Read> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = match self.file.read(&mut buffer[..room]) {
            Ok(0) => Err(shorter()),
            read => read,
        };
        match read {
            Ok(read) => {
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.error = Some(error);
                Err(io::ErrorKind::Other.into())
            }
        }
    }
}

struct Packer<W: Write> {
    archive: Builder<Gate<W>>,
    /// Name of the first entry of each file that has several names, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    left_out: Vec<String>,
    /// Number of files that are left out and not named.
    more: usize,
}

impl<W: Write> Packer<W> {
    fn tree(&mut self, from: &Path, name: &Path) -> Result<(), Error> {
        let root = fs::symlink_metadata(from).at(from)?;
        if !(root.is_dir() || root.is_file() || root.is_symlink()) {
            let why = "it is a device, a pipe or a socket";
            return Err(Error::refused(from, io::ErrorKind::PermissionDenied, why));
        }
        let mut left = vec![(from.to_owned(), name.to_owned())];
        while let Some((path, name)) = left.pop() {
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                // Gone since its directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != from => continue,
                Err(error) => return Err(error).at(&path),
            };
            if metadata.is_dir() {
                let mut names = names(&path).at(&path)?;
                names.sort_unstable_by(|a, b| b.cmp(a));
                left.extend(names.into_iter().map(|found| (path.join(&found), name.join(&found))));
            }
            self.entry(&path, &name, &metadata)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), Error> {
        let kind = metadata.file_type();
        if kind.is_dir() {
            let mut header = header(metadata, EntryType::Directory, 0);
            return self.archive.append_data(&mut header, name, io::empty()).map_err(Error::Stream);
        }
        if kind.is_symlink() {
            let target = fs::read_link(path).at(path)?;
            let mut header = header(metadata, EntryType::Symlink, 0);
            return self.link(&mut header, name, &target);
        }
        if kind.is_file() {
            return self.file(path, name);
        }
        let what = if kind.is_socket() {
            "a socket"
        } else if kind.is_fifo() {
            "a pipe"
        } else {
            "a device"
        };
        if self.left_out.len() == LEFT_OUT_MAX {
            self.more += 1;
            return Ok(());
        }
        self.left_out.push(format!("{} ({what})", path.display()));
        self.comment()
    }

    /// Counts what is left out beyond those that are named.
    fn more(&mut self) -> Result<(), Error> {
        if self.more == 0 {
            return Ok(());
        }
        if let Some(last) = self.left_out.last_mut() {
            *last = format!("{last}, and {} more", self.more);
        }
        self.comment()
    }

    /// Writes the last of what is left out as a comment, which other programs pass over.
    fn comment(&mut self) -> Result<(), Error> {
        let Some(text) = self.left_out.last() else { return Ok(()) };
        // A line feed ends a record.
        let record = pax_record("comment", &format!("{LEFT_OUT}{}", text.replace('\n', "\\n")));
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XGlobalHeader);
        header.set_path("pax_global_header").map_err(Error::Stream)?;
        header.set_size(record.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        self.archive.append(&header, record.as_bytes()).map_err(Error::Stream)
    }

    fn link(&mut self, header: &mut Header, name: &Path, target: &Path) -> Result<(), Error> {
        let linked = if target.as_os_str().len() <= TARGET_BYTES_MAX {
            // Byte by byte, as it stands: the other way normalises it.
            header
                .set_link_name_literal(target.as_os_str().as_bytes())
                .and_then(|()| self.archive.append_data(header, name, io::empty()))
        } else {
            self.archive.append_link(header, name, target)
        };
        linked.map_err(Error::Stream)
    }

    fn file(&mut self, path: &Path, name: &Path) -> Result<(), Error> {
        // By now the path may be something else. Opening never blocks.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).at(path)?;
        let metadata = file.metadata().at(path)?;
        if !metadata.is_file() {
            let why = "it became something else while it was copied";
            return Err(Error::refused(path, io::ErrorKind::PermissionDenied, why));
        }
        if metadata.nlink() > 1 {
            let own = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&own).cloned() {
                let mut header = header(&metadata, EntryType::Link, 0);
                return self.link(&mut header, name, &first);
            }
            self.links.insert(own, name.to_owned());
        }
        let size = metadata.len();
        if size > VAGUE_BYTES_MAX {
            return self.content(file, size, (path, name), &metadata);
        }
        let bytes = whole(&file, size).at(path)?;
        // Those of /sys have a size, no blocks, and less to say.
        if (bytes.len() as u64) < size && metadata.blocks() > 0 {
            return Err(shorter()).at(path);
        }
        self.content(&*bytes, bytes.len() as u64, (path, name), &metadata)
    }

    fn content(
        &mut self,
        file: impl Read,
        size: u64,
        (path, name): (&Path, &Path),
        metadata: &Metadata,
    ) -> Result<(), Error> {
        let mut header = header(metadata, EntryType::Regular, size);
        let mut content = Content { file, left: size, error: None };
        let appended = self.archive.append_data(&mut header, name, &mut content);
        match content.error {
            Some(error) => Err(error).at(path),
            None => appended.map_err(Error::Stream),
        }
    }
}

fn shorter() -> io::Error {
    io::Error::other("it became shorter while it was copied")
}

fn names(dir: &Path) -> io::Result<Vec<OsString>> {
    fs::read_dir(dir)?.map(|found| Ok(found?.file_name())).collect()
}

/// Reads a file whose size is not to be relied on.
fn whole(file: &File, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let max = if size == 0 { UNSIZED_BYTES_MAX } else { size };
    file.take(max).read_to_end(&mut bytes)?;
    if size == 0 && bytes.len() as u64 == max {
        let why = "it says that it is empty, and does not end within 16 MiB";
        return Err(io::Error::other(why));
    }
    Ok(bytes)
}

fn header(metadata: &Metadata, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.mode() & MODE);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or_default());
    header.set_size(size);
    header
}

/// Encodes a record of a pax header. Its length counts itself.
fn pax_record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let mut digits = 1;
    while (rest + digits).to_string().len() > digits {
        digits += 1;
    }
    format!("{} {key}={value}\n", rest + digits)
}
