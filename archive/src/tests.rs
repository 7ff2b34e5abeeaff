//! Packing and unpacking on real directories, beside `cp -a`. The tests run as root.

#![expect(clippy::disallowed_methods, reason = "tests run cp")]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, Permissions},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use tar::{EntryType, Header};

use super::*;
use crate::tree::MADE_MAX;

const AS_CP_A: Rules = Rules { owner: Owner::Archive, keep_mode: false, follow: false };
const KEPT: Rules = Rules { owner: Owner::Kept, keep_mode: true, follow: true };

/// Attributes and content of everything below a directory, by path.
fn tree(dir: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut left) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(path) = left.pop() {
        let about = fs::symlink_metadata(&path).expect("there");
        let content = if about.is_dir() {
            left.extend(fs::read_dir(&path).expect("listed").map(|e| e.expect("entry").path()));
            "directory".to_owned()
        } else if about.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).expect("a link"))
        } else {
            format!("{} links, {:?}", about.nlink(), fs::read(&path).expect("read"))
        };
        let (mode, uid, gid) = (about.mode(), about.uid(), about.gid());
        let text = format!("{mode:o} {uid}:{gid} at {}: {content}", about.mtime());
        found.insert(path.strip_prefix(dir).expect("below").to_owned(), text);
    }
    found
}

fn set(path: &Path, mode: u32, owner: (u32, u32)) {
    chown(path, Some(owner.0), Some(owner.1)).expect("chown");
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
}

fn age(path: &Path, seconds: i64) {
    let when = nix::sys::time::TimeSpec::new(seconds, 0);
    let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &when, &when, flag).expect("utimensat");
}

fn packed(from: &Path, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    assert_eq!(pack(from, Path::new(name), &mut bytes).expect("packed"), [""; 0]);
    bytes
}

fn into(archive: &[u8], dir: &Path, rules: Rules) -> Result<Report, Error> {
    let to = Destination { dir: dir.to_owned(), root: Root::Kept, is_new: false };
    unpack(archive, &rules, |_| Ok::<_, Error>(to))
}

/// A tree with everything that `cp -a` keeps.
fn source(dir: &Path) -> PathBuf {
    let src = dir.join("src");
    fs::create_dir_all(src.join("sub/read-only")).expect("made");
    for (name, mode, owner) in [
        ("plain", 0o640, (0, 0)),
        ("program", 0o4755, (33, 33)),
        ("sub/large-ids", 0o600, (70_000, 4_000_000_000)),
        ("sub/read-only/file", 0o400, (1000, 1000)),
        ("sub/empty", 0o644, (0, 0)),
    ] {
        fs::write(src.join(name), name.repeat(if name == "plain" { 50_000 } else { 1 }))
            .expect("written");
        set(&src.join(name), mode, owner);
        age(&src.join(name), 1_000_000_000);
    }
    fs::write(src.join("sub/empty"), "").expect("emptied");
    fs::write(src.join(OsStr::from_bytes(b"sub/\xff\n")), "odd").expect("written");
    fs::write(src.join("n".repeat(200)), "long").expect("written");
    fs::hard_link(src.join("plain"), src.join("sub/same")).expect("linked");
    for (target, name) in
        [("plain", "link"), ("./sub//read-only/", "sub/odd-link"), ("/nowhere", "sub/dangling")]
    {
        symlink(target, src.join(name)).expect("linked");
        lchown(src.join(name), Some(33), Some(70_000)).expect("chown");
        age(&src.join(name), 1_100_000_000);
    }
    symlink("x".repeat(150), src.join("long-link")).expect("linked");
    set(&src.join("sub/read-only"), 0o555, (1000, 1000));
    set(&src.join("sub"), 0o2775, (0, 33));
    for name in ["sub/read-only", "sub", "."] {
        age(&src.join(name), 1_200_000_000);
    }
    src
}

