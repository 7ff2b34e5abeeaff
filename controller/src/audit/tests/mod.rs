mod local;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use daemon::audit::{Fault, GAP_IO, GAP_QUEUE, GAP_RESTART, Kind, Line, Report};
use futures_util::TryStreamExt as _;

use super::*;

const START_MS: u64 = 1_700_000_000_000;
const HOUR_MS: u64 = 3600 * 1000;

#[derive(Debug)]
struct SetClock(AtomicU64);

impl Clock for SetClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

fn clock() -> Arc<SetClock> {
    Arc::new(SetClock(AtomicU64::new(START_MS)))
}

async fn open(dir: &Path, options: &Options) -> Audit {
    Audit::open(dir, clock(), options.clone()).await.expect("opened")
}

fn record(number: u64, at_ms: u64) -> Record {
    let team = if number.is_multiple_of(2) { "red" } else { "blue" };
    Record {
        call: number,
        team: team.into(),
        method: "StatFile".into(),
        sandbox: format!("s{}", number % 3),
        ..Record::new(Kind::Call, at_ms)
    }
}

fn add(audit: &Audit, numbers: std::ops::Range<u64>) {
    numbers.for_each(|number| audit.record(record(number, START_MS + number)));
}

async fn list(audit: &Audit, query: AuditQuery) -> Vec<Record> {
    let pages = audit.list(query).await.expect("readable");
    let lines = pages.try_collect::<Vec<_>>().await.expect("read").concat();
    lines.into_iter().map(|line: Line| line.record).collect()
}

async fn kinds(audit: &Audit) -> Vec<(Kind, String, u64)> {
    let all = list(audit, AuditQuery::default()).await;
    all.into_iter().map(|record| (record.kind, record.reason, record.count)).collect()
}

async fn right(audit: &Audit, wanted: Option<Head>) -> Report {
    let report = audit.verify(wanted).await.expect("readable");
    assert_eq!(report.broken, None, "{report:?}");
    report
}

fn segments(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).expect("listed").map(|entry| entry.expect("read").path());
    let mut found: Vec<_> = entries.filter(|path| path.extension().is_some()).collect();
    found.sort();
    found
}

const fn kind(kind: Kind) -> (Kind, String, u64) {
    (kind, String::new(), 0)
}

#[tokio::test(start_paused = true)]
async fn log_goes_on_after_a_stop_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path().join("audit");
    let audit = open(&dir, &Options::default()).await;
    add(&audit, 0..2);
    audit.close().await;
    add(&audit, 2..3);
    drop(audit);
    let audit = open(&dir, &Options::default()).await;
    add(&audit, 3..4);
    use Kind::{Call, Closed, Opened};
    let expected = [Opened, Call, Call, Closed, Opened, Call].map(kind);
    assert_eq!(kinds(&audit).await, expected);
    let report = right(&audit, None).await;
    assert_eq!((report.entries, report.first, report.gaps), (6, 1, 0));
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert!(segments(&dir).iter().all(|path| mode(path) == 0o600));
}

#[tokio::test(start_paused = true)]
async fn crash_is_marked_as_a_gap_and_a_torn_last_line_is_cut() {
    let dir = tempfile::tempdir().expect("a directory");
    let audit = open(dir.path(), &Options::default()).await;
    add(&audit, 0..2);
    audit.flush().await;
    let head = right(&audit, None).await.head;
    drop(audit);
    let gap = (Kind::Gap, GAP_RESTART.to_owned(), 0);
    let mut expected = vec![kind(Kind::Opened), kind(Kind::Call), kind(Kind::Call)];
    // Also where the controller had stopped in order, and something was written after that.
    for torn in ["", "{\"seq\":4,\"pre", "\0\0\0\0"] {
        let audit = open(dir.path(), &Options::default()).await;
        expected.extend([gap.clone(), kind(Kind::Opened)]);
        assert_eq!(kinds(&audit).await, expected);
        let report = right(&audit, Some(head)).await;
        assert_eq!(report.entries, expected.len() as u64);
        audit.close().await;
        drop(audit);
        expected.push(kind(Kind::Closed));
        let path = segments(dir.path()).pop().expect("a segment");
        let mut bytes = fs::read(&path).expect("read");
        bytes.extend_from_slice(if torn.is_empty() { b"{" } else { torn.as_bytes() });
        fs::write(&path, bytes).expect("written");
    }
}

