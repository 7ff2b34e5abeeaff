//! The cluster file system as the kernel sees it: two nodes, two real mounts. Needs root; skipped,
//! with a message, only where PVE_SANDBOX_SKIP_ROOT_TESTS is set.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use lab::pmxcfs::cluster::Member;
use lab::pmxcfs::control::Order;
use lab::pmxcfs::daemon::{Mount, Mounted, mount};
use nix::errno::Errno;
use tempfile::TempDir;

struct Pair {
    mounted: Option<Mounted>,
    dir: TempDir,
}

impl Pair {
    fn start() -> Option<Pair> {
        if std::env::var_os("PVE_SANDBOX_SKIP_ROOT_TESTS").is_some() {
            println!("left out: PVE_SANDBOX_SKIP_ROOT_TESTS is set");
            return None;
        }
        let dir = tempfile::tempdir().expect("tempdir");
        let mut pair = Pair { mounted: None, dir };
        pair.mount();
        Some(pair)
    }

    fn mount(&mut self) {
        let mounts: Vec<Mount> = (1..=2)
            .map(|id| Mount {
                node: format!("node{id}"),
                member: Member {
                    id,
                    ip: format!("10.99.0.{id}"),
                    up: true,
                    cut: false,
                    unheard: false,
                    stopped: false,
                },
                dir: self.dir.path().join(format!("node{id}")),
                pid_file: None,
            })
            .collect();
        let store = self.dir.path().join("store");
        self.mounted = Some(mount(&store, &mounts).expect("mounting needs root"));
    }

    fn at(&self, node: &str, path: &str) -> PathBuf {
        self.dir.path().join(node).join(path)
    }

    fn order(&self, order: &Order) {
        let mounted = self.mounted.as_ref().expect("it is mounted");
        assert_eq!(mounted.obey(order), None);
    }
}

fn new(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Errno {
    Errno::from_raw(result.expect_err("it is refused").raw_os_error().expect("an errno"))
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("it is read")).expect("it is JSON")
}

#[test]
fn vmid_is_used_once_in_the_cluster() {
    let Some(pair) = Pair::start() else { return };
    let one = pair.at("node1", "lxc/100000.conf");
    new(&one).expect("the first is made").write_all(b"#mark\nlock: create\n").expect("written");
    assert_eq!(errno(new(&one)), Errno::EEXIST);
    assert_eq!(errno(new(&pair.at("node2", "lxc/100000.conf"))), Errno::EEXIST);
    // Without O_EXCL, too: it would be another file with a guest number that is taken.
    assert_eq!(errno(File::create(pair.at("node2", "lxc/100000.conf"))), Errno::EEXIST);
    // The other node sees it at once, in node1's directory.
    let seen = pair.at("node2", "nodes/node1/lxc/100000.conf");
    assert_eq!(fs::read_to_string(seen).expect("read"), "#mark\nlock: create\n");
    let vmlist = json(&pair.at("node2", ".vmlist"));
    assert_eq!(vmlist["ids"]["100000"]["node"], "node1");
    assert_eq!(vmlist["ids"]["100000"]["type"], "lxc");

    let temporary = pair.at("node2", "lxc/100000.conf.tmp.7");
    fs::write(&temporary, "x").expect("a temporary name is free");
    assert_eq!(errno(fs::rename(&temporary, pair.at("node2", "lxc/100000.conf"))), Errno::EEXIST);
}

#[test]
fn hundred_vmid_races_have_one_winner_each() {
    let Some(pair) = Pair::start() else { return };
    let race = |node: &'static str| {
        let lxc = pair.at(node, "lxc");
        move || (200..300).filter(|id| new(&lxc.join(format!("{id}.conf"))).is_ok()).count()
    };
    let (one, two) = (race("node1"), race("node2"));
    let (first, second) = std::thread::scope(|scope| {
        let (one, two) = (scope.spawn(one), scope.spawn(two));
        (one.join().expect("no panic"), two.join().expect("no panic"))
    });
    assert_eq!(first + second, 100, "{first} and {second}");
    let ids = json(&pair.at("node1", ".vmlist"));
    assert_eq!(ids["ids"].as_object().map(serde_json::Map::len), Some(100));
}