fn cp_a(from: &Path, to: &Path) -> bool {
    Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp").success()
}

#[test]
fn tree_is_copied_as_by_cp_a_also_over_itself() {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = source(dir.path());
    let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
    for place in [&ours, &theirs] {
        fs::create_dir(place).expect("made");
        // Both write over this: other modes, owners and content, a link to replace.
        fs::create_dir_all(place.join("src/sub")).expect("made");
        fs::write(place.join("src/plain"), "old").expect("written");
        set(&place.join("src/plain"), 0o755, (5, 5));
        set(&place.join("src/sub"), 0o700, (6, 6));
        symlink("/elsewhere", place.join("src/link")).expect("linked");
    }
    for _ in 0..2 {
        into(&packed(&src, "src"), &ours, AS_CP_A).expect("unpacked");
        assert!(cp_a(&src, &theirs));
        assert_eq!(tree(&ours.join("src")), tree(&theirs.join("src")));
        assert_eq!(tree(&ours.join("src")), tree(&src));
    }
}

#[test]
fn what_is_written_over_keeps_its_mode_and_owner_unless_they_are_given() {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = dir.path().join("src");
    fs::create_dir_all(src.join("d")).expect("made");
    for name in ["old", "new", "d/deep"] {
        fs::write(src.join(name), "from").expect("written");
        set(&src.join(name), 0o4640, (1000, 1000));
    }
    for (rules, old, new, folder) in [
        (KEPT, (0o4755, 33), (0o640, 0), (0o750, 34)),
        (Rules { owner: Owner::Given(8, 9), ..KEPT }, (0o4755, 8), (0o640, 8), (0o750, 8)),
        (Rules { owner: Owner::Given(8, 9), ..AS_CP_A }, (0o640, 8), (0o640, 8), (0o755, 8)),
        (AS_CP_A, (0o4640, 1000), (0o4640, 1000), (0o755, 0)),
    ] {
        let to = tempfile::tempdir_in(dir.path()).expect("tempdir");
        let at = |name: &str| to.path().join(name);
        fs::create_dir(at("d")).expect("made");
        set(&at("d"), 0o750, (34, 34));
        fs::write(at("old"), "before").expect("written");
        set(&at("old"), 0o4755, (33, 33));
        into(&packed(&src, "."), to.path(), rules).expect("unpacked");
        let about = |name: &str| {
            let about = fs::metadata(at(name)).expect(name);
            (about.mode() & 0o7777, about.uid())
        };
        assert_eq!(fs::read(at("old")).expect("read"), b"from");
        assert_eq!((about("old"), about("new"), about("d")), (old, new, folder), "{rules:?}");
        assert_eq!(about("d/deep").1, new.1);
    }
}

#[test]
fn directory_goes_into_the_target_of_a_link_that_stood_there_and_through_no_other_link() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("usr/bin")).expect("made");
    set(&root.join("usr/bin"), 0o711, (3, 3));
    symlink("usr/bin", root.join("bin")).expect("linked");
    let src = dir.path().join("src");
    fs::create_dir_all(src.join("bin/deep")).expect("made");
    fs::write(src.join("bin/deep/tool"), "tool").expect("written");
    into(&packed(&src, "."), &root, KEPT).expect("unpacked");
    assert!(root.join("bin").is_symlink());
    assert_eq!(fs::read(root.join("usr/bin/deep/tool")).expect("there"), b"tool");
    assert_eq!(fs::metadata(root.join("usr/bin")).expect("there").mode() & 0o777, 0o711);
    // Neither where links are not followed, nor through one that the archive brings.
    let refused = into(&packed(&src, "."), &root, AS_CP_A).expect_err("a link");
    assert!(refused.to_string().contains("bin: a directory does not replace"), "{refused}");
    symlink("usr/bin", src.join("own")).expect("linked");
    let mut bytes = packed(&src, ".");
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).expect("made");
    for (way, link) in [("l", "../outside"), ("usr/l", outside.to_str().expect("UTF-8"))] {
        bytes = archive(&[(way, EntryType::Symlink, link), (&format!("{way}/x"), FILE, "x")]);
        into(&bytes, &root, KEPT).expect_err("through a link");
        let over = [(way, EntryType::Symlink, link), (way, EntryType::Directory, "")];
        into(&archive(&over), &root, KEPT).expect_err("a directory for the link");
    }
    assert_eq!(fs::read_dir(outside).expect("listed").count(), 0);
    assert!(!bytes.is_empty());
}

