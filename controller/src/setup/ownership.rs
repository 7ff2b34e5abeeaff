//! Files that belong to the user of the service. That user may change its directories while root works in them, so
//! nothing is done by path: every file is opened below the open directory that it is in, without following a link.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat},
    sys::stat::Mode,
    unistd::{Gid, Uid, fchownat},
};

/// Numbers of a user and its group.
pub(super) type Owner = (u32, u32);

/// Most files that are looked at.
const FILES_MAX: usize = 10_000;
/// Most directories in one another. Each is an open file while those in it are looked at.
const DEPTH_MAX: usize = 16;

/// Lists a directory, and the files below it, as far as they belong to another user. None where there is no directory.
///
/// # Errors
/// When it cannot be looked at, or is too large.
pub(super) fn foreign_files(dir: &Path, (uid, _): Owner) -> io::Result<Vec<PathBuf>> {
    let mut foreign = Vec::new();
    walk(dir, &mut |file, path| {
        if file.metadata()?.uid() != uid {
            foreign.push(path.to_owned());
        }
        Ok(())
    })?;
    Ok(foreign)
}

/// Gives a directory, and what is below it, to a user. Links are given themselves, never what they lead to.
///
/// # Errors
/// When a file cannot be given away, or has a second name, which may be outside of the directory.
pub(super) fn give(dir: &Path, owner: Owner) -> io::Result<()> {
    walk(dir, &mut |file, path| give_one(file, path, owner))
}

fn give_one(file: &File, path: &Path, (uid, gid): Owner) -> io::Result<()> {
    let about = file.metadata()?;
    if about.uid() == uid {
        return Ok(());
    }
    if !about.is_dir() && about.nlink() > 1 {
        let why = format!("{} has a second name (a hard link)", path.display());
        return Err(io::Error::other(why));
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(fchownat(file, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?)
}

/// Function that sees an open file, and its path for people.
type See<'a> = dyn FnMut(&File, &Path) -> io::Result<()> + 'a;

/// Shows a directory and all below it to a function, each before what is in it.
fn walk(dir: &Path, see: &mut See<'_>) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = match open(dir, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        opened => File::from(opened?),
    };
    see(&top, dir)?;
    let mut left = FILES_MAX;
    below(&top, dir, DEPTH_MAX, &mut left, see)
}

fn below(
    dir: &File,
    path: &Path,
    depth: usize,
    left: &mut usize,
    see: &mut See<'_>,
) -> io::Result<()> {
    // The kernel opens the directory of the descriptor, whatever has its name now.
    for entry in fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))? {
        let name = entry?.file_name();
        let path = path.join(&name);
        let too_many =
            |what: &str| io::Error::other(format!("too many {what}: {}", path.display()));
        *left = left.checked_sub(1).ok_or_else(|| too_many("files"))?;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = match openat(dir, name.as_os_str(), flags, Mode::empty()) {
            // It was removed meanwhile.
            Err(Errno::ENOENT) => continue,
            opened => File::from(opened?),
        };
        see(&file, &path)?;
        if file.metadata()?.is_dir() {
            let depth = depth.checked_sub(1).ok_or_else(|| too_many("directories"))?;
            below(&file, &path, depth, left, see)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const OTHER: Owner = (12_345, 12_345);

    fn uid(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").uid()
    }

    fn assert_root() {
        assert!(Uid::effective().is_root(), "run this test as root");
    }

    #[test]
    fn links_are_given_and_never_what_they_lead_to() {
        assert_root();
        let outside = tempfile::tempdir().expect("a directory");
        let dir = tempfile::tempdir().expect("a directory");
        let (target, inner) = (outside.path().join("shadow"), dir.path().join("ca/ca.key"));
        fs::create_dir(dir.path().join("ca")).expect("made");
        for file in [&target, &inner] {
            fs::write(file, "").expect("written");
        }
        for (name, to) in [("file", &*target), ("directory", outside.path())] {
            symlink(to, dir.path().join(name)).expect("linked");
        }
        let own = uid(&target);
        assert_eq!(foreign_files(dir.path(), OTHER).expect("looked").len(), 5);
        give(dir.path(), OTHER).expect("given");
        assert_eq!(foreign_files(dir.path(), OTHER).expect("looked"), [""; 0].map(PathBuf::from));
        assert_eq!((uid(&inner), uid(&dir.path().join("file"))), (OTHER.0, OTHER.0));
        assert_eq!((uid(&target), uid(outside.path())), (own, own));
    }

    #[test]
    fn directory_that_is_replaced_by_a_link_meanwhile_leads_nowhere_else() {
        assert_root();
        let outside = tempfile::tempdir().expect("a directory");
        let dir = tempfile::tempdir().expect("a directory");
        let (target, sub) = (outside.path().join("shadow"), dir.path().join("sub"));
        fs::create_dir(&sub).expect("made");
        for file in [&target, &sub.join("shadow")] {
            fs::write(file, "").expect("written");
        }
        let own = uid(&target);
        walk(dir.path(), &mut |file, path| {
            // The user of the service wins the race, between the look at the directory and that into it.
            if path == sub {
                fs::rename(&sub, dir.path().with_extension("away"))?;
                symlink(outside.path(), &sub)?;
            }
            give_one(file, path, OTHER)
        })
        .expect("given");
        let away = dir.path().with_extension("away");
        let given = uid(&away.join("shadow"));
        fs::remove_dir_all(&away).expect("removed");
        assert_eq!(given, OTHER.0, "what was opened");
        assert_eq!((uid(&target), uid(outside.path())), (own, own));
    }

    #[test]
    fn file_with_a_second_name_and_endless_directories_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let outside = dir.path().join("outside");
        fs::write(&outside, "").expect("written");
        let inner = dir.path().join("data");
        fs::create_dir(&inner).expect("made");
        fs::hard_link(&outside, inner.join("file")).expect("linked");
        let file = File::open(&outside).expect("opened");
        let error = give_one(&file, &outside, OTHER).expect_err("refused");
        assert!(error.to_string().contains("second name"), "{error}");
        assert_ne!(uid(&outside), OTHER.0);
        let deep = (0..=DEPTH_MAX).fold(inner, |path, _| path.join("d"));
        fs::create_dir_all(&deep).expect("made");
        let error = foreign_files(dir.path(), OTHER).expect_err("refused");
        assert!(error.to_string().contains("too many directories"), "{error}");
    }
}
