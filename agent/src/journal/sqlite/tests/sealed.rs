//! Tests of sealed environments: nothing of them is in the files, and no version loses a sandbox.

use std::path::PathBuf;

use daemon::seal::KEY_FILE;
use rusqlite::types::Value;

use super::{super::super::conformance as suite, super::*, open, reopened};
use crate::journal::Phase;

const CANARY: &str = "canary-of-an-environment";

fn with_env(number: u8) -> Intent {
    let mut intent = suite::intent(number);
    intent.record.env = [("KEY".to_owned(), CANARY.to_owned())].into();
    intent
}

/// Names of the files in a directory that hold the canary.
fn holding(dir: &Path) -> Vec<PathBuf> {
    let files = dir.read_dir().expect("listed").map(|entry| entry.expect("read").path());
    let holds = |path: &PathBuf| {
        let bytes = std::fs::read(path).expect("read");
        bytes.windows(CANARY.len()).any(|window| window == CANARY.as_bytes())
    };
    files.filter(holds).collect()
}

/// Writes a journal as the version before did, with plain environments: one record lives, one has
/// ended, and the bytes of a third one that is forgotten are still in the file.
fn write_plain(path: &Path) {
    let db = Connection::open(path).expect("opens");
    db.execute_batch(include_str!("../../schema/v1.sql")).expect("made");
    db.pragma_update(None, "user_version", 1).expect("set");
    db.pragma_update(None, "journal_mode", "wal").expect("set");
    for (number, phase) in [(1, Phase::Running), (2, Phase::Deleted), (3, Phase::Deleted)] {
        let mut record = Record { phase, revision: number.into(), ..with_env(number).record };
        record.vmid = suite::vmid(1000 + u32::from(number));
        let mut body = serde_json::to_value(&record).expect("written");
        body.as_object_mut().expect("an object").remove("env_lost");
        db.execute(
            "INSERT INTO records VALUES (?1, ?2, NULL, 'acme', ?3, ?4, 0, ?5, ?6)",
            rusqlite::params![
                record.id.to_string(),
                record.vmid.get(),
                record.request_id.as_str(),
                phase.ended(),
                number,
                body.to_string()
            ],
        )
        .expect("written");
    }
    db.execute("INSERT INTO meta VALUES ('revision', 3)", []).expect("written");
    let third = suite::id(3).to_string();
    db.execute("DELETE FROM records WHERE id = ?1", [third]).expect("deleted");
}

fn body(path: &Path, id: &SandboxId) -> serde_json::Value {
    let db = connection::look(path).expect("opens");
    let sql = "SELECT body FROM records WHERE id = ?1";
    let text: String = db.query_row(sql, [id.to_string()], |row| row.get(0)).expect("there");
    serde_json::from_str(&text).expect("JSON")
}

#[tokio::test]
async fn environment_is_nowhere_in_the_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let journal = open(&path);
    let record = journal.begin(with_env(1), 0).await.expect("room");
    assert_eq!(journal.all().await.expect("reads"), std::slice::from_ref(&record));
    assert_eq!(record.env, with_env(1).record.env);
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
    drop(journal);
    let journal = reopened(&path).await;
    assert_eq!(journal.get(&record.id).await.expect("reads"), Some(record.clone()));
    let ended = Record { phase: Phase::Deleted, ended_ms: 9, ..record };
    let ended = journal.update(&ended).await.expect("current");
    assert!(ended.env.is_empty(), "a tombstone has no secrets");
    assert_eq!(body(&path, &ended.id).get("sealed_env"), None);
}

#[tokio::test]
async fn plain_environments_of_the_version_before_are_sealed_without_a_trace() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    write_plain(&path);
    assert!(!holding(dir.path()).is_empty(), "the canary is plain at first");
    let journal = open(&path);
    let all = journal.all().await.expect("reads");
    let seen: Vec<_> = all.iter().map(|r| (r.id, r.revision, r.env.clone())).collect();
    let env = with_env(1).record.env;
    assert_eq!(seen, [(suite::id(1), 1, env), (suite::id(2), 2, Default::default())]);
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
}

#[tokio::test]
async fn sealing_that_a_crash_cut_off_is_finished_at_the_next_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    write_plain(&path);
    drop(open(&path));
    drop(reopened(&path).await);
    // The crash came after the records were sealed, and before the file was cleaned.
    let db = Connection::open(&path).expect("opens");
    db.execute("DELETE FROM meta WHERE key = 'scrubbed'", []).expect("written");
    db.execute_batch(&format!(
        "CREATE TABLE t (x); INSERT INTO t VALUES ('{CANARY}'); DROP TABLE t"
    ))
    .expect("written");
    drop(db);
    let journal = reopened(&path).await;
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
    assert_eq!(journal.all().await.expect("reads").len(), 2);
}