#[tokio::test(start_paused = true)]
async fn entries_over_the_queue_are_counted_and_calls_do_not_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let audit = open(dir.path(), &Options { queue: 8, ..Options::default() }).await;
    // The writer has no turn meanwhile.
    add(&audit, 0..100);
    assert!(audit.trouble().expect("a finding").contains("92 entries"));
    audit.flush().await;
    let all = kinds(&audit).await;
    let calls = all.iter().filter(|(kind, ..)| *kind == Kind::Call).count();
    assert_eq!(calls, 8);
    assert_eq!(all.last(), Some(&(Kind::Gap, GAP_QUEUE.to_owned(), 92)));
    let report = right(&audit, None).await;
    assert_eq!((report.gaps, report.lost), (1, 92));
}

#[tokio::test(start_paused = true)]
async fn rotation_and_retention_keep_the_rest_verifiable() {
    let dir = tempfile::tempdir().expect("a directory");
    let least = Duration::ZERO;
    let options = Options { segment_bytes: 2000, bytes_max: 10_000, least, ..Options::default() };
    let clock = clock();
    // Later than all entries.
    clock.0.fetch_add(HOUR_MS, Ordering::Relaxed);
    let open =
        async || Audit::open(dir.path(), clock.clone(), options.clone()).await.expect("opened");
    let audit = open().await;
    let mut heads = Vec::new();
    for round in 0..30 {
        add(&audit, round * 10..round * 10 + 10);
        audit.flush().await;
        heads.push(right(&audit, heads.last().copied()).await.head);
    }
    let report = right(&audit, heads.last().copied()).await;
    assert!(report.first > 100, "old segments are gone: {report:?}");
    let bytes =
        segments(dir.path()).into_iter().map(|path| fs::metadata(path).expect("there").len());
    assert!(bytes.sum::<u64>() <= options.bytes_max);
    // An older line is not there to be compared.
    let old = audit.verify(Some(heads[0])).await.expect("readable").broken.expect("not there");
    assert_eq!(old.fault, Fault::Missing);
    // The line before the first one is known from `head`.
    let before = fs::read_to_string(dir.path().join("head")).expect("read");
    right(&audit, Some(before.trim().parse().expect("a head"))).await;
    audit.close().await;
    drop(audit);
    let audit = open().await;
    let again = right(&audit, heads.last().copied()).await;
    assert!(again.first >= report.first && again.gaps == 0, "{again:?}");
    // Without a segment in the middle it is broken there.
    let second = segments(dir.path()).remove(1);
    fs::remove_file(&second).expect("removed");
    let broken = audit.verify(None).await.expect("readable").broken.expect("broken");
    assert!(second.to_string_lossy().contains(&format!("{:020}", broken.seq)), "{broken:?}");
}

#[tokio::test(start_paused = true)]
async fn old_entries_are_removed_a_day_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = clock();
    let keep = Duration::from_hours(10 * 24);
    let options = Options { keep, ..Options::default() };
    let audit = Audit::open(dir.path(), clock.clone(), options).await.expect("opened");
    for day in 0..30 {
        pass_a_day(&clock).await;
        let now_ms = clock.now_ms();
        audit.record(record(day, now_ms));
        audit.flush().await;
    }
    let days: Vec<_> = list(&audit, AuditQuery::default()).await;
    let oldest = days.first().expect("entries").at_ms;
    assert!((19..=21).contains(&((oldest - START_MS) / 24 / HOUR_MS)), "{oldest}");
    assert_eq!(days.last().expect("entries").call, 29);
    right(&audit, None).await;
}

/// Lets a day pass on both clocks.
async fn pass_a_day(clock: &SetClock) {
    clock.0.fetch_add(24 * HOUR_MS, Ordering::Relaxed);
    tokio::time::advance(Duration::from_hours(24)).await;
}

/// Writes an entry at the present time; returns the calls that are kept.
async fn calls_after(audit: &Audit, clock: &SetClock, call: u64) -> Vec<u64> {
    audit.record(record(call, clock.now_ms()));
    audit.flush().await;
    let all = list(audit, AuditQuery::default()).await.into_iter();
    all.filter(|record| record.kind == Kind::Call).map(|record| record.call).collect()
}

