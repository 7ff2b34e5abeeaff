//! Faults of a disk under the agent's journal: lost power, a torn log, no space. The file systems
//! are real, on loop devices and in memory; so this needs root, as the lab does. Where nothing can
//! be mounted, `PVE_SANDBOX_SKIP_DISK_TESTS=1` skips these tests, with a message.

#![expect(
    clippy::disallowed_methods,
    reason = "the bans are for the daemons; tests start programs and wait for the real clock"
)]

mod disk;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use agent::journal::{Error, Feed, Intent, Journal as _, Phase, Pools, Record, SqliteJournal};
use disk::Disk;
use nix::sys::signal::{self, Signal};
use proto::id::Vmid;

const WRITER: &str = env!("CARGO_BIN_EXE_journal-writer");

fn pools() -> Pools {
    Pools {
        vmids: (vmid(100_000), vmid(900_000)),
        addresses: (Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 9)),
        address_quarantine_ms: 0,
    }
}

fn skipped() -> bool {
    let skipped = std::env::var_os("PVE_SANDBOX_SKIP_DISK_TESTS").is_some_and(|value| value == "1");
    if skipped {
        eprintln!("skipped: PVE_SANDBOX_SKIP_DISK_TESTS=1");
    }
    skipped
}

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

async fn records(path: &Path) -> BTreeMap<String, Record> {
    let journal = SqliteJournal::open(path, pools()).expect("opens");
    let all = journal.all().await.expect("reads");
    all.into_iter().map(|record| (record.id.to_string(), record)).collect()
}

/// Runs the writer until it has acknowledged `count` writes, then causes `fault`, and reads to its
/// end. Returns the last acknowledged revision of each record, and the exit status.
fn write_until(
    path: &Path,
    count: usize,
    fault: impl FnOnce(&mut std::process::Child),
) -> (BTreeMap<String, u64>, std::process::ExitStatus) {
    let mut writer = Command::new(WRITER)
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the writer starts");
    let mut lines = BufReader::new(writer.stdout.take().expect("piped")).lines();
    let mut acked = BTreeMap::new();
    let mut note = |line: std::io::Result<String>| {
        let line = line.expect("a line");
        let (id, revision) = line.split_once(' ').expect("two words");
        acked.insert(id.to_owned(), revision.parse().expect("a number"));
    };
    for _ in 0..count {
        note(lines.next().expect("it goes on"));
    }
    fault(&mut writer);
    lines.for_each(&mut note);
    (acked, writer.wait().expect("it ends"))
}

/// A stopped program: none of its threads is in a system call.
struct Stopped(nix::unistd::Pid);

impl Stopped {
    fn new(pid: u32) -> Self {
        let pid = nix::unistd::Pid::from_raw(pid.try_into().expect("a pid"));
        signal::kill(pid, Signal::SIGSTOP).expect("stopped");
        let until = Instant::now() + Duration::from_secs(10);
        while !threads(pid).iter().all(|state| *state == 'T') {
            assert!(Instant::now() < until, "{:?}", threads(pid));
            std::thread::sleep(Duration::from_millis(1));
        }
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal::kill(self.0, Signal::SIGCONT).expect("goes on");
    }
}

/// Returns the states of a program's threads, as in proc(5).
fn threads(pid: nix::unistd::Pid) -> Vec<char> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let state = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    };
    tasks.filter_map(state).collect()
}

/// Cuts the power during writes: unsynced data is lost, and nothing else.
#[tokio::test]
async fn acknowledged_writes_survive_a_power_cut() {
    if skipped() {
        return;
    }
    let mut aborted = 0;
    for count in [1, 40, 333, 1200, 2500] {
        let disk = Disk::ext4(128);
        let unsynced = disk.path().join("unsynced");
        let path = disk.path().join("journal.sqlite");
        let (acked, ended) = write_until(&path, count, |writer| {
            std::fs::write(&unsynced, vec![7; 1 << 16]).expect("written");
            // If ext4 is shut down during a sync, the sync reports success although it failed (seen
            // with only fdatasync in a loop). No disk does that, so no sync may run meanwhile.
            let stopped = Stopped::new(writer.id());
            disk.cut_power();
            drop(stopped);
        });
        // The writer sees a failed read, or ends at once: a retry of a failed sync would lie.
        assert!(!ended.success(), "{ended}");
        aborted += usize::from(ended.signal() == Some(nix::libc::SIGABRT));
        let disk = disk.power_on();
        let kept = std::fs::metadata(&unsynced).map_or(0, |file| file.len());
        assert_eq!(kept, 0, "this disk keeps what was not synced: it proves nothing");
        let found = records(&path).await;
        for (id, revision) in &acked {
            let record = found.get(id).unwrap_or_else(|| panic!("{id} of {count} is lost"));
            assert!(record.revision >= *revision, "{id}: {} of {revision}", record.revision);
        }
        drop(disk);
    }
    assert!(aborted > 0, "no sync failed in front of anybody");
}

