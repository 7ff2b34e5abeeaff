//! Commands on the controller's machine are in the log, whatever crashes.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use daemon::audit::{Kind, LINE_MAX, Line, Record};
use futures_util::TryStreamExt as _;
use tokio::time::timeout;

use super::super::{Audit, AuditQuery, LocalCommand, LocalEntry, Options, dir, recorded};
use crate::clock::{Clock, SystemClock};

const COMMAND: LocalCommand<'_> =
    LocalCommand { method: "LocalTokenCreate", object: "token:ci", owner: "red" };

/// Directory of a controller's state, and the one of its log.
fn state() -> (tempfile::TempDir, PathBuf) {
    let state = tempfile::tempdir().expect("a directory");
    let log = dir(state.path());
    (state, log)
}

async fn begin(log: &Path) -> LocalEntry {
    LocalEntry::begin(log, &SystemClock, COMMAND).await.expect("recorded")
}

async fn open(log: &Path) -> Audit {
    Audit::open(log, Arc::new(SystemClock), Options::default()).await.expect("opened")
}

async fn of_commands(audit: &Audit) -> Vec<Record> {
    let pages = audit.list(AuditQuery::default()).await.expect("readable");
    let lines = pages.try_collect::<Vec<_>>().await.expect("read").concat();
    let records = lines.into_iter().map(|line: Line| line.record);
    records.filter(|record| record.peer == "local").collect()
}

/// Waits until the log has so many entries of commands, and their file is empty.
async fn taken(audit: &Audit, log: &Path, count: usize) -> Vec<Record> {
    let is_empty = || fs::metadata(log.join("local.jsonl")).is_ok_and(|about| about.len() == 0);
    let found = async {
        loop {
            let found = of_commands(audit).await;
            if found.len() >= count && is_empty() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_mins(1), found).await.expect("taken in time")
}

#[tokio::test(start_paused = true)]
async fn command_has_its_entries_beside_a_running_controller_and_without_one() {
    let (_state, log) = state();
    // No controller has ever run.
    begin(&log).await.end(&SystemClock, true).await.expect("recorded");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&log), mode(&log.join("local.jsonl"))), (0o700, 0o600));
    let audit = open(&log).await;
    let found = taken(&audit, &log, 2).await;
    let [begun, end] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((begun.kind, begun.code.as_str()), (Kind::Begun, ""));
    assert_eq!((end.kind, end.code.as_str()), (Kind::Call, "OK"));
    for record in [begun, end] {
        assert_eq!(record.method, "LocalTokenCreate");
        assert_eq!((record.object.as_str(), record.owner.as_str()), ("token:ci", "red"));
        assert!(record.user.contains(&format!("uid {}", nix::unistd::getuid())), "{record:?}");
        // As on this machine: the tests may have been started by a login, or by a service.
        let login = fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
        let has_login = !login.is_empty() && login.trim() != "4294967295";
        assert_eq!(record.user.contains(", login "), has_login, "{record:?}");
        assert!(!has_login || record.user.contains(&format!("uid {}", login.trim())), "{record:?}");
        assert_eq!((record.team.as_str(), record.token.as_str()), ("", ""));
        assert_eq!(record.request_id, begun.request_id);
    }
    begin(&log).await.end(&SystemClock, false).await.expect("recorded");
    let found = taken(&audit, &log, 4).await;
    assert_eq!((found.len(), found[3].code.as_str()), (4, "UNKNOWN"));
    assert_ne!(found[3].request_id, found[0].request_id);
    audit.close().await;
    // What comes after the end of the controller waits for the next one.
    begin(&log).await.end(&SystemClock, true).await.expect("recorded");
    drop(audit);
    let audit = open(&log).await;
    assert_eq!(taken(&audit, &log, 6).await.len(), 6);
    let report = audit.verify(None).await.expect("readable");
    assert_eq!((report.broken, report.gaps), (None, 0));
}