#[test]
fn files_without_a_size_are_read_to_their_end_and_no_further() {
    let read = |path: &str| {
        let bytes = packed(Path::new(path), "f");
        let mut content = Vec::new();
        let mut archive = tar::Archive::new(&*bytes);
        let mut entries = archive.entries().expect("entries");
        entries.next().expect("one").expect("sound").read_to_end(&mut content).expect("read");
        content
    };
    assert_eq!(read("/proc/version"), fs::read("/proc/version").expect("read"));
    assert!(!read("/proc/self/mountinfo").is_empty());
    // Says that it has 4096 bytes.
    let size = "/sys/kernel/mm/transparent_hugepage/enabled";
    if let Ok(content) = fs::read(size) {
        assert_eq!(read(size), content);
    }
    pack(Path::new("/proc/self/pagemap"), Path::new("f"), io::sink()).expect_err("endless");
    pack(Path::new("/dev/zero"), Path::new("f"), io::sink()).expect_err("a device");
}

#[test]
fn special_files_are_left_out_and_named_on_both_sides() {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = dir.path().join("src");
    fs::create_dir(&src).expect("made");
    let _socket = std::os::unix::net::UnixListener::bind(src.join("sock")).expect("bound");
    nix::unistd::mkfifo(&src.join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    fs::write(src.join("z"), "z").expect("written");
    let mut bytes = Vec::new();
    let told = pack(&src, Path::new("src"), &mut bytes).expect("packed");
    let at = |name: &str| src.join(name).display().to_string();
    assert_eq!(told, [format!("{} (a pipe)", at("pipe")), format!("{} (a socket)", at("sock"))]);
    let report = into(&bytes, dir.path(), KEPT).expect("unpacked");
    assert_eq!((report.entries, report.left_out), (2, told));
    // Other programs pass over the comments.
    fs::write(dir.path().join("tar"), &bytes).expect("written");
    let out = Command::new("tar").arg("tf").arg(dir.path().join("tar")).output().expect("tar");
    assert_eq!((&*out.stdout, &*out.stderr), (&b"src\nsrc/z\n"[..], &b""[..]));
    let alone = pack(&src.join("sock"), Path::new("sock"), io::sink()).expect_err("a socket");
    assert!(alone.to_string().contains("a socket"), "{alone}");
    for number in 0..LEFT_OUT_MAX {
        let path = src.join(format!("pipe{number}"));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
    }
    let told = pack(&src, Path::new("src"), io::sink()).expect("packed");
    assert!(told.len() == LEFT_OUT_MAX && told[99].ends_with(", and 2 more"), "{told:?}");
}

#[test]
fn archive_without_an_end_is_an_error_and_leaves_no_half_file() {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = source(dir.path());
    let whole = packed(&src, "src");
    for (number, cut) in [0, 100, 512, 700, 100_000, whole.len() - 1024].into_iter().enumerate() {
        let to = dir.path().join(number.to_string());
        fs::create_dir_all(to.join("src")).expect("made");
        fs::write(to.join("src/plain"), "before").expect("written");
        let broken = into(&whole[..cut], &to, AS_CP_A).expect_err("cut");
        assert!(broken.to_string().contains("breaks off"), "{cut}: {broken}");
        let plain = fs::read(to.join("src/plain")).expect("there");
        assert!(plain == b"before" || plain.len() == 250_000, "{cut}: {}", plain.len());
        let hidden = tree(&to).into_keys().find(|path| path.to_string_lossy().contains(".pve-"));
        assert_eq!(hidden, None, "{cut}");
    }
    // A stream that fails is no end either.
    struct Fails<'a>(&'a [u8]);
    impl Read for Fails<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            if read == 0 { Err(io::Error::other("gone")) } else { Ok(read) }
        }
    }
    let to = Destination { dir: dir.path().join("0"), root: Root::Kept, is_new: false };
    let broken = unpack(Fails(&whole[..9000]), &KEPT, |_| Ok::<_, Error>(to)).expect_err("gone");
    assert!(matches!(broken, Error::Stream(_)), "{broken}");
}

