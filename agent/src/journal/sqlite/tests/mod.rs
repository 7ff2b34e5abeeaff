//! Tests of the file alone: reopening, other versions, sharing.

mod sealed;

use std::path::PathBuf;

use super::{super::conformance as suite, *};
use crate::journal::Phase;

fn open(path: &Path) -> SqliteJournal {
    SqliteJournal::open(path, suite::pools()).expect("opens")
}

#[tokio::test]
async fn acknowledged_writes_survive_a_reopen() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let (id, record) = {
        let journal = open(&path);
        journal.epoch(7).await.expect("written");
        (journal.id().to_owned(), journal.begin(suite::intent(1), 0).await.expect("room"))
    };
    let journal = reopened(&path).await;
    assert_eq!(journal.id(), id);
    assert_eq!(journal.all().await.expect("reads"), [record]);
    assert_eq!(*journal.watch().borrow(), 1);
    assert_eq!(journal.epoch(0).await.expect("written"), 7);
    // The ring continues where it was.
    let next = journal.begin(suite::intent(2), 0).await.expect("room");
    assert_eq!(next.vmid, suite::vmid(1001));
}

/// Opens the file once the thread of the dropped handle has released it.
async fn reopened(path: &Path) -> SqliteJournal {
    let opened = async {
        loop {
            match SqliteJournal::open(path, suite::pools()) {
                Ok(journal) => return journal,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(2)).await,
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(5), opened).await.expect("lets go")
}

#[tokio::test]
async fn journal_file_accepts_only_one_writer() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let _first = open(&path);
    let error = SqliteJournal::open(&path, suite::pools()).expect_err("in use");
    assert!(error.to_string().contains("in use"), "{error}");
}

#[tokio::test]
async fn journal_files_are_readable_only_by_their_owner() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let journal = open(&dir.path().join("journal.sqlite"));
    journal.begin(suite::intent(1), 0).await.expect("room");
    for entry in dir.path().read_dir().expect("reads") {
        let entry = entry.expect("reads");
        let mode = entry.metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{:?}", entry.path());
    }
}

#[tokio::test]
async fn fields_of_a_later_version_survive_an_update() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let record = open(&path).begin(suite::intent(1), 0).await.expect("room");
    let later = Connection::open(&path).expect("opens");
    later
        .execute_batch(
            "UPDATE records SET body = json_set(body, '$.later', json('{\"x\":1}'));
             PRAGMA user_version = 2;",
        )
        .expect("written");
    let journal = reopened(&path).await;
    journal.update(&Record { phase: Phase::Running, ..record }).await.expect("current");
    let (later_field, phase): (String, String) = later
        .query_row("SELECT body ->> '$.later', body ->> '$.phase' FROM records", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .expect("reads");
    assert_eq!((later_field.as_str(), phase.as_str()), (r#"{"x":1}"#, "running"));
}

#[test]
fn a_file_of_a_far_later_version_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    Connection::open(&path)
        .and_then(|db| db.pragma_update(None, "user_version", 99))
        .expect("written");
    let error = SqliteJournal::open(&path, suite::pools()).expect_err("too new");
    assert!(error.to_string().contains("schema 99"), "{error}");
}

/// Reads the file of each schema version as that version wrote it. The version that introduces a
/// schema writes the missing file here, once.
#[tokio::test]
async fn files_of_every_schema_are_read() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/journal-v1.sqlite");
    if !fixture.exists() {
        write_fixture(&fixture).await;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    std::fs::copy(&fixture, &path).expect("copied");
    let journal = open(&path);
    let all = journal.all().await.expect("reads");
    let phases: Vec<_> = all.iter().map(|r| (r.id, r.phase, r.revision)).collect();
    assert_eq!(
        phases,
        [
            (suite::id(1), Phase::Running, 4),
            (suite::id(2), Phase::Deleted, 5),
            (suite::id(3), Phase::Creating, 3)
        ]
    );
    let expected = Record {
        phase: Phase::Running,
        boot: 1,
        started_ms: 9,
        ip: Some([10, 0, 0, 2].into()),
        vmid: suite::vmid(1000),
        revision: 4,
        ..suite::record(1)
    };
    assert_eq!(all.first(), Some(&expected));
    assert_eq!(journal.cancelled(&suite::id(4)).await.expect("reads"), 2);
    assert_eq!(journal.epoch(0).await.expect("written"), 5);
    assert_eq!(journal.room(0).await.expect("reads"), (2, 0));
    assert_eq!(journal.node().await.expect("reads"), None, "it did not know of such a thing");
}

/// Same schema, written by the first version that stores the node's number.
#[tokio::test]
async fn file_with_a_node_number_is_read() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/journal-v1-node.sqlite");
    let node = Node { name: "pve2".parse().expect("a name"), number: 2 };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    if !fixture.exists() {
        let written = dir.path().join("written.sqlite");
        open(&written).set_node(&node).await.expect("written");
        let target = fixture.to_str().expect("UTF-8");
        let db = Connection::open(&written).expect("opens");
        db.execute("VACUUM INTO ?1", [target]).expect("written");
    }
    std::fs::copy(&fixture, &path).expect("copied");
    assert_eq!(SqliteJournal::node_of(&path).expect("reads"), Some(node.clone()));
    let journal = open(&path);
    assert_eq!(journal.node().await.expect("reads"), Some(node.clone()));
    // Beside the writer, as `check-config` does.
    let moved = Node { number: 7, ..node };
    journal.set_node(&moved).await.expect("written");
    assert_eq!(SqliteJournal::node_of(&path).expect("reads"), Some(moved));
    let none = dir.path().join("none.sqlite");
    assert_eq!(SqliteJournal::node_of(&none).expect("no file"), None);
    assert!(!none.exists(), "a look makes no file");
}

async fn write_fixture(fixture: &Path) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let journal = open(&path);
    let mut records = Vec::new();
    for number in 1..=3 {
        records.push(journal.begin(suite::intent(number), 0).await.expect("room"));
    }
    let running = Record { phase: Phase::Running, boot: 1, started_ms: 9, ..records[0].clone() };
    journal.update(&running).await.expect("current");
    let deleted = Record { phase: Phase::Deleted, ended_ms: 10, ..records[1].clone() };
    journal.update(&deleted).await.expect("current");
    journal.cancel(&suite::id(4), 2, 11).await.expect("written");
    journal.epoch(5).await.expect("written");
    std::fs::create_dir_all(fixture.parent().expect("in a directory")).expect("made");
    let target = fixture.to_str().expect("UTF-8");
    let db = Connection::open(&path).expect("opens");
    db.execute("VACUUM INTO ?1", [target]).expect("written");
}