#[test]
fn a_config_is_replaced_and_moved_by_rename() {
    let Some(pair) = Pair::start() else { return };
    let conf = pair.at("node1", "lxc/100.conf");
    fs::write(&conf, "memory: 1\n").expect("written");
    let version =
        || json(&pair.at("node1", ".vmlist"))["ids"]["100"]["version"].as_u64().expect("a number");
    let before = version();
    let mut open = File::open(&conf).expect("opened");
    let temporary = pair.at("node1", "lxc/100.conf.tmp.9");
    fs::write(&temporary, "memory: 2\n").expect("written");
    fs::rename(&temporary, &conf).expect("replaced");
    assert_eq!(fs::read_to_string(&conf).expect("read"), "memory: 2\n");
    assert!(version() > before);
    let mut old = String::new();
    open.read_to_string(&mut old).expect("an open handle stays good");
    assert_eq!(old, "memory: 1\n");

    let moved = pair.at("node1", "nodes/node2/lxc/100.conf");
    fs::rename(&conf, moved).expect("moved");
    assert_eq!(fs::read_to_string(pair.at("node2", "lxc/100.conf")).expect("read"), "memory: 2\n");
    assert_eq!(json(&pair.at("node1", ".vmlist"))["ids"]["100"]["node"], "node2");
    fs::remove_file(pair.at("node2", "local/lxc/100.conf")).expect("removed");
    assert!(json(&pair.at("node1", ".vmlist"))["ids"].get("100").is_none());
}

#[test]
fn modes_are_forced_and_special_files_refused() {
    let Some(pair) = Pair::start() else { return };
    let at = |path: &str| pair.at("node1", path);
    fs::write(at("x"), "").expect("written");
    fs::write(at("priv/key"), "").expect("written");
    let mode = |path: &str| fs::metadata(at(path)).expect("there").mode() & 0o7777;
    let modes = [mode("x"), mode("priv/key"), mode("priv"), mode("nodes"), mode(".members")];
    assert_eq!(modes, [0o640, 0o600, 0o700, 0o755, 0o440]);
    assert_eq!(fs::metadata(at("x")).expect("there").gid(), 33);
    let refused = fs::set_permissions(at("x"), Permissions::from_mode(0o777));
    assert_eq!(errno(refused), Errno::EPERM);
    fs::set_permissions(at("x"), Permissions::from_mode(0o640)).expect("the forced mode is");
    assert_eq!(errno(std::os::unix::fs::chown(at("x"), Some(1), None)), Errno::EPERM);
    assert_eq!(errno(symlink("a", at("y"))), Errno::ENOSYS);
    // Newer kernels return another error.
    assert!([Errno::ENOSYS, Errno::EPERM].contains(&errno(fs::hard_link(at("x"), at("z")))));
    let fifo = nix::unistd::mkfifo(&at("f"), nix::sys::stat::Mode::S_IRWXU);
    assert_eq!(fifo, Err(Errno::ENOSYS));
    assert_eq!(errno(OpenOptions::new().write(true).open(at(".vmlist"))), Errno::EACCES);
    assert_eq!(fs::read_link(at("lxc")).expect("a link"), Path::new("nodes/node1/lxc"));
    assert_eq!(fs::read_link(at("local")).expect("a link"), Path::new("nodes/node1"));
}

#[test]
fn file_sizes_times_and_locks_work_as_in_pmxcfs() {
    let Some(pair) = Pair::start() else { return };
    let at = |path: &str| pair.at("node1", path);
    let mut big = new(&at("big")).expect("made");
    big.write_all(&vec![b'x'; 1024 * 1024]).expect("1 MiB fits");
    assert_eq!(errno(big.write_all(b"x")), Errno::EFBIG);
    assert_eq!(errno(big.set_len(1024 * 1024 + 1)), Errno::EFBIG);
    big.set_len(3).expect("cut");
    big.write_all_at(b"y", 4).expect("with a hole");
    assert_eq!(fs::read(at("big")).expect("read"), b"xxx\0y");
    // PVE's own locks: a directory is created, kept alive by its time, and removed.
    let lock = at("priv/lock/storage-x");
    fs::create_dir(&lock).expect("taken");
    let taken = fs::create_dir(pair.at("node2", "priv/lock/storage-x"));
    assert_eq!(taken.expect_err("taken").kind(), ErrorKind::AlreadyExists);
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000);
    File::open(&lock).expect("opened").set_modified(time).expect("the time is set");
    assert_eq!(fs::metadata(&lock).expect("there").modified().expect("a time"), time);
    fs::remove_dir(pair.at("node2", "priv/lock/storage-x")).expect("released");
    assert!(!lock.exists());
}