#[tokio::test(start_paused = true)]
async fn clock_that_steps_ahead_removes_nothing_until_it_is_known_to_be_right() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = clock();
    let keep = Duration::from_hours(10 * 24);
    let options = Options { keep, ..Options::default() };
    let audit = Audit::open(dir.path(), clock.clone(), options.clone()).await.expect("opened");
    for day in 0..5 {
        pass_a_day(&clock).await;
        calls_after(&audit, &clock, day).await;
    }
    let year = 365 * 24 * HOUR_MS;
    clock.0.fetch_add(year, Ordering::Relaxed);
    assert_eq!(calls_after(&audit, &clock, 5).await, [0, 1, 2, 3, 4, 5]);
    assert!(audit.trouble().expect("a finding").contains("clock of this machine"));
    // The next controller has only the entries to tell it.
    audit.close().await;
    drop(audit);
    let audit = Audit::open(dir.path(), clock.clone(), options).await.expect("opened");
    assert_eq!(calls_after(&audit, &clock, 6).await, [0, 1, 2, 3, 4, 5, 6]);
    assert!(audit.trouble().expect("a finding").contains("clock of this machine"));
    // It is set right; entries of the future keep nothing behind them for ever.
    clock.0.fetch_sub(year, Ordering::Relaxed);
    for day in 7..30 {
        pass_a_day(&clock).await;
        calls_after(&audit, &clock, day).await;
    }
    let kept = calls_after(&audit, &clock, 30).await;
    assert!(kept[0] > 15, "{kept:?}");
    assert_eq!(audit.trouble(), None);
    right(&audit, None).await;
}

#[tokio::test(start_paused = true)]
async fn clock_that_stays_ahead_for_a_week_is_right() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = clock();
    let keep = Duration::from_hours(10 * 24);
    let options = Options { keep, ..Options::default() };
    let audit = Audit::open(dir.path(), clock.clone(), options).await.expect("opened");
    for day in 0..3 {
        pass_a_day(&clock).await;
        calls_after(&audit, &clock, day).await;
    }
    clock.0.fetch_add(365 * 24 * HOUR_MS, Ordering::Relaxed);
    assert_eq!(calls_after(&audit, &clock, 3).await[0], 0);
    for day in 4..12 {
        pass_a_day(&clock).await;
        calls_after(&audit, &clock, day).await;
    }
    let kept = calls_after(&audit, &clock, 12).await;
    assert!(kept[0] >= 3, "those from before the step are gone: {kept:?}");
    assert_eq!(audit.trouble(), None);
}

#[tokio::test(start_paused = true)]
async fn interrupted_removal_is_finished_at_the_next_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { segment_bytes: 2000, ..Options::default() };
    let audit = open(dir.path(), &options).await;
    for round in 0..5 {
        add(&audit, round * 20..round * 20 + 20);
        audit.flush().await;
    }
    audit.close().await;
    drop(audit);
    // `head` is written, and the first segment is still there.
    let before = segments(dir.path());
    let first = fs::read(&before[0]).expect("read");
    let last = first.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()).expect("a line");
    let seq = Line::parse(last).expect("an entry").seq;
    let head = Head { seq, hash: daemon::audit::Hash::of(last) };
    fs::write(dir.path().join("head"), format!("{head}\n")).expect("written");
    let audit = open(dir.path(), &options).await;
    assert!(!before[0].exists() && before[1].exists());
    assert_eq!(right(&audit, None).await.first, seq + 1);
}

