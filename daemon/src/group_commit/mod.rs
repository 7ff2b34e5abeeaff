//! SQLite with group commit: one thread writes. It runs all waiting requests in one transaction,
//! each in a savepoint of its own, and answers them once the transaction is on the disk, so that
//! many callers share one fsync. Another thread reads, on a connection of its own.
//!
//! A request is answered with its own result only when its group was committed: even a refusal may
//! come from what another request of the group had written. If the group is lost, all of it is
//! rolled back and every caller is told. If the disk itself fails, the process ends; see `lost`.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    thread,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

/// Longest wait for another process that writes.
const BUSY: Duration = Duration::from_secs(5);

/// Failure of the database, not of one request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

impl Failure {
    fn at(path: &Path, why: impl std::fmt::Display) -> Self {
        Self(format!("{}: {why}", path.display()))
    }

    fn ended() -> Self {
        Self("the thread of the database has ended".into())
    }
}

/// Opens a database to write. A new file is readable by its owner only, and SQLite gives the
/// files beside it the same mode. The write-ahead log is copied into the database once it has
/// `log_pages` pages.
///
/// # Errors
/// When the file cannot be opened, or its file system has no write-ahead log.
pub fn open(path: &Path, log_pages: u32) -> Result<Connection, Failure> {
    let created = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    created.map_err(|error| Failure::at(path, error))?;
    let db = connect(path, OpenFlags::default())?;
    let failed = |error| Failure::at(path, error);
    let mode: String =
        db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        return Err(Failure::at(path, "no write-ahead log on this file system"));
    }
    // NORMAL would lose the last commits at a power cut.
    db.execute_batch("PRAGMA synchronous = FULL").map_err(failed)?;
    // A copy that fails is not part of the commit: SQLite keeps the log and copies it again.
    db.pragma_update(None, "wal_autocheckpoint", log_pages).map_err(failed)?;
    Ok(db)
}

/// Opens a database that `open` has opened before, here or in another process, to read it.
///
/// # Errors
/// When the file cannot be opened.
pub fn open_to_read(path: &Path) -> Result<Connection, Failure> {
    connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
}

fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, Failure> {
    let connected =
        Connection::open_with_flags(path, flags).and_then(|db| db.busy_timeout(BUSY).map(|()| db));
    connected.map_err(|error| Failure::at(path, error))
}

/// Bounds of a queue of requests.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Requests that wait at most; further callers wait to get in.
    pub queue: usize,
    /// Requests in one transaction at most.
    pub group: usize,
}

/// Work around each transaction, on the writer's thread. Dropped after the connection.
pub trait Around: Send + 'static {
    /// State that the transaction makes durable.
    type State;

    /// Runs before each transaction.
    fn before(&mut self) {}

    /// Reads the state at the end of the transaction.
    ///
    /// # Errors
    /// When it cannot be read: the group is lost.
    fn state(&mut self, db: &Connection) -> rusqlite::Result<Self::State>;

    /// Runs when the transaction is on the disk, before the answers.
    fn committed(&mut self, _: Self::State) {}
}

impl Around for () {
    type State = ();

    fn state(&mut self, _: &Connection) -> rusqlite::Result<()> {
        Ok(())
    }
}

/// Request in the queue of a thread.
trait Request: Send {
    /// Does the work; false when its changes are to be rolled back.
    fn run(&mut self, db: &Connection) -> bool;

    /// Answers the caller. A caller that has gone needs no answer, but its write counts.
    fn answer(self: Box<Self>, lost: Option<&Failure>);
}

struct Call<W, T, E> {
    work: Option<W>,
    result: Option<Result<T, E>>,
    caller: oneshot::Sender<Result<Result<T, E>, Failure>>,
}

impl<W, T, E> Request for Call<W, T, E>
where
    W: FnOnce(&Connection) -> Result<T, E> + Send,
    T: Send,
    E: Send,
{
    fn run(&mut self, db: &Connection) -> bool {
        // A request that panics fails alone: the thread serves everybody. Its savepoint is rolled back.
        let work = self.work.take();
        self.result = work.and_then(|work| catch_unwind(AssertUnwindSafe(|| work(db))).ok());
        matches!(self.result, Some(Ok(_)))
    }

    fn answer(self: Box<Self>, lost: Option<&Failure>) {
        let result = match lost {
            Some(failure) => Err(failure.clone()),
            None => self.result.ok_or_else(|| Failure("the request panicked".into())),
        };
        drop(self.caller.send(result));
    }
}

