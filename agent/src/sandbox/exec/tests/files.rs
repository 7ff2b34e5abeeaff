//! Files, on this machine in a directory of the test.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use helper::FileKind;

use super::*;
use crate::sandbox::access::files::{FileContent, Flow, UnpackRules};

pub(super) const ROOT: User = User::Id(0);

pub(super) struct Place {
    pub(super) rig: Rig,
    pub(super) dir: tempfile::TempDir,
    pub(super) name: SandboxRef,
}

impl Place {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("set");
        Self { rig: Rig::new().await, dir, name: SandboxRef::Id(id(1)) }
    }

    pub(super) fn at(&self, name: &str) -> String {
        format!("{}/{name}", self.dir.path().display())
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) -> FileContent {
        let content = Bytes::copy_from_slice(content);
        FileContent { path: self.at(name), content, mode: Some(mode) }
    }

    async fn write(&self, files: Vec<FileContent>) -> Result<u32, Error> {
        self.rig.execs.files(&self.name, &ROOT).write(files).await
    }

    async fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let path = if name.starts_with('/') { name.to_owned() } else { self.at(name) };
        let (_, flow) = self.rig.execs.files(&self.name, &ROOT).read(path, (0, 0)).await?;
        all(flow).await
    }

    pub(super) async fn upload(&self, name: &str, archive: Vec<u8>) -> Result<u64, Error> {
        self.upload_by(&ROOT, name, archive, UnpackRules::default()).await
    }

    pub(super) async fn upload_by(
        &self,
        user: &User,
        name: &str,
        archive: Vec<u8>,
        rules: UnpackRules,
    ) -> Result<u64, Error> {
        let (sender, bytes) = mpsc::channel(4);
        let feed = async move {
            for chunk in archive.chunks(100_000) {
                if sender.send(Ok(Bytes::copy_from_slice(chunk))).await.is_err() {
                    return;
                }
            }
        };
        let upload = self.rig.execs.files(&self.name, user).upload(self.at(name), rules, bytes);
        tokio::join!(upload, feed).0
    }
}

pub(super) async fn all(mut flow: Flow) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    while let Some(more) = timeout(DEADLINE, flow.recv()).await.expect("in time") {
        bytes.extend(more?);
    }
    Ok(bytes)
}

pub(super) fn mkfifo(path: &str) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
}

#[tokio::test]
async fn files_are_replaced_in_one_step_and_read_back() {
    let place = Place::new().await;
    let big: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let mut files: Vec<_> = (0..100).map(|n| place.file(&format!("d/{n}"), b"x", 0o600)).collect();
    files.push(place.file("big", &big, 0o755));
    files.push(place.file("empty\nname", b"", 0o4711));
    assert_eq!(place.write(files).await, Ok(102));
    assert!(place.read("big").await.expect("read") == big);
    assert_eq!(place.read("empty\nname").await, Ok(Vec::new()));
    assert_eq!(fs::metadata(place.at("empty\nname")).expect("there").mode() & 0o7777, 0o4711);
    // Replaced in one step: an open descriptor still reads the old file.
    let mut open = fs::File::open(place.at("big")).expect("open");
    assert_eq!(place.write(vec![place.file("big", b"new", 0o644)]).await, Ok(1));
    let mut old = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut old).expect("read");
    assert!(old == big && fs::read(place.at("big")).expect("read") == b"new");
    let left = fs::read_dir(place.dir.path()).expect("read").flatten();
    let names: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(
        names.iter().all(|name| !name.to_string_lossy().starts_with(".pve-sandbox")),
        "{names:?}"
    );
    // A part of the file.
    let path = place.at("big");
    let ranged = place.rig.execs.files(&place.name, &ROOT).read(path, (1, 1)).await;
    let (entry, flow) = ranged.expect("read");
    assert_eq!((entry.size, all(flow).await), (3, Ok(b"e".to_vec())));
}