#[tokio::test(start_paused = true)]
async fn disk_that_fails_loses_nothing_up_to_the_queue_and_counts_the_rest() {
    let dir = tempfile::tempdir().expect("a directory");
    let (log, away) = (dir.path().join("audit"), dir.path().join("away"));
    // Each sync ends a segment, so that the next write needs the directory.
    let options = Options { segment_bytes: 1, queue: 50, ..Options::default() };
    let audit = open(&log, &options).await;
    fs::rename(&log, &away).expect("moved");
    add(&audit, 0..10);
    audit.flush().await;
    assert!(audit.trouble().expect("a finding").contains("nothing can be written"));
    // Until the entries in memory are as many as they may be, and for long after that.
    for round in 0..200 {
        add(&audit, 10..60);
        let wait = if round < 195 { 20 } else { 2_000 };
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
    fs::rename(&away, &log).expect("back");
    tokio::time::sleep(Duration::from_secs(2)).await;
    audit.flush().await;
    let all = kinds(&audit).await;
    let calls = all.iter().filter(|(kind, ..)| *kind == Kind::Call).count() as u64;
    let gaps = all.iter().filter(|(kind, reason, _)| *kind == Kind::Gap && reason == GAP_IO);
    let gaps: Vec<_> = gaps.map(|(.., count)| count).collect();
    assert_eq!(gaps.len(), 1, "one gap, however long the disk failed: {gaps:?}");
    let lost: u64 = gaps.into_iter().sum();
    assert!(calls > 4000 && lost > 0, "{calls} {lost}");
    assert_eq!(calls + lost, 10 + 200 * 50);
    right(&audit, None).await;
    assert!(audit.trouble().expect("told until the next start").contains("missing"));
}

/// Log of several segments that was closed; returns its last line.
async fn closed(dir: &Path, options: &Options) -> Head {
    let audit = open(dir, options).await;
    for round in 0..5 {
        add(&audit, round * 20..round * 20 + 20);
        audit.flush().await;
    }
    audit.close().await;
    right(&audit, None).await.head
}

/// Checks that a log goes on, tells its damage, and is named in it with this file and entry.
async fn goes_on(dir: &Path, options: &Options, damaged: &str, seq: u64) -> Audit {
    let audit = open(dir, options).await;
    assert!(audit.trouble().expect("a finding").contains(damaged), "{:?}", audit.trouble());
    add(&audit, 1000..1003);
    let calls: Vec<_> = list(&audit, AuditQuery::default()).await;
    let last: Vec<_> = calls.iter().rev().take(3).map(|record| record.call).collect();
    assert_eq!(last, [1002, 1001, 1000], "new entries");
    let (report, file) = audit.verify_files(None).await.expect("readable");
    assert_eq!((report.broken.expect("broken").seq, file.as_deref()), (seq, Some(damaged)));
    audit
}

#[tokio::test(start_paused = true)]
async fn log_goes_on_with_an_old_segment_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let options = Options { segment_bytes: 2000, ..Options::default() };
    let head = closed(dir, &options).await;
    let second = segments(dir).remove(1);
    let name = second.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    let first: u64 = name["audit-".len()..][..20].parse().expect("a number");
    fs::remove_file(&second).expect("removed");
    // No file can be read less.
    fs::create_dir(&second).expect("made");
    let audit = goes_on(dir, &options, &name, first).await;
    let (report, _) = audit.verify_files(Some(head)).await.expect("readable");
    assert!(report.head.seq > head.seq, "the others are verified: {report:?}");
    assert_eq!(report.broken.expect("broken").fault, Fault::Unreadable);
    let export = audit.export(0, None).await.expect("readable");
    let bytes = export.try_collect::<Vec<_>>().await.expect("read").concat();
    let report = daemon::audit::verify(&mut bytes.as_slice(), None).expect("read");
    assert_eq!(report.broken.expect("a hole").fault, Fault::Number);
    audit.close().await;
    drop(audit);
    goes_on(dir, &options, &name, first).await;
}

#[tokio::test(start_paused = true)]
async fn removed_newest_segment_is_a_gap_and_fails_a_head_that_was_noted() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let options = Options { segment_bytes: 2000, ..Options::default() };
    let head = closed(dir, &options).await;
    fs::remove_file(segments(dir).pop().expect("a segment")).expect("removed");
    let audit = open(dir, &options).await;
    add(&audit, 1000..1001);
    let all = kinds(&audit).await;
    assert!(all.contains(&(Kind::Gap, GAP_RESTART.to_owned(), 0)), "{all:?}");
    // The chain goes on from the line before, so only the head that is kept elsewhere shows the loss.
    assert!(right(&audit, None).await.gaps > 0);
    assert!(audit.verify(Some(head)).await.expect("readable").broken.is_some());
}

