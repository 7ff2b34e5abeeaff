//! Directories of a destination, entered one name at a time, so that no link leads elsewhere.

use std::{
    collections::HashSet,
    ffi::OsStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat},
};

use crate::{
    error::{At, Error},
    new_file::{kind, look},
};

/// Most directories that are made because something in them came first. Archives have entries for nearly all of theirs;
/// one of long paths alone would make two thousand with each.
pub(crate) const MADE_MAX: usize = 100_000;

/// Destination of an archive.
#[derive(Debug)]
pub(crate) struct Tree {
    /// Path of the destination, for messages.
    path: PathBuf,
    base: Rc<OwnedFd>,
    /// Whether a link to a directory that stood there before is taken for the directory.
    follow: bool,
    /// Device and inode of each symbolic link that the archive brought: none of them is followed.
    brought: HashSet<(u64, u64)>,
    /// Device and inode of each directory that was made because something in it came first.
    made: HashSet<(u64, u64)>,
    /// Directory that was entered last: entries of one directory follow each other.
    last: Option<(PathBuf, Rc<OwnedFd>)>,
}

impl Tree {
    /// Opens a destination; a link to a directory is followed here.
    pub(crate) fn open(path: &Path, follow: bool) -> Result<Self, Error> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let base = nix::fcntl::open(path, flags, Mode::empty()).at(path)?;
        let (path, base) = (path.to_owned(), Rc::new(base));
        Ok(Self { path, base, follow, brought: HashSet::new(), made: HashSet::new(), last: None })
    }

    /// Returns the whole path of an entry, for messages.
    pub(crate) fn whole(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.path.clone() } else { self.path.join(path) }
    }

    /// Enters a directory below the destination; `make` creates it where it is missing.
    pub(crate) fn enter(&mut self, dir: &Path, make: bool) -> Result<Rc<OwnedFd>, Error> {
        if let Some((last, at)) = &self.last
            && last == dir
        {
            return Ok(Rc::clone(at));
        }
        let (mut at, mut here) = (Rc::clone(&self.base), PathBuf::new());
        for name in dir.components().map(Component::as_os_str) {
            here.push(name);
            at = Rc::new(self.step(at.as_fd(), name, &here, make)?);
        }
        self.last = Some((here, Rc::clone(&at)));
        Ok(at)
    }

    /// True for a directory that was made because something in it came first.
    pub(crate) fn has_made(&self, about: &FileStat) -> bool {
        self.made.contains(&(about.st_dev, about.st_ino))
    }

    fn step(
        &mut self,
        at: BorrowedFd<'_>,
        name: &OsStr,
        here: &Path,
        make: bool,
    ) -> Result<OwnedFd, Error> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open = || openat(at, name, flags | OFlag::O_NOFOLLOW, Mode::empty());
        match open() {
            Err(Errno::ENOENT) if make => {
                if self.made.len() >= MADE_MAX {
                    return Err(Error::Invalid(format!(
                        "more than {MADE_MAX} of its directories have no entry of their own"
                    )));
                }
                let is_new = match mkdirat(at, name, Mode::from_bits_truncate(0o755)) {
                    Ok(()) => true,
                    Err(Errno::EEXIST) => false,
                    Err(errno) => return Err(errno).at(&self.whole(here)),
                };
                let opened = open().at(&self.whole(here))?;
                if is_new {
                    let about = fstat(&opened).at(&self.whole(here))?;
                    self.made.insert((about.st_dev, about.st_ino));
                }
                Ok(opened)
            }
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let about = look(at, name).at(&self.whole(here))?;
                match about {
                    Some(about) if self.follows(&about) => {
                        openat(at, name, flags, Mode::empty()).at(&self.whole(here))
                    }
                    Some(about) if kind(&about) == SFlag::S_IFLNK => {
                        let here = self.whole(here);
                        let why = "is a symbolic link, through which nothing is written";
                        Err(Error::Invalid(format!("{} {why}", here.display())))
                    }
                    _ => Err(Error::refused(
                        &self.whole(here),
                        io::ErrorKind::NotADirectory,
                        "it is no directory",
                    )),
                }
            }
            opened => opened.at(&self.whole(here)),
        }
    }

    /// True for a symbolic link that may be followed.
    fn follows(&self, about: &FileStat) -> bool {
        let own = (about.st_dev, about.st_ino);
        self.follow && kind(about) == SFlag::S_IFLNK && !self.brought.contains(&own)
    }

    /// True for a link to a directory that stands for the directory.
    pub(crate) fn leads_on(&self, at: BorrowedFd<'_>, name: &OsStr, about: &FileStat) -> bool {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        self.follows(about) && openat(at, name, flags, Mode::empty()).is_ok()
    }

    /// Notes a symbolic link that the archive brought.
    pub(crate) fn bring(&mut self, link: &FileStat) {
        self.brought.insert((link.st_dev, link.st_ino));
    }
}