#[tokio::test]
async fn file_that_is_written_over_keeps_its_owner_and_without_a_mode_its_permissions() {
    let place = Place::new().await;
    let about = |name: &str| {
        let about = fs::metadata(place.at(name)).expect("there");
        (about.mode() & 0o7777, about.uid(), about.gid())
    };
    fs::write(place.at("tool"), "old").expect("written");
    std::os::unix::fs::chown(place.at("tool"), Some(33), Some(70_000)).expect("chown");
    fs::set_permissions(place.at("tool"), fs::Permissions::from_mode(0o4755)).expect("set");
    let any = |name: &str| FileContent { mode: None, ..place.file(name, b"new", 0) };
    assert_eq!(place.write(vec![any("tool"), any("d/fresh")]).await, Ok(2));
    assert_eq!(fs::read(place.at("tool")).expect("read"), b"new");
    assert_eq!((about("tool"), about("d/fresh")), ((0o4755, 33, 70_000), (0o644, 0, 0)));
    assert_eq!(place.write(vec![place.file("tool", b"x", 0o600)]).await, Ok(1));
    assert_eq!(about("tool"), (0o600, 33, 70_000));
}

#[tokio::test]
async fn operations_of_a_team_hold_no_more_bytes_than_it_may_and_small_ones_go_on() {
    let place = Place::new().await;
    let names = (0..1000).map(|n| place.file(&format!("d/{n}-{}", "x".repeat(200)), b"", 0o600));
    assert_eq!(place.write(names.collect()).await, Ok(1000));
    let big = || vec![place.file("big", &[7; 200_000], 0o600)];
    let files = place.rig.execs.files(&place.name, &ROOT);
    let list = || files.list(place.at("d"), (5000, String::new()));
    let mut others = place.rig.execs.whole(&place.name).expect("it runs");
    assert!(!others.grow_to(usize::MAX), "one team never gets all");
    for error in [
        place.write(big()).await.map(drop).expect_err("no room"),
        list().await.map(drop).expect_err("no room"),
    ] {
        assert_eq!(error.reason, Reason::TooManyCalls, "{error}");
        assert!(error.retry_after.is_some());
    }
    assert!(!Path::new(&place.at("big")).exists());
    assert_eq!(place.write(vec![place.file("small", b"x", 0o600)]).await, Ok(1));
    assert_eq!(files.stat(place.at("small")).await.map(|entry| entry.size), Ok(1));
    drop(others);
    assert_eq!(place.write(big()).await, Ok(1));
    assert_eq!(list().await.map(|(entries, _)| entries.len()), Ok(1000));
}

#[tokio::test]
async fn write_that_fails_midway_tells_what_is_written() {
    let place = Place::new().await;
    fs::create_dir(place.at("dir")).expect("made");
    let files = ["a", "b", "dir", "c"].map(|name| place.file(name, b"x", 0o600));
    let error = place.write(files.to_vec()).await.expect_err("a directory");
    assert_eq!((error.reason, error.files_written), (Reason::FileRefused, Some(2)));
    let told = format!("2 of 4 files are written, up to {}", place.at("b"));
    let failed = format!("{}: ", place.at("dir"));
    assert!(error.message.ends_with(&told) && error.message.starts_with(&failed), "{error}");
    assert!(Path::new(&place.at("b")).exists() && !Path::new(&place.at("c")).exists());
    let error = place.write(files[2..].to_vec()).await.expect_err("a directory");
    assert_eq!(error.files_written, Some(0));
    assert!(error.message.ends_with("none of the 2 files is written"), "{error}");
    assert_eq!(place.read("nosuch").await.expect_err("nothing").files_written, None);
}

#[tokio::test]
async fn file_access_follows_the_permissions_of_the_user() {
    let place = Place::new().await;
    let www = User::Name("www-data".into());
    let write = |name: &str| {
        let files = vec![place.file(name, b"x", 0o644)];
        place.rig.execs.files(&place.name, &www).write(files)
    };
    assert_eq!(write("no").await.expect_err("not theirs").reason, Reason::FileRefused);
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o777)).expect("set");
    assert_eq!(write("yes").await, Ok(1));
    assert_eq!(fs::metadata(place.at("yes")).expect("there").uid(), 33);
    let shadow = "/etc/shadow".to_owned();
    let read = place.rig.execs.files(&place.name, &www).read(shadow, (0, 0)).await;
    assert_eq!(read.map(drop).expect_err("not theirs").reason, Reason::FileRefused);
}