#[tokio::test]
async fn reader_gets_the_other_segments_where_one_may_not_be_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { segment_bytes: 2000, ..Options::default() };
    let audit = open(dir.path(), &options).await;
    // A segment ends between two groups of entries.
    for group in 0..6 {
        add(&audit, group * 8..(group + 1) * 8);
        audit.flush().await;
    }
    let all = list(&audit, AuditQuery::default()).await.len();
    let second = segments(dir.path()).remove(1);
    let kept = fs::read_to_string(&second).expect("text");
    fs::remove_file(&second).expect("removed");
    // To root every file is readable: a link to itself is what cannot be opened.
    std::os::unix::fs::symlink(&second, &second).expect("linked");
    let left = list(&audit, AuditQuery::default()).await.len();
    assert_eq!(left + kept.lines().count(), all, "the others are read");
    let newest = AuditQuery { last: Some(3), ..AuditQuery::default() };
    assert_eq!(list(&audit, newest).await.len(), 3);
    let (report, file) = audit.verify_files(None).await.expect("a verdict");
    assert_eq!(report.broken.expect("broken").fault, Fault::Unreadable);
    assert!(second.ends_with(file.expect("a file")));
    assert!(audit.trouble().is_some(), "fsck tells of it, too");
}

#[tokio::test(start_paused = true)]
async fn log_goes_on_with_an_old_segment_whose_end_is_lost() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let options = Options { segment_bytes: 2000, ..Options::default() };
    closed(dir, &options).await;
    let second = segments(dir).remove(1);
    let name = second.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    let bytes = fs::read(&second).expect("read");
    let cut = &bytes[..bytes.len() - 10];
    fs::write(&second, cut).expect("written");
    let whole = cut.iter().filter(|byte| **byte == b'\n').count() as u64;
    let first: u64 = name["audit-".len()..][..20].parse().expect("a number");
    goes_on(dir, &options, &name, first + whole).await;
    assert_eq!(fs::read(&second).expect("read"), cut, "only the newest is ever cut");
}

#[tokio::test(start_paused = true)]
async fn newest_segment_that_cannot_be_read_is_set_aside() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let options = Options { segment_bytes: 2000, ..Options::default() };
    closed(dir, &options).await;
    let newest = segments(dir).pop().expect("a segment");
    let name = newest.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    let first: u64 = name["audit-".len()..][..20].parse().expect("a number");
    fs::remove_file(&newest).expect("removed");
    fs::create_dir(&newest).expect("made");
    let aside = format!("{name}.damaged");
    let audit = goes_on(dir, &options, &aside, first).await;
    let all = kinds(&audit).await;
    assert!(all.contains(&(Kind::Gap, GAP_RESTART.to_owned(), 0)), "the place is marked");
    // Nothing is wrong with the chain itself: it goes on from the line before.
    let export = audit.export(0, None).await.expect("readable");
    let bytes = export.try_collect::<Vec<_>>().await.expect("read").concat();
    assert_eq!(daemon::audit::verify(&mut bytes.as_slice(), None).expect("read").broken, None);
    audit.close().await;
    drop(audit);
    goes_on(dir, &options, &aside, first).await;
    fs::remove_dir(dir.join(&aside)).expect("removed");
    let audit = open(dir, &options).await;
    assert_eq!(audit.trouble(), None);
    right(&audit, None).await;
}

#[tokio::test(start_paused = true)]
async fn rest_of_the_newest_segment_that_is_no_torn_line_is_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let head = closed(dir, &Options::default()).await;
    let newest = segments(dir).pop().expect("a segment");
    let mut bytes = fs::read(&newest).expect("read");
    bytes.resize(bytes.len() + 100_000, 0);
    fs::write(&newest, &bytes).expect("written");
    let name = newest.file_name().and_then(|name| name.to_str()).expect("text").to_owned();
    goes_on(dir, &Options::default(), &name, head.seq + 1).await;
    assert_eq!(fs::read(&newest).expect("read"), bytes);
}

#[tokio::test(start_paused = true)]
async fn head_that_does_not_fit_removes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let options = Options { segment_bytes: 2000, ..Options::default() };
    closed(dir, &options).await;
    let before = segments(dir);
    let far = Head { seq: 1 << 40, hash: daemon::audit::Hash::of(b"x") };
    for text in ["nothing".to_owned(), far.to_string(), "\u{fffd}".repeat(10)] {
        fs::write(dir.join("head"), text).expect("written");
        let audit = open(dir, &options).await;
        assert!(audit.trouble().expect("a finding").contains("head: "));
        assert!(before.iter().all(|segment| segment.exists()));
        assert_eq!(right(&audit, None).await.first, 1);
        audit.close().await;
    }
}

