use std::{os::unix::process::ExitStatusExt, path::PathBuf, sync::mpsc as std_mpsc};

use super::*;

const BOUNDS: Bounds = Bounds { queue: 16, group: 16 };
/// A row may name another one, which must be there at the commit.
const SCHEMA: &str = "PRAGMA foreign_keys = ON;
    CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY,
        needs INTEGER REFERENCES t DEFERRABLE INITIALLY DEFERRED, body BLOB)";
/// Names the database to the process that is to lose its disk.
const DATABASE: &str = "GROUP_COMMIT_DATABASE";

fn database(path: &Path, log_pages: u32) -> Connection {
    let db = open(path, log_pages).expect("opens");
    db.execute_batch(SCHEMA).expect("written");
    db
}

fn put(id: u32, needs: Option<u32>) -> impl FnOnce(&Connection) -> rusqlite::Result<usize> {
    move |db| db.execute("INSERT INTO t (id, needs) VALUES (?1, ?2)", (id, needs))
}

fn ids(db: &Connection) -> rusqlite::Result<Vec<u32>> {
    db.prepare("SELECT id FROM t ORDER BY id")?.query_map([], |row| row.get(0))?.collect()
}

/// Tells what happens around transactions.
struct Told(std_mpsc::Sender<&'static str>, std_mpsc::Sender<usize>);

impl Around for Told {
    type State = usize;

    fn before(&mut self) {
        self.0.send("before").expect("heard");
    }

    fn state(&mut self, db: &Connection) -> rusqlite::Result<usize> {
        ids(db).map(|ids| ids.len())
    }

    fn committed(&mut self, rows: usize) {
        self.1.send(rows).expect("heard");
    }
}

struct Rig {
    writer: Handle,
    reader: Handle,
    begun: std_mpsc::Receiver<&'static str>,
    rows: std_mpsc::Receiver<usize>,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("db");
        let ((told, begun), (rows_told, rows)) = (std_mpsc::channel(), std_mpsc::channel());
        let db = database(&path, 1000);
        let writer = Handle::writer("w", db, BOUNDS, Told(told, rows_told)).expect("starts");
        let reader = open_to_read(&path).expect("opens");
        let reader = Handle::reader("r", reader, BOUNDS.queue).expect("starts");
        Self { writer, reader, begun, rows, _dir: dir }
    }

    async fn ids(&self) -> Vec<u32> {
        self.reader.run(ids).await.expect("lives").expect("reads")
    }

    /// Occupies the writer until the sender is dropped: what is asked for meanwhile is one group.
    async fn occupied(&self) -> (std_mpsc::Sender<()>, impl Future<Output = ()>) {
        let (release, wait) = std_mpsc::channel::<()>();
        let (entered, inside) = oneshot::channel();
        let work = move |_: &Connection| -> Result<(), ()> {
            entered.send(())?;
            // Ends when the sender is dropped.
            wait.recv().map_err(drop)
        };
        let mut running = Box::pin(self.writer.run(work));
        tokio::select! {
            _ = inside => {}
            _ = &mut running => panic!("it waits"),
        }
        (release, async move { drop(running.await) })
    }

    /// Runs requests in one transaction: all of them wait before the writer is free.
    async fn in_one_group<T>(&self, requests: impl Future<Output = T>) -> T {
        let (release, occupied) = self.occupied().await;
        let free = async { drop(release) };
        tokio::join!(biased; requests, free, occupied).0
    }
}

#[tokio::test]
async fn a_refused_request_leaves_the_rest_of_its_group() {
    let rig = Rig::new();
    let twice = |db: &Connection| {
        put(2, None)(db)?;
        put(2, None)(db)
    };
    let requests = async {
        tokio::join!(
            biased;
            rig.writer.run(put(1, None)),
            rig.writer.run(twice),
            rig.writer.run(put(3, None)),
        )
    };
    let (first, refused, last) = rig.in_one_group(requests).await;
    first.expect("committed").expect("written");
    refused.expect("committed").expect_err("there twice");
    last.expect("committed").expect("written");
    assert_eq!(rig.ids().await, [1, 3]);
    assert_eq!(rig.begun.try_iter().count(), 2, "three requests, one transaction");
    assert_eq!(rig.rows.try_iter().collect::<Vec<_>>(), [0, 2]);
}

#[tokio::test]
async fn nobody_is_answered_from_a_group_that_was_lost() {
    let rig = Rig::new();
    // The second is refused because of the first, which will turn out not to be there.
    let requests = async {
        tokio::join!(
            biased;
            rig.writer.run(put(1, None)),
            rig.writer.run(put(1, None)),
            rig.writer.run(put(2, Some(9))),
        )
    };
    let (first, second, third) = rig.in_one_group(requests).await;
    let failure = first.expect_err("lost");
    assert!(failure.to_string().contains("FOREIGN KEY"), "{failure}");
    assert_eq!(second.expect_err("lost"), failure);
    assert_eq!(third.expect_err("lost"), failure);
    assert_eq!(rig.ids().await, [0; 0]);
    // The next transaction is not affected.
    rig.writer.run(put(1, None)).await.expect("committed").expect("written");
    assert_eq!(rig.ids().await, [1]);
    assert_eq!(rig.rows.try_iter().collect::<Vec<_>>(), [0, 1]);
}

