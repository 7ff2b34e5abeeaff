//! Sealed requests and files: nothing of them is in the file of the store.

use std::path::{Path, PathBuf};

use daemon::seal;
use proto::sandbox::v1::EventKind;
use rusqlite::{Connection, params};

use super::{
    Begun, Row, Store as _,
    sealed::SEALED_FROM,
    sqlite::{MIGRATIONS, Sqlite},
    suite::{event, id, row},
};

const CANARY: &[u8] = b"canary-of-a-creation";

fn creation(n: u8) -> Row {
    Row { request: CANARY.to_vec().into(), ..row(n, &format!("r{n}")) }
}

/// Files of a directory that hold the canary.
fn holding(dir: &Path) -> Vec<PathBuf> {
    let files = dir.read_dir().expect("listed").map(|entry| entry.expect("read").path());
    let holds = |path: &PathBuf| {
        let bytes = std::fs::read(path).expect("read");
        bytes.windows(CANARY.len()).any(|window| window == CANARY)
    };
    files.filter(holds).collect()
}

async fn begin(store: &Sqlite, n: u8) {
    let asked = event(n, EventKind::CreateAsked);
    let begun = store.begin(creation(n), Some(CANARY.to_vec()), asked).await;
    assert!(matches!(begun, Ok(Begun::New(_))), "{begun:?}");
}

#[tokio::test]
async fn requests_and_files_are_nowhere_in_the_file_of_the_store() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.db");
    let store = Sqlite::open(&path).expect("opens");
    begin(&store, 1).await;
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
    assert_eq!(store.get(&id(1)).await.expect("reads"), Some(creation(1)));
    assert_eq!(store.files(&id(1)).await.expect("reads").as_deref(), Some(CANARY));
    assert!(!format!("{:?}", creation(1)).contains("99, 97, 110"), "not shown either");
}

#[tokio::test]
async fn plain_requests_and_files_of_the_version_before_are_sealed_without_a_trace() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("c.db");
    let raw = Connection::open(&path).expect("opens");
    for sql in &MIGRATIONS[..SEALED_FROM - 1] {
        raw.execute_batch(sql).expect("made");
    }
    raw.pragma_update(None, "user_version", SEALED_FROM - 1).expect("set");
    for n in [1, 2] {
        let row = creation(n);
        raw.execute(
            "INSERT INTO sandboxes (id, team, request_id, digest, request, state, attempt, \
             decision, created_ms, last) VALUES (?1, 'red', ?2, ?3, ?4, 'placing', 1, '', 5, x'')",
            params![row.id.to_string(), row.request_id.as_str(), row.digest, CANARY],
        )
        .expect("written");
        raw.execute(
            "INSERT INTO files VALUES (?1, 'red', ?2)",
            params![row.id.to_string(), CANARY],
        )
        .expect("written");
    }
    // Its bytes stay in the file.
    raw.execute("DELETE FROM files WHERE id = ?1", [id(2).to_string()]).expect("deleted");
    drop(raw);
    assert_eq!(holding(dir.path()), std::slice::from_ref(&path));
    let store = Sqlite::open(&path).expect("brought up to date");
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
    let read = store.get(&id(1)).await.expect("reads").expect("there");
    assert_eq!(read.request, creation(1).request);
    assert_eq!(store.files(&id(1)).await.expect("reads").as_deref(), Some(CANARY));
}

#[tokio::test]
async fn lost_key_costs_requests_and_files_alone_until_it_is_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, key) = (dir.path().join("c.db"), dir.path().join(seal::KEY_FILE));
    let store = Sqlite::open(&path).expect("opens");
    begin(&store, 1).await;
    drop(store);
    let aside = dir.path().join("aside");
    std::fs::rename(&key, &aside).expect("moved");
    let store = Sqlite::open(&path).expect("opens");
    let lost = store.get(&id(1)).await.expect("reads").expect("there");
    assert_eq!(lost, Row { request: Vec::new().into(), ..creation(1) });
    store.files(&id(1)).await.expect_err("not without the key");
    begin(&store, 2).await;
    assert_eq!(store.get(&id(2)).await.expect("reads"), Some(creation(2)));
    drop(store);
    std::fs::rename(&aside, &key).expect("moved");
    let store = Sqlite::open(&path).expect("opens");
    assert_eq!(store.get(&id(1)).await.expect("reads"), Some(creation(1)));
}
