//! The rules of `cp`, row by row of docs/copying.md, beside `cp -a` on copies of the same trees.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::fake::{Behaviour, Fake, ID, finish};

const TABLES: &str = include_str!("../../../docs/copying.md");

/// Row of the table: source, destination, what is written, what `cp -a` does.
fn rows() -> Vec<[String; 4]> {
    let plain = |cell: &str| cell.trim().trim_matches('`').to_owned();
    let rows = TABLES.lines().skip_while(|line| !line.starts_with("| SRC |")).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(plain).collect();
            cells.try_into().expect("four cells")
        })
        .collect()
}

fn own(path: &Path, mode: u32, id: u32) {
    chown(path, Some(id), Some(id)).expect("chown");
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
}

/// Sets a time that is long ago, so that what a copy has touched can be told.
fn age(path: &Path) {
    let (when, flag) = (
        nix::sys::time::TimeSpec::new(1_000_000_000, 0),
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    );
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &when, &when, flag).expect("aged");
}

fn source(base: &Path) {
    fs::create_dir_all(base.join("d")).expect("made");
    for (name, mode, id) in [("f", 0o6750, 1000), ("d/x", 0o604, 70_000)] {
        fs::write(base.join(name), name).expect("written");
        own(&base.join(name), mode, id);
    }
    own(&base.join("d"), 0o1771, 1001);
    for (target, name) in [("f", "lf"), ("d", "ld")] {
        symlink(target, base.join(name)).expect("linked");
    }
    for name in ["f", "d/x", "d", "lf", "ld"] {
        age(&base.join(name));
    }
}

fn destination(base: &Path) {
    fs::create_dir_all(base.join("dir")).expect("made");
    fs::create_dir_all(base.join("taken/f")).expect("made");
    for name in ["file", "taken/d"] {
        fs::write(base.join(name), "before").expect("written");
        own(&base.join(name), 0o4755, 33);
    }
    own(&base.join("dir"), 0o750, 34);
    for (target, name) in [("dir", "todir"), ("file", "tofile"), ("nowhere", "dangling")] {
        symlink(target, base.join(name)).expect("linked");
    }
    for name in ["dir", "taken/f", "taken/d", "taken", "file", "todir", "tofile", "dangling"] {
        age(&base.join(name));
    }
}

/// Attributes and content of everything below a directory, by path.
fn tree(dir: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut left) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(path) = left.pop() {
        let about = fs::symlink_metadata(&path).expect("there");
        let content = if about.is_dir() {
            left.extend(fs::read_dir(&path).expect("listed").map(|e| e.expect("entry").path()));
            String::new()
        } else if about.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).expect("a link"))
        } else {
            fs::read_to_string(&path).expect("read")
        };
        let at = if about.mtime() == 1_000_000_000 { "then" } else { "now" };
        let text = format!("{:o} {}:{} {at} {content}", about.mode(), about.uid(), about.gid());
        found.insert(path.strip_prefix(dir).expect("below").to_owned(), text);
    }
    found.remove(Path::new(""));
    found
}

#[tokio::test]
async fn every_row_of_the_table_holds_in_both_directions_and_beside_cp_a() {
    let rows = rows();
    assert!(rows.len() > 30, "the table was misread");
    for [from, to, written, by_cp] in rows {
        let row = format!("{from} | {to}");
        let fake = Fake::start(Behaviour::default()).await;
        let files = &fake.behaviour.files;
        let local = tempfile::tempdir().expect("tempdir");
        let here = |name: &str| format!("{}/{name}", local.path().display());
        source(&files.at("/src"));
        source(Path::new(&here("src")));
        for base in ["up", "down", "cp"]
            .map(&here)
            .into_iter()
            .chain([files.at("/up").display().to_string()])
        {
            destination(Path::new(&base));
        }
        let before = tree(Path::new(&here("cp")));

        let (local_from, from_there) = (here(&format!("src/{from}")), format!("{ID}:/src/{from}"));
        let (up_to, down_to) = (format!("{ID}:/up/{to}"), here(&format!("down/{to}")));
        let up = fake.run(&["cp", "-a", &local_from, &up_to]).await;
        let down = fake.run(&["cp", "-a", &from_there, &down_to]).await;
        let cp = ["-a", &local_from, &here(&format!("cp/{to}"))];
        let cp = Command::new("cp").args(cp).output().expect("cp");

        let is_error = written == "error";
        assert_eq!(up.code == Some(0), !is_error, "into a sandbox: {row}: {up:?}");
        assert_eq!(down.code == Some(0), !is_error, "out of one: {row}: {down:?}");
        let results = [tree(&files.at("/up")), tree(Path::new(&here("down")))];
        let theirs = if by_cp.is_empty() {
            assert_eq!(cp.status.success(), !is_error, "cp -a: {row}: {cp:?}");
            Some(tree(Path::new(&here("cp"))))
        } else {
            assert!(by_cp == "error" && !cp.status.success(), "cp -a: {row}: {cp:?}");
            None
        };
        for ours in results {
            if is_error {
                assert_eq!(ours, before, "{row}: nothing is changed");
                continue;
            }
            assert_ne!(ours.get(Path::new(&written)), before.get(Path::new(&written)), "{row}");
            if let Some(theirs) = &theirs {
                assert_eq!(&ours, theirs, "{row}");
            }
        }
    }
}