#[test]
fn packing_that_fails_makes_no_whole_archive() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut bytes = Vec::new();
    pack(Path::new("/proc/self/pagemap"), Path::new("x"), &mut bytes).expect_err("endless");
    into(&bytes, dir.path(), KEPT).expect_err("not whole");
}

#[test]
fn kinds_do_not_replace_each_other_but_for_a_file_and_a_link() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::create_dir(dir.path().join("folder")).expect("made");
    fs::write(dir.path().join("file"), "file").expect("written");
    let link = EntryType::Symlink;
    for bad in [("folder", FILE, "x"), ("folder", link, "x"), ("file", EntryType::Directory, "")] {
        into(&archive(&[bad]), dir.path(), KEPT).expect_err("another kind");
    }
    symlink("file", dir.path().join("link")).expect("linked");
    into(&archive(&[("link", FILE, "new"), ("file", link, "link")]), dir.path(), KEPT)
        .expect("put");
    assert_eq!(fs::read(dir.path().join("link")).expect("read"), b"new");
    assert!(dir.path().join("file").is_symlink());
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    let refused = into(&archive(&[("pipe", FILE, "new")]), dir.path(), KEPT).expect_err("a pipe");
    assert!(refused.to_string().contains("which is not replaced"), "{refused}");
    assert!(fs::metadata(dir.path().join("pipe")).expect("there").file_type().is_fifo());
}

#[test]
fn directories_get_their_modes_also_when_a_broken_copy_is_repeated() {
    let dir = tempfile::tempdir().expect("tempdir");
    let src = dir.path().join("src");
    fs::create_dir_all(src.join("deep")).expect("made");
    set(&src, 0o2750, (0, 0));
    set(&src.join("deep"), 0o500, (0, 0));
    let (whole, to) = (packed(&src, "src"), dir.path().join("to"));
    fs::create_dir(&to).expect("made");
    into(&whole[..whole.len() - 1024], &to, KEPT).expect_err("cut");
    into(&whole, &to, KEPT).expect("unpacked");
    let mode = |path: &str| fs::metadata(to.join(path)).expect(path).mode() & 0o7777;
    assert_eq!((mode("src"), mode("src/deep")), (0o750, 0o700), "as far as it was told");
}

#[test]
fn directory_whose_entry_comes_after_its_content_gets_its_mode() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut entries = archive(&[("ssh/key", FILE, "k"), ("ssh", EntryType::Directory, "")]);
    // The mode of the second entry, which follows the content of the first.
    let header = &mut entries[1024..1536];
    let mut private = Header::new_ustar();
    private.as_mut_bytes().copy_from_slice(header);
    private.set_mode(0o700);
    private.set_cksum();
    header.copy_from_slice(private.as_bytes());
    into(&entries, dir.path(), KEPT).expect("unpacked");
    assert_eq!(fs::metadata(dir.path().join("ssh")).expect("there").mode() & 0o777, 0o700);
}

