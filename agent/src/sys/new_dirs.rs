//! Waiting for directories that are made in other directories, by the kernel's inotify.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::{Interest, unix::AsyncFd};

/// Directories that are watched.
#[derive(Debug)]
pub struct NewDirs(AsyncFd<Queue>);

#[derive(Debug)]
struct Queue(Inotify);

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Directories that were made.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Their names, without the directories that they are in.
    pub names: Vec<OsString>,
    /// True when more were made than the kernel keeps the names of.
    pub is_incomplete: bool,
}

impl NewDirs {
    /// Watches no directory yet.
    ///
    /// # Errors
    /// When the user has too many watchers (`fs.inotify.max_user_instances`).
    #[expect(unsafe_code, reason = "AsyncFd")]
    pub fn new() -> io::Result<Self> {
        let queue = Queue(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?);
        // SAFETY: the `OwnedFd` in it is open, is this very descriptor until it is dropped, and is moved
        // in here for good.
        Ok(Self(unsafe { AsyncFd::register_with_interest(queue, Interest::READABLE)? }))
    }

    /// Watches a directory, too; changes nothing if it is watched already. A directory that is removed is
    /// no longer watched, also when another one gets its name.
    ///
    /// # Errors
    /// When there is none, or it cannot be watched.
    pub fn watch(&self, dir: &Path) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
        self.0.get_ref().0.add_watch(dir, flags)?;
        Ok(())
    }

    /// Waits until something happens in the directories. Returns the directories that were made, which may
    /// be none.
    ///
    /// # Errors
    /// When the kernel fails to tell.
    pub async fn next(&self) -> io::Result<Made> {
        let read = |queue: &Queue| queue.0.read_events().map_err(io::Error::from);
        let mut made = Made::default();
        for event in self.0.async_io(Interest::READABLE, read).await? {
            made.is_incomplete |= event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
            if event.mask.contains(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ISDIR) {
                made.names.extend(event.name);
            }
        }
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    async fn next(dirs: &NewDirs) -> Made {
        let made = timeout(Duration::from_secs(30), dirs.next()).await;
        made.expect("something happened").expect("told")
    }

    #[tokio::test]
    async fn new_directories_of_all_watched_ones_are_told_once() {
        let top = tempfile::tempdir().expect("tempdir");
        let [a, b] = ["a", "b"].map(|name| top.path().join(name));
        let dirs = NewDirs::new().expect("a watcher");
        dirs.watch(&a).expect_err("there is none");
        for dir in [&a, &b] {
            fs::create_dir(dir).expect("made");
            fs::create_dir(dir.join("earlier")).expect("made");
            dirs.watch(dir).expect("watched");
            dirs.watch(dir).expect("watched");
        }
        fs::write(a.join("file"), "").expect("written");
        fs::create_dir(a.join("one")).expect("made");
        fs::create_dir(b.join("two")).expect("made");
        fs::create_dir(b.join("two/below")).expect("made");
        let names = ["one", "two"].map(OsString::from).to_vec();
        assert_eq!(next(&dirs).await, Made { names, is_incomplete: false });
        // What is removed and made anew is another directory.
        fs::remove_dir(a.join("one")).expect("removed");
        fs::create_dir(a.join("one")).expect("made");
        assert_eq!(next(&dirs).await.names, ["one"]);
        fs::remove_dir_all(&a).expect("removed");
        assert_eq!(next(&dirs).await, Made::default(), "it is watched no more");
        fs::create_dir_all(a.join("one")).expect("made");
        fs::create_dir(b.join("three")).expect("made");
        assert_eq!(next(&dirs).await.names, ["three"]);
    }
}