#[tokio::test]
async fn owners_and_permissions_stay_unless_they_are_asked_for() {
    for (flags, new, over, dir) in [
        (&[][..], (0o750, 0), (0o4755, 33), (0o750, 34)),
        (&["-a"], (0o6750, 1000), (0o6750, 1000), (0o1771, 1001)),
        (&["--chown", "70000:8"], (0o750, 70_000), (0o4755, 70_000), (0o750, 70_000)),
        (&["-a", "--chown", "7:8"], (0o750, 7), (0o750, 7), (0o1771, 7)),
    ] {
        let fake = Fake::start(Behaviour::default()).await;
        let files = &fake.behaviour.files;
        let local = tempfile::tempdir().expect("tempdir");
        let here = |name: &str| format!("{}/{name}", local.path().display());
        let bases = [files.at("/up"), PathBuf::from(here("down"))];
        source(&files.at("/src"));
        source(Path::new(&here("src")));
        bases.iter().for_each(|base| destination(base));
        for (from, to) in [("f", "new"), ("f", "file"), ("d/.", "dir")] {
            let up = [here(&format!("src/{from}")), format!("{ID}:/up/{to}")];
            let down = [format!("{ID}:/src/{from}"), here(&format!("down/{to}"))];
            for [from, to] in [up, down] {
                let ran = fake.run(&[&["cp"], flags, &[&from, &to]].concat()).await;
                assert_eq!(ran.code, Some(0), "{flags:?} {ran:?}");
            }
        }
        for base in bases {
            let about = |name: &str| {
                let about = fs::metadata(base.join(name)).expect(name);
                (about.mode() & 0o7777, about.uid())
            };
            assert_eq!((about("new"), about("file"), about("dir")), (new, over, dir), "{flags:?}");
        }
    }
    let fake = Fake::start(Behaviour::default()).await;
    for bad in ["", ":", "a b", "4294967295", "no:such:owner"] {
        let ran = fake.run(&["cp", "--chown", bad, "/etc/hostname", &format!("{ID}:/x")]).await;
        assert_eq!(ran.code, Some(2), "{bad}: {ran:?}");
    }
    let ran = fake.run(&["cp", "--chown", "no-such-owner", &format!("{ID}:/"), "/tmp"]).await;
    assert!(ran.code == Some(2) && ran.stderr.contains("no-such-owner"), "{ran:?}");
}

#[tokio::test]
async fn target_of_a_link_is_copied_with_follow_link() {
    let fake = Fake::start(Behaviour::default()).await;
    let files = &fake.behaviour.files;
    let local = tempfile::tempdir().expect("tempdir");
    let here = |name: &str| format!("{}/{name}", local.path().display());
    source(&files.at("/src"));
    source(Path::new(&here("src")));
    for dir in [files.at("/up"), PathBuf::from(here("down"))] {
        fs::create_dir(dir).expect("made");
    }
    for name in ["lf", "ld"] {
        for [from, to] in [
            [here(&format!("src/{name}")), format!("{ID}:/up")],
            [format!("{ID}:/src/{name}"), here("down")],
        ] {
            let ran = fake.run(&["cp", "-L", &from, &to]).await;
            assert_eq!(ran.code, Some(0), "{ran:?}");
        }
    }
    for dir in [files.at("/up"), PathBuf::from(here("down"))] {
        assert!(fs::symlink_metadata(dir.join("lf")).expect("there").is_file());
        assert_eq!(fs::read(dir.join("ld/x")).expect("there"), b"d/x");
    }
}