#[test]
fn without_quorum_nothing_is_written() {
    let Some(pair) = Pair::start() else { return };
    let at = |path: &str| pair.at("node1", path);
    let quorate = |node: &str| json(&pair.at(node, ".members"))["cluster"]["quorate"].clone();
    fs::write(at("lxc/100.conf"), "a: b\n").expect("written");
    assert_eq!((quorate("node1"), quorate("node2")), (1.into(), 1.into()));
    let mut open = OpenOptions::new().append(true).open(at("lxc/100.conf")).expect("opened");
    pair.order(&Order::Quorum { node: "node1".to_owned(), on: false });
    assert_eq!(quorate("node1"), 0);
    let members = json(&at(".members"));
    assert_eq!(members["nodelist"]["node1"]["online"], 1);
    assert_eq!(members["nodelist"]["node2"]["online"], 0);
    assert_eq!(fs::read_to_string(at("lxc/100.conf")).expect("it is still read"), "a: b\n");
    for refused in [
        errno(open.write_all(b"c")),
        errno(new(&at("lxc/101.conf"))),
        errno(fs::write(at("lxc/100.conf"), "c")),
        errno(fs::rename(at("lxc/100.conf"), at("lxc/102.conf"))),
        errno(fs::remove_file(at("lxc/100.conf"))),
        errno(fs::create_dir(at("priv/lock/x"))),
        errno(fs::remove_dir(at("priv/lock"))),
    ] {
        assert_eq!(refused, Errno::EACCES);
    }
    pair.order(&Order::Quorum { node: "node1".to_owned(), on: true });
    assert_eq!(quorate("node1"), 1);
    fs::write(at("lxc/100.conf"), "c").expect("it is written again");
}

#[test]
fn member_without_corosync_differs_from_a_lone_node_in_two_signs() {
    let Some(pair) = Pair::start() else { return };
    let at = |path: &str| pair.at("node1", path);
    fs::write(at("lxc/100.conf"), "a: b\n").expect("written");
    let mode = |path: &str| fs::metadata(at(path)).expect("there").mode() & 0o7777;
    assert_eq!((mode("nodes"), mode("lxc/100.conf")), (0o755, 0o640));
    pair.order(&Order::Corosync { node: "node1".to_owned(), on: false });
    let members = json(&at(".members"));
    assert_eq!(members["nodename"], "node1");
    assert!(members.get("cluster").is_none() && members.get("nodelist").is_none());
    assert!(at("corosync.conf").exists());
    assert_eq!((mode("nodes"), mode("lxc/100.conf")), (0o555, 0o440));
    assert_eq!(errno(fs::write(at("lxc/100.conf"), "c")), Errno::EACCES);
    assert_eq!(fs::read_to_string(at("lxc/100.conf")).expect("it is still read"), "a: b\n");
    pair.order(&Order::Corosync { node: "node1".to_owned(), on: true });
    assert_eq!(json(&at(".members"))["cluster"]["quorate"], 1);
    fs::write(at("lxc/100.conf"), "c").expect("it is written again");
}

#[test]
fn stopped_mount_is_empty_and_complete_after_a_restart() {
    let Some(mut pair) = Pair::start() else { return };
    let root = pair.at("node1", "");
    fs::write(pair.at("node1", "lxc/100.conf"), "a: b\n").expect("written");
    fs::write(pair.at("node1", "storage.cfg"), "dir: local\n").expect("written");
    pair.order(&Order::Running { node: "node1".to_owned(), on: false });
    assert_eq!(fs::read_dir(&root).expect("read").count(), 0);
    assert!(!root.join(".members").exists() && !root.join("lxc/100.conf").exists());
    assert!(pair.at("node2", "nodes/node1/lxc/100.conf").exists());
    pair.order(&Order::Running { node: "node1".to_owned(), on: true });
    assert!(root.join("lxc/100.conf").exists());
    let names: Vec<String> = fs::read_dir(&root)
        .expect("read")
        .map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned())
        .collect();
    for name in [".members", ".version", ".vmlist", "local", "lxc", "nodes", "priv", "storage.cfg"]
    {
        assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
    }

    // The daemon restarts: the files are there, the counters start again.
    drop(pair.mounted.take());
    pair.mount();
    assert_eq!(fs::read_to_string(root.join("lxc/100.conf")).expect("read"), "a: b\n");
    assert_eq!(json(&root.join(".vmlist"))["ids"]["100"]["version"], 1);
    assert!(json(&root.join(".version"))["starttime"].as_u64() > Some(0));
}