#[test]
fn header_without_end_and_sparse_files_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let to = Destination { dir: dir.path().to_owned(), root: Root::Kept, is_new: false };
    for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(1 << 40);
        header.set_cksum();
        let endless = header.as_bytes().chain(io::repeat(b'a'));
        let place = |_: &First| Ok::<_, Error>(to.clone());
        let refused = unpack(endless, &KEPT, place).expect_err("too long");
        assert!(refused.to_string().contains("a header is too long"), "{kind:?}: {refused}");
    }
    let mut sparse = tar::Builder::new(Vec::new());
    sparse.append_pax_extensions([("GNU.sparse.major", b"1".as_slice())]).expect("in memory");
    let mut header = Header::new_ustar();
    header.set_path("GNUSparseFile.0/disk").expect("short");
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(0);
    header.set_cksum();
    sparse.append(&header, io::empty()).expect("in memory");
    let refused = into(&sparse.into_inner().expect("in memory"), dir.path(), KEPT);
    assert!(refused.expect_err("sparse").to_string().contains("is a sparse file"));
    assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 0);
}

#[test]
fn hostile_entries_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let to = dir.path().join("to");
    fs::create_dir(&to).expect("made");
    fs::write(dir.path().join("secret"), "s").expect("written");
    for bad in [
        ("../evil", FILE, "x"),
        ("a/../../evil", FILE, "x"),
        ("/tmp/pve-sandbox-evil", FILE, "x"),
        ("l", EntryType::Link, "../secret"),
        ("l", EntryType::Link, "/etc/hostname"),
        ("null", EntryType::Char, ""),
        ("pipe", EntryType::Fifo, ""),
        (".", FILE, "x"),
    ] {
        let refused = into(&archive(&[bad]), &to, KEPT).expect_err("hostile");
        assert!(matches!(refused, Error::Invalid(_)), "{bad:?}: {refused}");
    }
    assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 2);
    assert!(!Path::new("/tmp/pve-sandbox-evil").exists());
    into(b"no archive at all, just a few words", &to, KEPT).expect_err("no archive");
}

#[test]
fn path_longer_than_that_of_a_file_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().expect("tempdir");
    let deep = |levels: usize| format!("{}file", "d/".repeat(levels));
    let unpacked = |path: &str, kind: EntryType, link: &str| {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(0);
        if kind == EntryType::Link {
            archive.append_link(&mut header, path, link).expect("in memory");
        } else {
            archive.append_data(&mut header, path, io::empty()).expect("in memory");
        }
        into(&archive.into_inner().expect("in memory"), dir.path(), KEPT)
    };
    for (path, kind, link) in [(deep(2100), FILE, ""), ("l".into(), EntryType::Link, &*deep(2100))]
    {
        let refused = unpacked(&path, kind, link).expect_err("too long");
        assert!(matches!(&refused, Error::Invalid(why) if why.contains("4096")), "{refused}");
        assert!(refused.to_string().len() < 200, "the path itself is not shown");
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 0);
    }
    assert_eq!(unpacked(&deep(500), FILE, "").expect("unpacked").entries, 1);
}

#[test]
fn archive_of_long_paths_alone_makes_a_bounded_number_of_directories() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut archive = tar::Builder::new(Vec::new());
    for number in 0..=MADE_MAX / 2000 {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(0);
        let path = format!("{number}/{}file", "d/".repeat(1999));
        archive.append_data(&mut header, path, io::empty()).expect("in memory");
    }
    let refused = into(&archive.into_inner().expect("in memory"), dir.path(), KEPT);
    let refused = refused.expect_err("too many");
    assert!(matches!(&refused, Error::Invalid(why) if why.contains("100000")), "{refused}");
}

const FILE: EntryType = EntryType::Regular;

/// Builds an archive entry by entry; the library refuses such names, so they are written directly.
fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, kind, content) in entries {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
        if is_link {
            header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
        }
        let content = if is_link { "" } else { content };
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content.as_bytes()).expect("in memory");
    }
    archive.into_inner().expect("in memory")
}