/// Tears the last writes of the log off at many places: the journal opens with all earlier writes,
/// in order.
#[tokio::test]
async fn torn_log_opens_with_all_earlier_writes() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let (acked, _) = write_until(&path, 24, |writer| writer.kill().expect("killed"));
    let read = |name: &str| std::fs::read(dir.path().join(name)).expect("read");
    let (base, log) = (read("journal.sqlite"), read("journal.sqlite-wal"));
    assert!(log.len() > 30_000, "{} bytes", log.len());
    let mut before = 0;
    // Every byte around the ends of frames, and some within: a frame is a page and its header.
    let cuts = (0..=log.len()).filter(|at| (at + 2) % 4120 < 8 || at % 509 == 0);
    for cut in cuts.chain([log.len()]) {
        let torn = tempfile::tempdir().expect("a directory");
        let path = torn.path().join("journal.sqlite");
        std::fs::write(&path, &base).expect("written");
        std::fs::write(torn.path().join("journal.sqlite-wal"), &log[..cut]).expect("written");
        let revision =
            records(&path).await.values().map(|record| record.revision).max().unwrap_or_default();
        assert!(revision >= before, "{cut} of {}: {revision} after {before}", log.len());
        before = revision;
    }
    assert!(before >= acked.values().copied().max().expect("some"), "{before}");
}

/// Fills the disk: nothing new starts, living sandboxes can still be ended, and everything recovers
/// by itself when there is space.
#[tokio::test]
async fn full_disk_refuses_creations_and_lets_sandboxes_end() {
    if skipped() {
        return;
    }
    let disk = Disk::memory(48);
    let path = disk.path().join("journal.sqlite");
    // Content of the journal: as much as the writer creates in a moment.
    write_until(&path, 100, |writer| writer.kill().expect("killed"));
    let model = records(&path).await.into_values().next().expect("some");
    let journal = opened(&path).await;
    let begin = |number: u64| {
        let id = proto::id::SandboxId::new(number, &[99; 10]);
        let request_id = format!("r-{id}").parse().expect("valid");
        let (phase, ended_ms) = (Phase::Creating, 0);
        let record = Record { id, request_id, phase, ended_ms, ..model.clone() };
        let (taken, taken_ips) = Default::default();
        Intent { record, lease_address: false, taken, taken_ips }
    };
    let mut living = Vec::new();
    for number in 0..400 {
        living.push(journal.begin(begin(number), 0).await.expect("there is room"));
    }
    let filler = disk.fill();
    // The file system is full to the last byte; the journal notices here that only its reserve is
    // left.
    let refused = journal.begin(begin(1000), 0).await;
    assert_eq!(refused.expect_err("full"), Error::Full);
    for record in &living[..200] {
        for phase in [Phase::Deleting, Phase::Deleted] {
            let current = journal.get(&record.id).await.expect("reads").expect("there");
            journal.update(&Record { phase, ended_ms: 1, ..current }).await.expect("ended");
        }
    }
    // A restart in that state, then it continues.
    drop(journal);
    let journal = opened(&path).await;
    for record in &living[200..] {
        let current = journal.get(&record.id).await.expect("reads").expect("there");
        let ended = Record { phase: Phase::Deleted, ended_ms: 1, ..current };
        journal.update(&ended).await.expect("ended");
    }
    assert_eq!(journal.begin(begin(1001), 0).await.expect_err("still full"), Error::Full);
    std::fs::remove_file(filler).expect("removed");
    journal.begin(begin(1002), 0).await.expect("there is room again");
}

/// Opens the journal once the thread of the dropped handle has closed the file.
async fn opened(path: &Path) -> SqliteJournal {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match SqliteJournal::open(path, pools()) {
            Ok(journal) => return journal,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