#[tokio::test(start_paused = true)]
async fn flood_of_refusals_is_counted_and_drops_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { queue: 100, ..Options::default() };
    let audit = open(dir.path(), &options).await;
    let refusal = |number: u64| Record {
        token: "0a1b2c3d4e5f".into(),
        reason: "SCOPE_MISSING".into(),
        ..record(0, START_MS + number)
    };
    // The writer has no turn meanwhile.
    (0..100_000).for_each(|number| audit.refuse(refusal(number)));
    add(&audit, 1..51);
    tokio::time::sleep(Duration::from_secs(61)).await;
    let all = list(&audit, AuditQuery::default()).await;
    let calls = all.iter().filter(|record| record.kind == Kind::Call);
    assert_eq!(calls.count(), 51, "the first of them, and all that was allowed");
    let counted: Vec<_> = all.iter().filter(|record| record.kind == Kind::Refused).collect();
    let [counted] = counted.as_slice() else { panic!("{counted:?}") };
    assert_eq!((counted.count, counted.method.as_str()), (99_999, "StatFile"));
    assert_eq!((counted.token.as_str(), counted.team.as_str()), ("0a1b2c3d4e5f", "red"));
    // What was counted last is written at the end.
    (0..3).for_each(|number| audit.refuse(refusal(number)));
    audit.close().await;
    let all = list(&audit, AuditQuery::default()).await;
    assert_eq!(
        all.iter().filter(|r| r.kind == Kind::Refused).map(|r| r.count).sum::<u64>(),
        100_002
    );
    assert_eq!(right(&audit, None).await.gaps, 0);
}

/// Entries of a team, each of them on the disk.
async fn flood(audit: &Audit, team: &str, clock: &SetClock, calls: std::ops::Range<u64>) {
    for call in calls {
        audit.record(Record { team: team.into(), ..record(call, clock.now_ms()) });
        audit.flush().await;
    }
}

fn calls_of<'a>(all: &'a [Record], team: &str) -> Vec<&'a Record> {
    all.iter().filter(|record| record.kind == Kind::Call && record.team == team).collect()
}

fn bytes(dir: &Path) -> u64 {
    segments(dir).into_iter().map(|path| fs::metadata(path).expect("there").len()).sum()
}

#[tokio::test(start_paused = true)]
async fn team_that_floods_the_log_pushes_out_nothing_of_others_and_leaves_them_room() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = clock();
    let options = Options { segment_bytes: 2000, bytes_max: 60_000, ..Options::default() };
    let open =
        async || Audit::open(dir.path(), clock.clone(), options.clone()).await.expect("opened");
    let audit = open().await;
    flood(&audit, "blue", &clock, 0..5).await;
    flood(&audit, "red", &clock, 0..500).await;
    // The begin and the parts of a call are not counted beside it.
    for kind in [Kind::Begun, Kind::Part] {
        audit.record(Record { kind, team: "red".into(), ..record(499, clock.now_ms()) });
        audit.flush().await;
    }
    assert!(audit.trouble().expect("a finding").contains("red"), "{:?}", audit.trouble());
    // What is always told, and another team.
    audit.record_always(Record { team: "red".into(), ..record(1000, clock.now_ms()) });
    flood(&audit, "blue", &clock, 5..10).await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    audit.flush().await;
    let all = list(&audit, AuditQuery::default()).await;
    let (red, blue) = (calls_of(&all, "red"), calls_of(&all, "blue"));
    let numbers: Vec<_> = blue.iter().map(|record| record.call).collect();
    assert_eq!(numbers, (0..10).collect::<Vec<_>>());
    assert_eq!(red.last().expect("entries").call, 1000);
    let counted = all.iter().filter(|record| record.kind == Kind::Counted);
    let counted = counted.inspect(|record| {
        assert_eq!((record.team.as_str(), record.method.as_str()), ("red", "StatFile"));
    });
    let counted: u64 = counted.map(|record| record.count).sum();
    assert_eq!(red.len() as u64 - 1 + counted, 500, "each is told or counted");
    let kept = bytes(dir.path());
    assert!((28_000..40_000).contains(&kept), "half of the log is free for others: {kept}");
    right(&audit, None).await;

    // A restart gives a team room again, but never all that is left.
    audit.close().await;
    drop(audit);
    let audit = open().await;
    flood(&audit, "red", &clock, 2000..2500).await;
    flood(&audit, "blue", &clock, 10..15).await;
    let all = list(&audit, AuditQuery::default()).await;
    assert_eq!(calls_of(&all, "blue").len(), 15);
    assert!(bytes(dir.path()) < options.bytes_max);

    // What is old enough makes room.
    for _ in 0..9 {
        pass_a_day(&clock).await;
        audit.flush().await;
    }
    flood(&audit, "red", &clock, 3000..3001).await;
    let all = list(&audit, AuditQuery::default()).await;
    assert_eq!(calls_of(&all, "red").last().expect("entries").call, 3000);
    assert_eq!(audit.trouble(), None);
}

