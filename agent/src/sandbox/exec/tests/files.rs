//! Files, on this machine in a directory of the test.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use helper::FileKind;

use super::*;
use crate::sandbox::files::{FileContent, Flow};

const ROOT: User = User::Id(0);

struct Place {
    rig: Rig,
    dir: tempfile::TempDir,
    name: SandboxRef,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("set");
        Self { rig: Rig::new().await, dir, name: SandboxRef::Id(id(1)) }
    }

    fn at(&self, name: &str) -> String {
        format!("{}/{name}", self.dir.path().display())
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) -> FileContent {
        FileContent { path: self.at(name), content: Bytes::copy_from_slice(content), mode }
    }

    async fn write(&self, files: Vec<FileContent>) -> Result<u32, Error> {
        self.rig.execs.write_files(&self.name, &ROOT, files).await
    }

    async fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let path = if name.starts_with('/') { name.to_owned() } else { self.at(name) };
        let (_, flow) = self.rig.execs.read_file(&self.name, &ROOT, path, (0, 0)).await?;
        all(flow).await
    }

    async fn upload(&self, name: &str, archive: Vec<u8>) -> Result<u64, Error> {
        let (sender, bytes) = mpsc::channel(4);
        let feed = async move {
            for chunk in archive.chunks(100_000) {
                if sender.send(Ok(Bytes::copy_from_slice(chunk))).await.is_err() {
                    return;
                }
            }
        };
        let upload = self.rig.execs.upload(&self.name, &ROOT, self.at(name), bytes);
        tokio::join!(upload, feed).0
    }
}

async fn all(mut flow: Flow) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    while let Some(more) = timeout(DEADLINE, flow.recv()).await.expect("in time") {
        bytes.extend(more?);
    }
    Ok(bytes)
}

fn mkfifo(path: &str) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
}

#[tokio::test]
async fn files_are_written_whole_and_come_back() {
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
    let ranged = place.rig.execs.read_file(&place.name, &ROOT, path, (1, 1)).await;
    let (entry, flow) = ranged.expect("read");
    assert_eq!((entry.size, all(flow).await), (3, Ok(b"e".to_vec())));
}

#[tokio::test]
async fn a_user_may_do_what_the_user_may() {
    let place = Place::new().await;
    let www = User::Name("www-data".into());
    let write = |name: &str| {
        let files = vec![place.file(name, b"x", 0o644)];
        place.rig.execs.write_files(&place.name, &www, files)
    };
    assert_eq!(write("no").await.expect_err("not theirs").reason, Reason::FileRefused);
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o777)).expect("set");
    assert_eq!(write("yes").await, Ok(1));
    assert_eq!(fs::metadata(place.at("yes")).expect("there").uid(), 33);
    let shadow = "/etc/shadow".to_owned();
    let read = place.rig.execs.read_file(&place.name, &www, shadow, (0, 0)).await;
    assert_eq!(read.map(drop).expect_err("not theirs").reason, Reason::FileRefused);
}

#[tokio::test]
async fn what_is_no_file_is_refused_at_once() {
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
    // An obstacle to a write is replaced, and never followed or written into.
    fs::write(place.at("target"), "as it was").expect("written");
    symlink(place.at("target"), place.at("to-target")).expect("a link");
    let files = vec![place.file("to-target", b"new", 0o644), place.file("fifo", b"new", 0o644)];
    assert_eq!(place.write(files).await, Ok(2));
    assert_eq!(fs::read_to_string(place.at("target")).expect("read"), "as it was");
    assert!(!fs::symlink_metadata(place.at("fifo")).expect("there").file_type().is_fifo());
    fs::create_dir(place.at("dir")).expect("made");
    let error = place.write(vec![place.file("dir", b"x", 0o644)]).await.expect_err("a directory");
    assert_eq!(error.reason, Reason::FileRefused, "{error}");
    // A huge sparse file: its description, and as little of it as requested.
    fs::File::create(place.at("giant")).and_then(|f| f.set_len(1 << 43)).expect("made");
    let path = place.at("giant");
    let (entry, flow) =
        place.rig.execs.read_file(&place.name, &ROOT, path, (1 << 42, 10)).await.expect("read");
    assert_eq!((entry.size, all(flow).await), (1 << 43, Ok(vec![0; 10])));
}