#[tokio::test]
async fn version_before_reads_a_sealed_record_and_keeps_the_seal() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let record = open(&path).begin(with_env(1), 0).await.expect("room");
    let stored = body(&path, &record.id);
    // Of the version before: it knows neither of the two new fields, and its update keeps them.
    let env = stored.get("env").cloned();
    assert_eq!(env, Some(serde_json::json!({})), "a map, as that version needs it");
    drop(reopened(&path).await);
    let db = Connection::open(&path).expect("opens");
    let sql = "UPDATE records SET body = json_set(body, '$.phase', 'running')";
    db.execute(sql, []).expect("written");
    drop(db);
    let again = reopened(&path).await.get(&record.id).await.expect("reads").expect("there");
    assert_eq!((again.phase, again.env), (Phase::Running, record.env));
}

#[tokio::test]
async fn lost_key_costs_the_environments_alone_until_it_is_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, key) = (dir.path().join("journal.sqlite"), dir.path().join(KEY_FILE));
    let record = open(&path).begin(with_env(1), 0).await.expect("room");
    let aside = dir.path().join("aside");
    std::fs::rename(&key, &aside).expect("moved");
    let journal = reopened(&path).await;
    let lost = journal.get(&record.id).await.expect("reads").expect("there");
    assert_eq!((lost.env_lost, lost.env.is_empty()), (true, true));
    // What changes meanwhile does not cost the sealed text.
    let running = Record { phase: Phase::Running, ..lost };
    let running = journal.update(&running).await.expect("current");
    assert!(running.env_lost);
    let other = journal.begin(with_env(2), 0).await.expect("room");
    drop(journal);
    let journal = reopened(&path).await;
    assert_eq!(journal.get(&other.id).await.expect("reads"), Some(other), "the new key seals");
    drop(journal);
    std::fs::rename(&aside, &key).expect("moved");
    let journal = reopened(&path).await;
    let back = journal.get(&record.id).await.expect("reads").expect("there");
    assert_eq!(back, Record { env_lost: false, env: record.env, ..running });
}

#[tokio::test]
async fn sealed_environment_of_another_sandbox_does_not_open() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let journal = open(&path);
    let first = journal.begin(with_env(1), 0).await.expect("room");
    let second = journal.begin(suite::intent(2), 0).await.expect("room");
    drop(journal);
    let sealed = body(&path, &first.id)["sealed_env"].as_str().expect("a text").to_owned();
    drop(reopened(&path).await);
    let db = Connection::open(&path).expect("opens");
    let sql = "UPDATE records SET body = json_set(body, '$.sealed_env', ?1) WHERE id = ?2";
    let values = [Value::from(sealed), Value::from(second.id.to_string())];
    db.execute(sql, values).expect("written");
    drop(db);
    let second = reopened(&path).await.get(&second.id).await.expect("reads").expect("there");
    assert_eq!((second.env_lost, second.env.is_empty()), (true, true));
}

#[tokio::test]
async fn access_key_is_sealed_kept_by_the_version_before_and_gone_with_its_sandbox() {
    use crate::journal::{AccessKey, GuardedPort};
    use proto::visibility::Visibility;

    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal.sqlite");
    let mut intent = suite::intent(1);
    let secret = *b"canary-of-an-environment-0123456";
    intent.record.access.key = Some(AccessKey::new(secret));
    let guarded = GuardedPort {
        visibility: Visibility::Team,
        generation: 1,
        names: ["editor".parse().expect("a name")].into(),
    };
    intent.record.access.ports.insert("39378".parse().expect("a port"), guarded);
    let record = open(&path).begin(intent, 0).await.expect("room");
    assert_eq!(record.access.key.map(AccessKey::reveal), Some(secret));
    assert_eq!(holding(dir.path()), [] as [PathBuf; 0]);
    let stored = body(&path, &record.id);
    assert_eq!(stored["access"].get("key"), None);
    assert!(!stored["sealed_access_key"].as_str().expect("sealed").contains("99, 97"));
    assert_eq!(stored["access"]["ports"]["39378"]["visibility"], "team");
    assert!(stored["services"].get("editor").is_none(), "the version before sees it closed");
    let journal = reopened(&path).await;
    assert_eq!(journal.get(&record.id).await.expect("reads"), Some(record.clone()));
    // With the key of the node lost, its credentials are void, and the next one makes another key.
    drop(journal);
    let (key, aside) = (dir.path().join(KEY_FILE), dir.path().join("aside"));
    std::fs::rename(&key, &aside).expect("moved");
    let journal = reopened(&path).await;
    let lost = journal.get(&record.id).await.expect("reads").expect("there");
    assert_eq!((lost.access.key, lost.access.ports), (None, record.access.ports.clone()));
    drop(journal);
    std::fs::rename(&aside, &key).expect("moved");
    let journal = reopened(&path).await;
    let ended = Record { phase: Phase::Deleted, ended_ms: 9, ..record };
    let ended = journal.update(&ended).await.expect("current");
    assert_eq!(ended.access.key, None, "a tombstone has no secrets");
    assert_eq!(body(&path, &ended.id).get("sealed_access_key"), None);
}
