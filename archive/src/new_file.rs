//! A file that appears under its name in one step, when it is whole.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat},
    sys::{
        stat::{FileStat, Mode, SFlag, fchmod, fstatat, futimens},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, linkat, unlinkat},
};

/// Permission bits with which a program takes on the owner of its file.
const SET_ID: u32 = 0o6000;
/// Most names that are tried for a file that is to be renamed.
const TRIES: usize = 100;

/// Attributes of a new file.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Leaves the permission bits of the file that is replaced, if there is one.
    pub keep_mode: bool,
    /// Owner and group; `None` leaves those of the file that is replaced, or else ours.
    pub owner: Option<(u32, u32)>,
    /// Time of the last change, in seconds since 1970; `None` means now.
    pub modified: Option<i64>,
}

/// File without a name, which gets one with [`NewFile::place`]. It leaves nothing when it is dropped
/// before, and where the file system allows it, nothing when this process is killed.
#[derive(Debug)]
pub struct NewFile<'a> {
    dir: BorrowedFd<'a>,
    file: File,
    /// Name beside the place of the file, where the file system has no files without a name.
    beside: Beside<'a>,
}

/// Temporary name in a directory, which is removed when this is dropped.
#[derive(Debug)]
struct Beside<'a>(BorrowedFd<'a>, Option<OsString>);

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.1 {
            unlinkat(self.0, name.as_os_str(), UnlinkatFlags::NoRemoveDir).ok();
        }
    }
}

impl<'a> Beside<'a> {
    /// Makes something under a name that nothing has.
    fn make<T>(
        dir: BorrowedFd<'a>,
        mut make: impl FnMut(&OsStr) -> nix::Result<T>,
    ) -> nix::Result<(Self, T)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        for _ in 0..TRIES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = OsString::from(format!(".pve-sandbox-{}-{number}", std::process::id()));
            match make(&name) {
                Err(Errno::EEXIST) => {}
                Ok(made) => return Ok((Self(dir, Some(name)), made)),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EEXIST)
    }

    /// Renames it. Between two names of one file that does nothing, and the temporary one goes.
    fn rename(self, name: &OsStr) -> nix::Result<()> {
        let Some(own) = &self.1 else { return Ok(()) };
        renameat(self.0, own.as_os_str(), self.0, name)
    }
}

impl<'a> NewFile<'a> {
    /// Creates a file without a name for a directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(dir: BorrowedFd<'a>) -> io::Result<Self> {
        let (flags, mode) = (OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o600));
        // Such a file gets its name through /proc.
        if std::path::Path::new("/proc/self/fd").exists()
            && let Ok(file) = openat(dir, ".", flags | OFlag::O_TMPFILE, mode)
        {
            return Ok(Self { dir, file: file.into(), beside: Beside(dir, None) });
        }
        let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let (beside, file) = Beside::make(dir, |name| openat(dir, name, flags, mode))?;
        Ok(Self { dir, file: file.into(), beside })
    }

    /// Gives the file its attributes and its name. A regular file under that name is replaced, and so
    /// is a link, which is not followed; nothing else is.
    ///
    /// # Errors
    /// Those of the file system, and when something else has the name.
    pub fn place(self, name: &OsStr, attributes: &Attributes) -> io::Result<()> {
        let before = look(self.dir, name)?;
        if before.as_ref().is_some_and(|before| kind(before) == SFlag::S_IFDIR) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let is_file = |about: &FileStat| matches!(kind(about), SFlag::S_IFREG | SFlag::S_IFLNK);
        if before.as_ref().is_some_and(|before| !is_file(before)) {
            let why = "it is a device, a pipe or a socket, which is not replaced";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let kept = before.filter(|before| kind(before) == SFlag::S_IFREG);
        self.apply(attributes, kept.as_ref())?;
        if self.beside.1.is_some() {
            return Ok(self.beside.rename(name)?);
        }
        let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        put(self.dir, name, |name| linkat(AT_FDCWD, from.as_str(), self.dir, name, flags))
    }

    /// Sets the attributes; those that stay come from `kept`.
    fn apply(&self, attributes: &Attributes, kept: Option<&FileStat>) -> io::Result<()> {
        let mut mode = match kept {
            Some(kept) if attributes.keep_mode => kept.st_mode & MODE,
            _ => attributes.mode & MODE,
        };
        if let Some(owner) = attributes.owner {
            let (uid, gid) = ids(owner);
            fchown(&self.file, uid, gid).map_err(|errno| not_owned(owner, errno))?;
        } else if let Some(kept) = kept {
            let (uid, gid) = ids((kept.st_uid, kept.st_gid));
            // Only root gives files away. A program does not become ours with the set-id bits of
            // somebody else.
            if fchown(&self.file, uid, gid).is_err() {
                mode &= !SET_ID;
            }
        }
        fchmod(&self.file, Mode::from_bits_truncate(mode))?;
        if let Some(seconds) = attributes.modified {
            futimens(&self.file, &TimeSpec::UTIME_OMIT, &TimeSpec::new(seconds, 0))?;
        }
        Ok(())
    }
}

impl Write for NewFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Permission bits of a mode.
pub(crate) const MODE: u32 = 0o7777;

/// Type bits of a mode.
pub(crate) fn kind(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode & SFlag::S_IFMT.bits())
}

/// Returns what has a name in a directory; a link is not followed.
pub(crate) fn look(dir: BorrowedFd<'_>, name: &OsStr) -> nix::Result<Option<FileStat>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(about) => Ok(Some(about)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Makes something under a name. What has the name already is replaced in one step.
pub(crate) fn put(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    make: impl Fn(&OsStr) -> nix::Result<()>,
) -> io::Result<()> {
    match make(name) {
        Err(Errno::EEXIST) => {
            let (beside, ()) = Beside::make(dir, make)?;
            Ok(beside.rename(name)?)
        }
        made => Ok(made?),
    }
}

pub(crate) fn ids((uid, gid): (u32, u32)) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// Error of an owner that a file cannot have, such as an id that a container has no room for.
pub(crate) fn not_owned((uid, gid): (u32, u32), errno: Errno) -> io::Error {
    let why = format!("it cannot belong to {uid}:{gid} here: {}", io::Error::from(errno));
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}