#[tokio::test]
async fn reading_a_special_file_is_refused_at_once() {
    let place = Place::new().await;
    mkfifo(&place.at("fifo"));
    symlink(place.at("fifo"), place.at("link")).expect("a link");
    symlink("loop", place.at("loop")).expect("a link");
    for bad in ["fifo", "link", "/dev/zero", "/dev/tty", "/proc/self/fd/0", "/"] {
        let error = place.read(bad).await.expect_err(bad);
        assert!(
            matches!(error.reason, Reason::FileRefused | Reason::ExecFailed),
            "{bad}: {error:?}"
        );
    }
    assert_eq!(place.read("nosuch").await.expect_err("nothing").reason, Reason::FileNotFound);
    assert!(place.read("loop").await.is_err());
    let error = place.read(&"x".repeat(300)).await.expect_err("too long a name");
    assert_eq!(error.reason, Reason::ExecFailed, "{error}");
    // A link is replaced and never followed; a pipe is neither replaced nor written into.
    fs::write(place.at("target"), "as it was").expect("written");
    symlink(place.at("target"), place.at("to-target")).expect("a link");
    let files = vec![place.file("to-target", b"new", 0o644), place.file("fifo", b"new", 0o644)];
    let error = place.write(files).await.expect_err("a pipe");
    assert_eq!((error.reason, error.files_written), (Reason::FileRefused, Some(1)), "{error}");
    assert_eq!(fs::read_to_string(place.at("target")).expect("read"), "as it was");
    assert!(fs::symlink_metadata(place.at("to-target")).expect("there").is_file());
    assert!(fs::symlink_metadata(place.at("fifo")).expect("there").file_type().is_fifo());
    fs::create_dir(place.at("dir")).expect("made");
    let error = place.write(vec![place.file("dir", b"x", 0o644)]).await.expect_err("a directory");
    assert_eq!(error.reason, Reason::FileRefused, "{error}");
    // A huge sparse file: its description, and as little of it as requested.
    fs::File::create(place.at("giant")).and_then(|f| f.set_len(1 << 43)).expect("made");
    let path = place.at("giant");
    let (entry, flow) =
        place.rig.execs.files(&place.name, &ROOT).read(path, (1 << 42, 10)).await.expect("read");
    assert_eq!((entry.size, all(flow).await), (1 << 43, Ok(vec![0; 10])));
}

#[tokio::test]
async fn directories_are_listed_and_removed() {
    let place = Place::new().await;
    let files = vec![place.file("d/b", b"1", 0o600), place.file("d/a", b"22", 0o644)];
    assert_eq!(place.write(files).await, Ok(2));
    symlink("/nowhere", place.at("d/c")).expect("a link");
    mkfifo(&place.at("d/d"));
    let list = |path| place.rig.execs.files(&place.name, &ROOT).list(path, (5000, String::new()));
    let (entries, next) = list(place.at("d")).await.expect("listed");
    let seen: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.kind, e.size)).collect();
    assert_eq!(seen[..2], [("a", FileKind::File, 2), ("b", FileKind::File, 1)]);
    assert_eq!((seen[2].1, seen[3].1, next), (FileKind::Symlink, FileKind::Special, String::new()));
    assert_eq!(entries[2].target, "/nowhere");
    assert_eq!(list(place.at("d/a")).await.expect_err("a file").reason, Reason::FileRefused);
    let remove =
        |path, recursive| place.rig.execs.files(&place.name, &ROOT).remove(path, recursive);
    let error = remove(place.at("d"), false).await.expect_err("not empty");
    assert_eq!(error.reason, Reason::FileRefused, "{error}");
    assert_eq!(remove(place.at("d/a"), false).await, Ok(true));
    assert_eq!(remove(place.at("d"), true).await, Ok(true));
    assert_eq!(remove(place.at("d"), true).await, Ok(false));
}

#[tokio::test]
async fn pages_of_a_directory_hold_each_entry_once_whatever_its_name() {
    use std::os::unix::ffi::OsStringExt;
    let place = Place::new().await;
    std::fs::create_dir(place.at("d")).expect("made");
    let names = (0..7u8).map(|n| vec![b'n', 0xe0 + n, n + 1]).chain([b"plain".to_vec()]);
    for name in names {
        let path = std::path::Path::new(&place.at("d")).join(std::ffi::OsString::from_vec(name));
        std::fs::write(path, "x").expect("written");
    }
    let (mut found, mut after) = (Vec::new(), String::new());
    for page in 0.. {
        let list = place.rig.execs.files(&place.name, &ROOT).list(place.at("d"), (3, after));
        let (entries, next) = list.await.expect("listed");
        assert!(entries.len() <= 3 && page < 3, "an end comes");
        found.extend(entries.into_iter().map(|entry| entry.name));
        after = next;
        if after.is_empty() {
            break;
        }
    }
    assert_eq!((found.len(), found.last().map(String::as_str)), (8, Some("plain")));
}
