//! Archives, unpacked and packed on this machine in a directory of the test.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use super::{
    files::{Place, ROOT, all, mkfifo},
    *,
};
use crate::sandbox::access::files::UnpackRules;

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
async fn archive_is_uploaded_and_downloaded() {
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
    let flow = place.rig.execs.files(&place.name, &ROOT).download(path).await.expect("begun");
    let bytes = all(flow).await.expect("whole");
    let mut down = tar::Archive::new(&bytes[..]);
    let mut names: Vec<_> = down
        .entries()
        .expect("an archive")
        .map(|entry| entry.expect("an entry").path().expect("a path").display().to_string())
        .collect();
    names.sort();
    // The first is the comment that tells of the pipe.
    assert_eq!(names, ["pax_global_header", "src", "src/a", "src/l"]);
    let comment = format!("comment=left out: {} (a pipe)", place.at("into/src/fifo"));
    assert!(String::from_utf8_lossy(&bytes).contains(&comment));
    let missing = place.rig.execs.files(&place.name, &ROOT).download(place.at("nosuch")).await;
    assert_eq!(missing.map(drop).expect_err("nothing").reason, Reason::FileNotFound);
}

fn packed(from: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    archive::pack(from, Path::new("copy"), &mut bytes).expect("packed");
    bytes
}

#[tokio::test]
async fn read_only_directory_is_unpacked_by_a_user_who_is_not_root() {
    let place = Place::new().await;
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o777)).expect("set");
    let src = tempfile::tempdir().expect("tempdir");
    fs::create_dir(src.path().join("deep")).expect("made");
    fs::write(src.path().join("deep/file"), "x").expect("written");
    for dir in ["deep", "."] {
        fs::set_permissions(src.path().join(dir), fs::Permissions::from_mode(0o555)).expect("set");
    }
    let www = User::Name("www-data".into());
    for (into, rules) in [
        ("as-it-is", UnpackRules::default()),
        ("kept", UnpackRules { keep_existing: true, ..UnpackRules::default() }),
    ] {
        // The directory, with what is in it: its own entry, one directory and one file.
        let unpacked = place.upload_by(&www, into, packed(src.path()), rules).await;
        assert_eq!(unpacked, Ok(3), "{into}");
        let about = fs::metadata(place.at(&format!("{into}/copy/deep"))).expect("there");
        assert_eq!((about.mode() & 0o7777, about.uid()), (0o555, 33), "{into}");
        assert_eq!(fs::read(place.at(&format!("{into}/copy/deep/file"))).expect("read"), b"x");
    }
}

#[tokio::test]
async fn owners_are_those_that_the_rules_of_an_upload_say() {
    let place = Place::new().await;
    let src = tempfile::tempdir().expect("tempdir");
    for name in ["old", "new"] {
        fs::write(src.path().join(name), "x").expect("written");
        std::os::unix::fs::chown(src.path().join(name), Some(70_000), Some(3_000_000))
            .expect("set");
    }
    let given = |owner: &str| UnpackRules { owner: owner.into(), keep_existing: true };
    for (rules, old, new) in [
        (UnpackRules::default(), (70_000, 3_000_000), (70_000, 3_000_000)),
        (given(""), (5, 6), (0, 0)),
        (given("www-data"), (33, 33), (33, 33)),
        (given("80000:tty"), (80_000, 5), (80_000, 5)),
    ] {
        fs::create_dir_all(place.at("copy")).expect("made");
        fs::write(place.at("copy/old"), "before").expect("written");
        std::os::unix::fs::chown(place.at("copy/old"), Some(5), Some(6)).expect("set");
        let unpacked = place.upload_by(&ROOT, "", packed(src.path()), rules.clone()).await;
        assert_eq!(unpacked, Ok(3), "{rules:?}");
        let owner = |name: &str| {
            let about = fs::metadata(place.at(name)).expect("there");
            (about.uid(), about.gid())
        };
        assert_eq!((owner("copy/old"), owner("copy/new")), (old, new), "{rules:?}");
        fs::remove_dir_all(place.at("copy")).expect("removed");
    }
    let unknown = place.upload_by(&ROOT, "", packed(src.path()), given("nosuch")).await;
    assert_eq!(unknown.expect_err("unknown").reason, Reason::FieldInvalid);
    let www = User::Name("www-data".into());
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o777)).expect("set");
    let gift = place.upload_by(&www, "", packed(src.path()), given("root")).await;
    assert_eq!(gift.expect_err("not theirs to give").reason, Reason::FileRefused);
}

#[tokio::test]
async fn archive_without_its_end_is_an_error() {
    let place = Place::new().await;
    let src = tempfile::tempdir().expect("tempdir");
    fs::write(src.path().join("file"), vec![7; 100_000]).expect("written");
    let whole = packed(src.path());
    for cut in [0, 600, 50_000, whole.len() - 1024] {
        let error = place.upload("into", whole[..cut].to_vec()).await.expect_err("cut");
        assert_eq!(error.reason, Reason::FieldInvalid, "{cut}: {error}");
        let left = fs::read(place.at("into/copy/file")).map_or(0, |bytes| bytes.len());
        assert!(left == 0 || left == 100_000, "{cut}: half a file of {left} bytes");
    }
}

#[tokio::test]
async fn upload_whose_caller_goes_away_leaves_no_half_file() {
    let place = Place::new().await;
    let src = tempfile::tempdir().expect("tempdir");
    fs::write(src.path().join("file"), vec![7; 1_000_000]).expect("written");
    fs::create_dir_all(place.at("copy")).expect("made");
    fs::write(place.at("copy/file"), "before").expect("written");
    let half = packed(src.path())[..600_000].to_vec();
    let (sender, archive) = mpsc::channel(4);
    let files = place.rig.execs.files(&place.name, &ROOT);
    let upload = files.upload(place.at(""), UnpackRules::default(), archive);
    let feed = async {
        for chunk in half.chunks(100_000) {
            sender.send(Ok(Bytes::copy_from_slice(chunk))).await.expect("taken");
        }
        std::future::pending::<()>().await;
    };
    // Dropped here, as when the caller's stream breaks.
    let both = timeout(Duration::from_secs(2), async { tokio::join!(upload, feed) });
    both.await.expect_err("it has no end");
    // The end of the helper's work comes after that of the call.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(fs::read(place.at("copy/file")).expect("there"), b"before");
    assert_eq!(fs::read_dir(place.at("copy")).expect("listed").count(), 1);
}

#[tokio::test]
async fn link_is_packed_as_a_link_unless_a_slash_follows() {
    let place = Place::new().await;
    fs::create_dir(place.at("dir")).expect("made");
    fs::write(place.at("dir/file"), "x").expect("written");
    symlink("dir", place.at("link")).expect("linked");
    for (path, first) in [("link", tar::EntryType::Symlink), ("link/", tar::EntryType::Directory)] {
        let files = place.rig.execs.files(&place.name, &ROOT);
        let bytes = all(files.download(place.at(path)).await.expect("begun")).await.expect("whole");
        let mut down = tar::Archive::new(&bytes[..]);
        let entry = down.entries().expect("an archive").next().expect("one").expect("sound");
        assert_eq!(entry.header().entry_type(), first, "{path}");
        assert_eq!(&*entry.path_bytes(), b"link");
    }
}

#[tokio::test]
async fn archive_cannot_write_outside_its_directory() {
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