#[tokio::test(start_paused = true)]
async fn young_entries_stay_while_the_clock_is_doubted_though_the_log_is_too_large() {
    let dir = tempfile::tempdir().expect("a directory");
    let clock = clock();
    let options = Options { segment_bytes: 1, bytes_max: 5000, ..Options::default() };
    let audit = Audit::open(dir.path(), clock.clone(), options).await.expect("opened");
    let always = async |calls: std::ops::Range<u64>| {
        for call in calls {
            audit.record_always(record(call, clock.now_ms()));
            audit.flush().await;
        }
    };
    always(0..15).await;
    clock.0.fetch_add(365 * 24 * HOUR_MS, Ordering::Relaxed);
    always(15..40).await;
    let all = list(&audit, AuditQuery::default()).await.into_iter();
    let calls = all.filter(|record| record.kind == Kind::Call).map(|record| record.call);
    assert_eq!(calls.collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
    let trouble = audit.trouble().expect("a finding");
    assert!(trouble.contains("more than max_mib"), "{trouble}");
    // The disk is bounded all the same.
    always(40..100).await;
    let left = bytes(dir.path());
    assert!((8_000..=10_500).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn newest_entries_are_found_over_several_segments() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { segment_bytes: 1500, ..Options::default() };
    let audit = open(dir.path(), &options).await;
    for round in 0..10 {
        add(&audit, round * 10..round * 10 + 10);
        audit.flush().await;
    }
    assert!(segments(dir.path()).len() > 5);
    let calls = async |filter: AuditFilter, last: Option<usize>| {
        let found = list(&audit, AuditQuery { filter, last }).await;
        found.into_iter().map(|record| record.call).collect::<Vec<_>>()
    };
    let red = || AuditFilter { team: Some("red".into()), ..AuditFilter::default() };
    let every: Vec<_> = (0..100).step_by(2).collect();
    assert_eq!(calls(red(), None).await, every);
    for last in [0, 1, 7, 49, 50, 51, 1000] {
        let expected = &every[every.len().saturating_sub(last)..];
        assert_eq!(calls(red(), Some(last)).await, expected, "{last}");
    }
    let filter = AuditFilter {
        sandbox: Some("s1".into()),
        since_ms: START_MS + 10,
        until_ms: Some(START_MS + 20),
        ..red()
    };
    assert_eq!(calls(filter, None).await, [10, 16]);
    let export = audit.export(START_MS + 30, Some(START_MS + 59)).await.expect("readable");
    let bytes = export.try_collect::<Vec<_>>().await.expect("read").concat();
    let report = daemon::audit::verify(&mut bytes.as_slice(), None).expect("read");
    assert_eq!((report.entries, report.broken), (30, None));
}

#[tokio::test(start_paused = true)]
async fn two_processes_never_write_one_log() {
    let dir = tempfile::tempdir().expect("a directory");
    let audit = open(dir.path(), &Options::default()).await;
    let second = Audit::open(dir.path(), clock(), Options::default()).await;
    assert!(matches!(second, Err(OpenError::Locked(_))), "{second:?}");
    drop(audit);
    open(dir.path(), &Options::default()).await;
}