#[tokio::test]
async fn directories_are_listed_and_removed() {
    let place = Place::new().await;
    let files = vec![place.file("d/b", b"1", 0o600), place.file("d/a", b"22", 0o644)];
    assert_eq!(place.write(files).await, Ok(2));
    symlink("/nowhere", place.at("d/c")).expect("a link");
    mkfifo(&place.at("d/d"));
    let list = |path| place.rig.execs.list_dir(&place.name, &ROOT, path);
    let (entries, more) = list(place.at("d")).await.expect("listed");
    let seen: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.kind, e.size)).collect();
    assert_eq!(seen[..2], [("a", FileKind::File, 2), ("b", FileKind::File, 1)]);
    assert_eq!((seen[2].1, seen[3].1, more), (FileKind::Symlink, FileKind::Special, false));
    assert_eq!(entries[2].target, "/nowhere");
    assert_eq!(list(place.at("d/a")).await.expect_err("a file").reason, Reason::FileRefused);
    let remove = |path, recursive| place.rig.execs.remove_file(&place.name, &ROOT, path, recursive);
    let error = remove(place.at("d"), false).await.expect_err("not empty");
    assert_eq!(error.reason, Reason::FileRefused, "{error}");
    assert_eq!(remove(place.at("d/a"), false).await, Ok(true));
    assert_eq!(remove(place.at("d"), true).await, Ok(true));
    assert_eq!(remove(place.at("d"), true).await, Ok(false));
}

fn archive(entries: &[(&str, tar::EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, kind, link, content) in entries {
        let mut header = tar::Header::new_gnu();
        // Set by hand: the crate itself refuses to write such paths.
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        if !link.is_empty() {
            header.set_link_name_literal(link).expect("short");
        }
        header.set_cksum();
        archive.append(&header, *content).expect("appended");
    }
    archive.into_inner().expect("finished")
}

#[tokio::test]
async fn archives_go_up_and_down() {
    let place = Place::new().await;
    let big = vec![7; 3_000_000];
    let up = archive(&[
        ("src", tar::EntryType::Directory, "", b""),
        ("src/a", tar::EntryType::Regular, "", &big),
        ("src/l", tar::EntryType::Symlink, "a", b""),
    ]);
    assert_eq!(place.upload("into", up).await, Ok(3));
    assert!(fs::read(place.at("into/src/a")).expect("there") == big);
    mkfifo(&place.at("into/src/fifo"));
    let path = place.at("into/src");
    let flow = place.rig.execs.download(&place.name, &ROOT, path).await.expect("begun");
    let bytes = all(flow).await.expect("whole");
    let mut down = tar::Archive::new(&bytes[..]);
    let mut names: Vec<_> = down
        .entries()
        .expect("an archive")
        .map(|entry| entry.expect("an entry").path().expect("a path").display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, ["src", "src/a", "src/l"]);
    let missing = place.rig.execs.download(&place.name, &ROOT, place.at("nosuch")).await;
    assert_eq!(missing.map(drop).expect_err("nothing").reason, Reason::FileNotFound);
}

#[tokio::test]
async fn no_archive_leads_out_of_its_directory() {
    let place = Place::new().await;
    use tar::EntryType as E;
    let regular = |path| archive(&[(path, E::Regular, "", b"x")]);
    for (name, bad) in [
        ("absolute", regular("/tmp/pve-sandbox-out")),
        ("climbs", regular("../out")),
        ("climbs later", regular("a/../../out")),
        ("hard link", archive(&[("l", E::Link, "../../etc/passwd", b"")])),
        ("device", archive(&[("null", E::Char, "", b"")])),
        ("pipe", archive(&[("pipe", E::Fifo, "", b"")])),
        ("no archive", vec![b'x'; 2000]),
    ] {
        let error = place.upload("into", bad).await.expect_err(name);
        assert_eq!(error.reason, Reason::FieldInvalid, "{name}: {error}");
    }
    let out = tempfile::tempdir().expect("tempdir");
    let target = out.path().to_str().expect("UTF-8");
    let through = archive(&[("l", E::Symlink, target, b""), ("l/out", E::Regular, "", b"x")]);
    place.upload("into", through).await.expect_err("through a link");
    assert!(fs::read_dir(out.path()).expect("there").next().is_none());
    for never in [place.at("out"), "/tmp/pve-sandbox-out".to_owned()] {
        assert!(!Path::new(&never).exists(), "{never}");
    }
}