type Queue = mpsc::Sender<Box<dyn Request>>;

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(body).map(drop)
}

/// Handle of a thread that works on a database. The thread ends when the handle is dropped.
pub struct Handle(Queue);

impl Handle {
    /// Starts the thread that writes, and calls `around` at each transaction.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn writer<A: Around>(
        name: &str,
        mut db: Connection,
        bounds: Bounds,
        mut around: A,
    ) -> io::Result<Self> {
        let (queue, mut requests) = mpsc::channel::<Box<dyn Request>>(bounds.queue);
        spawn(name, move || {
            let mut group = Vec::with_capacity(bounds.group);
            while requests.blocking_recv_many(&mut group, bounds.group) > 0 {
                around.before();
                let committed = commit(&mut db, &mut group, &mut around).map_err(lost);
                let failure = committed.map(|state| around.committed(state)).err();
                for request in group.drain(..) {
                    request.answer(failure.as_ref());
                }
            }
            drop(db);
            drop(around);
        })?;
        Ok(Self(queue))
    }

    /// Starts a thread that reads; at most `queue_max` requests wait for it.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn reader(name: &str, db: Connection, queue_max: usize) -> io::Result<Self> {
        let (queue, mut requests) = mpsc::channel::<Box<dyn Request>>(queue_max);
        spawn(name, move || {
            while let Some(mut request) = requests.blocking_recv() {
                request.run(&db);
                request.answer(None);
            }
        })?;
        Ok(Self(queue))
    }

    /// Runs `work` on the thread. Changes count if `work` succeeds; they are on the disk then.
    ///
    /// # Errors
    /// When the transaction is lost, and with it the changes.
    pub async fn run<T, E, W>(&self, work: W) -> Result<Result<T, E>, Failure>
    where
        T: Send + 'static,
        E: Send + 'static,
        W: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    {
        let (caller, answer) = oneshot::channel();
        let request = Box::new(Call { work: Some(work), result: None, caller });
        self.0.send(request).await.map_err(|_| Failure::ended())?;
        answer.await.unwrap_or_else(|_| Err(Failure::ended()))
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

fn commit<A: Around>(
    db: &mut Connection,
    group: &mut [Box<dyn Request>],
    around: &mut A,
) -> rusqlite::Result<A::State> {
    let mut transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for request in group {
        let savepoint = transaction.savepoint()?;
        // After some failures SQLite has rolled back the whole transaction: both of these fail then.
        if request.run(&savepoint) {
            savepoint.commit()?;
        } else {
            savepoint.finish()?;
        }
    }
    let state = around.state(&transaction)?;
    transaction.commit()?;
    Ok(state)
}

/// Converts the failure of a transaction, which is rolled back. If the disk failed, ends the
/// process: after a failed fsync the content of the disk is unknown, and a retry would report pages
/// as synced that the kernel has dropped. Only a restart, which reads the file anew, is safe.
fn lost(error: rusqlite::Error) -> Failure {
    if disk_failed(&error) {
        tracing::error!(%error, "database could not be written, stopping at once");
        std::process::abort();
    }
    Failure(error.to_string())
}

/// True when the content of the disk is unknown. Failures of the lock and of the shared memory beside
/// the database are not: they come before anything is written, on a full disk for example.
fn disk_failed(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi;
    let Some(error) = error.sqlite_error() else { return false };
    let before_the_write = [
        ffi::SQLITE_IOERR_LOCK,
        ffi::SQLITE_IOERR_RDLOCK,
        ffi::SQLITE_IOERR_UNLOCK,
        ffi::SQLITE_IOERR_CHECKRESERVEDLOCK,
        ffi::SQLITE_IOERR_NOMEM,
        ffi::SQLITE_IOERR_SHMOPEN,
        ffi::SQLITE_IOERR_SHMSIZE,
        ffi::SQLITE_IOERR_SHMLOCK,
        ffi::SQLITE_IOERR_SHMMAP,
    ];
    error.code == ErrorCode::SystemIoFailure && !before_the_write.contains(&error.extended_code)
}

#[cfg(test)]
mod tests;