#[tokio::test]
async fn whole_root_of_a_sandbox_is_copied() {
    let fake = Fake::start(Behaviour::default()).await;
    source(&fake.behaviour.files.at("/src"));
    let local = tempfile::tempdir().expect("tempdir");
    for (to, result) in [("new", "new/src/f"), (".", "src/f")] {
        let to = local.path().join(to).display().to_string();
        let ran = fake.run(&["cp", &format!("{ID}:/"), &to]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(fs::read(local.path().join(result)).expect("there"), b"f");
    }
}

#[tokio::test]
async fn files_that_are_left_out_are_named() {
    let fake = Fake::start(Behaviour::default()).await;
    let files = &fake.behaviour.files;
    let local = tempfile::tempdir().expect("tempdir");
    let here = |name: &str| format!("{}/{name}", local.path().display());
    for dir in [files.at("/src"), PathBuf::from(here("src"))] {
        source(&dir);
        let path = dir.join("d/pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
    }
    for [from, to] in [[here("src/d"), format!("{ID}:/up")], [format!("{ID}:/src/d"), here("down")]]
    {
        let ran = fake.run(&["cp", &from, &to]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(
            ran.stderr.starts_with("left out: ") && ran.stderr.contains("d/pipe (a pipe)"),
            "{ran:?}"
        );
        let json = fake.run(&["cp", "--json", &from, &to]).await.json();
        assert!(
            json["left_out"][0].as_str().is_some_and(|it| it.ends_with("d/pipe (a pipe)")),
            "{json}"
        );
    }
    let alone = fake.run(&["cp", &here("src/d/pipe"), &format!("{ID}:/pipe")]).await;
    assert!(alone.code == Some(1) && alone.stderr.contains("d/pipe"), "{alone:?}");
    let alone = fake.run(&["cp", &format!("{ID}:/src/d/pipe"), &here("pipe")]).await;
    assert!(alone.code == Some(1) && !Path::new(&here("pipe")).exists(), "{alone:?}");
}

/// True once a process catches SIGTERM.
fn listens(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = u64::from_str_radix(caught.expect("a mask").trim(), 16).expect("a mask");
    caught & (1 << (Signal::SIGTERM as u64 - 1)) != 0
}

#[tokio::test]
async fn interrupted_copy_leaves_nothing_on_either_side() {
    let fake = Fake::start(Behaviour { archives_stall: true, ..Behaviour::default() }).await;
    let files = &fake.behaviour.files;
    let local = tempfile::tempdir().expect("tempdir");
    let here = |name: &str| format!("{}/{name}", local.path().display());
    files.put("/src/large", &"x".repeat(1_000_000));
    fs::create_dir_all(files.at("/up")).expect("made");
    fs::write(here("there"), "before").expect("written");
    fs::write(here("large"), vec![0; 1_000_000]).expect("written");
    let endless = format!("{ID}:/up/new");
    let before = (tree(local.path()), files.all());
    for (from, to) in [
        (format!("{ID}:/src"), here("new")),
        (format!("{ID}:/src/large"), here("there")),
        ("-".to_owned(), endless),
    ] {
        for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
            let mut command = fake.command(&["cp", &from, &to]);
            let mut child = command.stdin(std::process::Stdio::piped()).spawn().expect("spawned");
            // Stays open: the archive has no end.
            let stdin = child.stdin.take();
            let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).expect("runs");
            let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
            while !listens(pid) {
                assert!(tokio::time::Instant::now() < deadline, "cp listens to no signal");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            kill(Pid::from_raw(pid), signal).expect("signalled");
            let ran = finish(child).await;
            assert_eq!(ran.code, Some(code), "{from} {to}: {ran:?}");
            assert!(ran.stderr.contains("interrupted"), "{ran:?}");
            drop(stdin);
            assert_eq!((tree(local.path()), files.all()), before, "{from} {to}");
        }
    }
}
