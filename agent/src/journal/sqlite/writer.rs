//! The writer thread: group commit.

use std::fs::File;

use rusqlite::{Connection, ErrorCode};
use tokio::sync::{mpsc, oneshot, watch};

use super::{connection::storage, reserve::Reserve, tables};
use crate::journal::Error;

/// Requests queued for the thread at most; further callers wait.
const QUEUE_MAX: usize = 256;
/// Requests in one transaction at most.
const BATCH_MAX: usize = 128;

/// Sends the result to the caller, once the transaction is on the disk or lost.
type Answer = Box<dyn FnOnce(Option<Error>) + Send>;
/// Does its work in the transaction, knowing whether there is space for new work; false rolls back
/// its savepoint.
type Request = Box<dyn FnOnce(&Connection, bool) -> (bool, Answer) + Send>;

/// Handle of the writer thread. The thread ends when the handle is dropped.
#[derive(Debug)]
pub(super) struct Writer {
    requests: mpsc::Sender<Request>,
}

impl Writer {
    pub(super) fn start(
        db: Connection,
        lock: File,
        reserve: Reserve,
        changes: watch::Sender<u64>,
    ) -> Result<Self, Error> {
        let (requests, queue) = mpsc::channel(QUEUE_MAX);
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                write(db, queue, reserve, &changes);
                drop(lock);
            })
            .map_err(|error| Error::Storage(format!("no thread for the journal: {error}")))?;
        Ok(Self { requests })
    }

    /// Writes an end, or something small; also when the disk is nearly full.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.submit(move |db, _| work(db)).await
    }

    /// Writes a beginning: refused while the remaining space is kept for ends.
    pub(super) async fn run_new<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.submit(move |db, room| if room { work(db) } else { Err(Error::Full) }).await
    }

    async fn submit<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection, bool) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let gone = || Error::Storage("the journal's thread has ended".into());
        let (answer, answered) = oneshot::channel();
        let request: Request = Box::new(move |db, room| {
            let result = work(db, room);
            let ok = result.is_ok();
            let reply: Answer = Box::new(move |lost| {
                // A caller that stopped waiting needs no answer, but its write counts.
                drop(answer.send(match lost {
                    Some(error) => Err(error),
                    None => result,
                }));
            });
            (ok, reply)
        });
        self.requests.send(request).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

fn write(
    mut db: Connection,
    mut queue: mpsc::Receiver<Request>,
    mut reserve: Reserve,
    changes: &watch::Sender<u64>,
) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    while queue.blocking_recv_many(&mut batch, BATCH_MAX) > 0 {
        let mut answers = Vec::with_capacity(batch.len());
        reserve.tend();
        let lost = match transact(&mut db, batch.drain(..), reserve.held(), &mut answers) {
            Ok(revision) => {
                changes.send_if_modified(|known| std::mem::replace(known, revision) != revision);
                None
            }
            Err(error) => Some(lost(error)),
        };
        for answer in answers {
            answer(lost.clone());
        }
        // The closed channel tells the callers of unanswered requests.
        batch.clear();
    }
}

fn transact(
    db: &mut Connection,
    batch: impl Iterator<Item = Request>,
    room: bool,
    answers: &mut Vec<Answer>,
) -> Result<u64, rusqlite::Error> {
    let mut transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    for request in batch {
        let savepoint = transaction.savepoint()?;
        let (ok, answer) = request(&savepoint, room);
        answers.push(answer);
        if ok {
            savepoint.commit()?;
        } else {
            savepoint.finish()?;
        }
    }
    let revision = tables::counter(&transaction, tables::REVISION)?;
    transaction.commit()?;
    Ok(revision)
}

/// Handles a lost transaction. After a failed fsync the disk's content is unknown, and a retry
/// would report pages as synced that the kernel has dropped: only a restart, which reads the file
/// anew, is safe.
fn lost(error: rusqlite::Error) -> Error {
    if error.sqlite_error_code() == Some(ErrorCode::SystemIoFailure) {
        tracing::error!(%error, "journal could not be written, stopping at once");
        std::process::abort();
    }
    storage(error)
}
