//! Replaces a file in one step: after a crash there is the old one or the new one, and nobody ever
//! sees half of it, or its bytes under other permissions.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;

/// Permissions of the new file; it belongs to this process's user.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Numeric group; this process's own if there is none.
    pub group: Option<u32>,
}

impl Access {
    /// For this user alone.
    pub const PRIVATE: Self = Self { mode: 0o600, group: None };
}

/// Replaces or creates a file, durably. The draft beside it is `NAME.new`: one that a crash has left
/// is used again. Concurrent calls take turns; the last one counts. Blocks.
///
/// # Errors
/// When the file cannot be written: then the old one is still there, unless only its directory could
/// not be synced.
pub fn replace(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let mut file = open(&draft)?;
    let mut place = || {
        // Nobody else can read it before it has its permissions.
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.set_len(0)?;
        fchown(&file, None, access.group)?;
        file.set_permissions(Permissions::from_mode(access.mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    place().inspect_err(|_| drop(fs::remove_file(&draft)))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
}

/// Opens the draft and locks it against other processes.
fn open(draft: &Path) -> io::Result<File> {
    loop {
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(OFlag::O_NOFOLLOW.bits()).open(draft)?;
        file.lock()?;
        // Whoever held the lock before may have put the draft into its place, or removed it.
        match fs::symlink_metadata(draft) {
            Ok(there) if there.ino() == file.metadata()?.ino() => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Access = Access { mode: 0o640, group: None };

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("there").mode() & 0o7777
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = dir.read_dir().expect("listed").map(|entry| entry.expect("read").file_name());
        entries.map(|name| name.into_string().expect("UTF-8")).collect()
    }

    #[test]
    fn the_file_has_the_new_bytes_and_permissions() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.json");
        fs::write(&path, "a longer text, for everybody").expect("written");
        let before = File::open(&path).expect("opens");
        replace(&path, b"new", SHARED).expect("replaced");
        assert_eq!((fs::read(&path).expect("read"), mode(&path)), (b"new".to_vec(), 0o640));
        replace(&path, b"key", Access::PRIVATE).expect("replaced");
        assert_eq!((fs::read(&path).expect("read"), mode(&path)), (b"key".to_vec(), 0o600));
        assert_eq!(names(dir.path()), ["a.json"]);
        // Who has the old one open still reads it.
        assert_eq!(io::read_to_string(before).expect("read"), "a longer text, for everybody");
    }

    #[test]
    fn the_draft_of_a_crash_is_used_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, draft) = (dir.path().join("key"), dir.path().join("key.new"));
        fs::write(&draft, "half of a file that was much longer").expect("written");
        fs::set_permissions(&draft, Permissions::from_mode(0o644)).expect("set");
        replace(&path, b"whole", Access::PRIVATE).expect("replaced");
        assert_eq!((fs::read(&path).expect("read"), mode(&path)), (b"whole".to_vec(), 0o600));
        assert_eq!(names(dir.path()), ["key"]);
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_no_draft() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("full");
        fs::create_dir_all(path.join("a directory in its place")).expect("made");
        replace(&path, b"x", SHARED).expect_err("not a file");
        assert_eq!(names(dir.path()), ["full"]);
        replace(&dir.path().join("none/x"), b"x", SHARED).expect_err("no directory");
    }

    #[test]
    fn no_link_in_place_of_the_draft_is_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, victim) = (dir.path().join("a"), dir.path().join("victim"));
        fs::write(&victim, "mine").expect("written");
        std::os::unix::fs::symlink(&victim, dir.path().join("a.new")).expect("linked");
        replace(&path, b"x", SHARED).expect_err("a link");
        assert_eq!(fs::read(&victim).expect("read"), b"mine");
    }

    #[test]
    fn concurrent_calls_never_mix_their_bytes() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        replace(&path, &[0; 40_000], SHARED).expect("replaced");
        std::thread::scope(|scope| {
            for number in 1..=3 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        replace(path, &[number; 40_000], SHARED).expect("replaced");
                        let read = fs::read(path).expect("read");
                        let first = read.first().copied().expect("not empty");
                        assert!(read.len() == 40_000 && read.iter().all(|byte| *byte == first));
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), ["a"]);
    }
}