#[tokio::test(start_paused = true)]
async fn command_that_crashes_has_its_begin_and_leaves_the_others_readable() {
    let (_state, log) = state();
    drop(begin(&log).await);
    let file = log.join("local.jsonl");
    let mut torn = fs::File::options().append(true).open(&file).expect("there");
    torn.write_all(br#"{"at_ms":1,"kind":"beg"#).expect("written");
    begin(&log).await.end(&SystemClock, true).await.expect("recorded");
    let foreign = Record::new(Kind::Closed, SystemClock.now_ms());
    let long = Record { object: "x".repeat(LINE_MAX), ..Record::new(Kind::Call, 1) };
    for record in [foreign, long] {
        serde_json::to_writer(&mut torn, &record).expect("written");
        torn.write_all(b"\n").expect("written");
    }
    let audit = open(&log).await;
    let found = taken(&audit, &log, 3).await;
    let kinds: Vec<_> = found.iter().map(|record| record.kind).collect();
    assert_eq!(kinds, [Kind::Begun, Kind::Begun, Kind::Call]);
    // The torn one and the two that no command writes are counted.
    assert!(audit.trouble().expect("a finding").contains("3 entries"));
    assert_eq!(audit.verify(None).await.expect("readable").broken, None);
}

#[tokio::test(start_paused = true)]
async fn controller_that_crashes_before_the_file_is_empty_keeps_every_entry_and_the_chain() {
    let (_state, log) = state();
    begin(&log).await.end(&SystemClock, true).await.expect("recorded");
    let file = log.join("local.jsonl");
    let written = fs::read(&file).expect("read");
    let audit = open(&log).await;
    let id = taken(&audit, &log, 2).await[0].request_id.clone();
    drop(audit);
    // As if the crash had come before the file was emptied.
    fs::write(&file, &written).expect("written");
    let audit = open(&log).await;
    let found = taken(&audit, &log, 4).await;
    assert!(found.iter().all(|record| record.request_id == id), "{found:?}");
    assert_eq!(audit.verify(None).await.expect("readable").broken, None);
}

#[tokio::test(start_paused = true)]
async fn command_that_cannot_be_recorded_is_refused() {
    let (state, log) = state();
    fs::write(&log, "no directory").expect("written");
    LocalEntry::begin(&log, &SystemClock, COMMAND).await.expect_err("no directory");
    fs::remove_file(&log).expect("removed");
    drop(begin(&log).await);
    let file = log.join("local.jsonl");
    let full = fs::File::options().write(true).open(&file).expect("there");
    full.set_len(1 << 20).expect("grown");
    let refused = LocalEntry::begin(&log, &SystemClock, COMMAND).await.expect_err("full");
    let told = daemon::chain::Chain(&refused).to_string();
    assert!(told.contains("start the controller"), "{told}");
    // Root follows no link of the service's user.
    let elsewhere = state.path().join("elsewhere");
    fs::rename(&file, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &file).expect("linked");
    LocalEntry::begin(&log, &SystemClock, COMMAND).await.expect_err("a link");
}

#[tokio::test(start_paused = true)]
async fn work_that_fails_is_recorded_and_nothing_is_done_without_a_record() {
    let (state, log) = state();
    let fails = async { Err::<(), _>(anyhow::anyhow!("no such token")) };
    recorded(state.path(), COMMAND, fails).await.expect_err("failed");
    let audit = open(&log).await;
    assert_eq!(taken(&audit, &log, 2).await[1].code, "UNKNOWN");
    audit.close().await;
    fs::remove_dir_all(&log).expect("removed");
    fs::write(&log, "no directory").expect("written");
    let mut is_done = false;
    let work = async {
        is_done = true;
        Ok(())
    };
    recorded(state.path(), COMMAND, work).await.expect_err("not recorded");
    assert!(!is_done);
    // Without any state there is no log, and the work says what is missing.
    recorded(&state.path().join("none"), COMMAND, async { Ok(()) }).await.expect("done");
}