#[tokio::test]
async fn a_transaction_that_sqlite_has_rolled_back_is_lost_as_a_whole() {
    let rig = Rig::new();
    let full = |db: &Connection| {
        put(2, None)(db)?;
        // As SQLite does by itself on a full disk; the request does not notice.
        db.execute_batch("ROLLBACK")
    };
    let requests = async {
        tokio::join!(
            biased;
            rig.writer.run(put(1, None)),
            rig.writer.run(full),
            rig.writer.run(put(3, None)),
        )
    };
    let (first, second, third) = rig.in_one_group(requests).await;
    first.expect_err("lost");
    second.expect_err("lost");
    third.expect_err("lost");
    assert_eq!(rig.ids().await, [0; 0]);
}

#[tokio::test]
async fn a_write_counts_without_its_caller() {
    let rig = Rig::new();
    let (release, occupied) = rig.occupied().await;
    let mut write = Box::pin(rig.writer.run(put(1, None)));
    tokio::select! {
        biased;
        _ = &mut write => panic!("the writer is occupied"),
        () = tokio::task::yield_now() => {}
    }
    drop(write);
    drop(release);
    occupied.await;
    rig.writer.run(put(2, None)).await.expect("committed").expect("written");
    assert_eq!(rig.ids().await, [1, 2]);
}

#[tokio::test]
async fn the_log_is_copied_once_it_is_long() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("db");
    let writer = Handle::writer("w", database(&path, 8), BOUNDS, ()).expect("starts");
    let body = vec![7u8; 3000];
    for id in 0..200 {
        let body = body.clone();
        let work =
            move |db: &Connection| db.execute("INSERT INTO t VALUES (?1, NULL, ?2)", (id, body));
        writer.run(work).await.expect("committed").expect("written");
    }
    let log = std::fs::metadata(dir.path().join("db-wal")).expect("there").len();
    assert!(log < 30 * 4096, "the log has {log} bytes");
}

/// Fills a database in a process whose files cannot grow: `write` fails with an I/O error there.
#[tokio::test]
async fn the_process_ends_when_the_disk_fails() {
    if let Some(path) = std::env::var_os(DATABASE).map(PathBuf::from) {
        let writer = Handle::writer("w", database(&path, 1000), BOUNDS, ()).expect("starts");
        for id in 0..1000 {
            let work = move |db: &Connection| {
                db.execute("INSERT INTO t VALUES (?1, NULL, zeroblob(3000))", [id])
            };
            writer.run(work).await.expect("committed").expect("written");
        }
        panic!("nothing failed");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("db");
    drop(database(&path, 1000));
    let this = std::env::current_exe().expect("has a path");
    let test = "group_commit::tests::the_process_ends_when_the_disk_fails";
    let script = format!("trap '' XFSZ; ulimit -f 400; exec \"$0\" --exact {test}");
    #[expect(clippy::disallowed_methods, reason = "a process to lose")]
    let ended = std::process::Command::new("/bin/sh")
        .args(["-c".as_ref(), script.as_ref(), this.as_os_str()])
        .env(DATABASE, &path)
        .output()
        .expect("starts");
    // SIGABRT.
    assert_eq!(ended.status.signal(), Some(6), "{ended:?}");
    let found = ids(&open_to_read(&path).expect("opens")).expect("reads");
    assert!(found.len() > 10, "{found:?}");
    assert!(found.iter().copied().eq(0..u32::try_from(found.len()).expect("few")), "{found:?}");
}

#[tokio::test]
async fn a_request_that_panics_fails_alone() {
    let rig = Rig::new();
    let panics = |db: &Connection| -> rusqlite::Result<usize> {
        put(1, None)(db)?;
        panic!("made to panic");
    };
    rig.writer.run(panics).await.expect_err("panicked");
    rig.reader.run(|_| -> Result<(), ()> { panic!("made to panic") }).await.expect_err("panicked");
    rig.writer.run(put(2, None)).await.expect("lives").expect("written");
    assert_eq!(rig.ids().await, [2]);
}

#[test]
fn only_failures_of_the_disk_itself_leave_its_content_unknown() {
    use rusqlite::ffi;
    let failed = |code| disk_failed(&rusqlite::Error::SqliteFailure(ffi::Error::new(code), None));
    for code in [ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_IOERR] {
        assert!(failed(code), "{code}");
    }
    for code in [ffi::SQLITE_IOERR_SHMSIZE, ffi::SQLITE_IOERR_LOCK, ffi::SQLITE_FULL] {
        assert!(!failed(code), "{code}");
    }
}
