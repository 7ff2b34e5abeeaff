//! Writes: group commit, with space kept for what must succeed on a full disk.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use daemon::{
    group_commit::{Around, Bounds, Handle},
    seal::{Db, Key},
};
use rusqlite::Connection;
use tokio::sync::watch;

use super::{connection::failed, reserve::Reserve, tables};
use crate::journal::{Error, Result};

/// A transaction of this many requests is smaller than what the reserve holds.
const BOUNDS: Bounds = Bounds { queue: 256, group: 128 };

/// Handle of the writer thread. The thread ends when the handle is dropped.
#[derive(Debug)]
pub(super) struct Writer {
    thread: Handle,
    room: Arc<AtomicBool>,
    key: Arc<Key>,
}

impl Writer {
    pub(super) fn start(
        (db, key): (Connection, Arc<Key>),
        lock: File,
        reserve: Reserve,
        changes: watch::Sender<u64>,
    ) -> Result<Self> {
        let room = Arc::<AtomicBool>::default();
        let around = Journaling { reserve, room: Arc::clone(&room), changes, _lock: lock };
        let thread = Handle::writer("journal", db, BOUNDS, around)
            .map_err(|error| Error::Storage(format!("no thread for the journal: {error}")))?;
        Ok(Self { thread, room, key })
    }

    /// Writes an end, or something small; also when the disk is nearly full.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Db<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let key = Arc::clone(&self.key);
        let work = move |connection: &Connection| work(&Db { connection, key: &key });
        self.thread.run(work).await.map_err(failed)?
    }

    /// Writes a beginning: refused while the remaining space is kept for ends.
    pub(super) async fn run_new<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Db<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let room = Arc::clone(&self.room);
        let new = move |db: &Db<'_>| {
            if room.load(Ordering::Acquire) { work(db) } else { Err(Error::Full) }
        };
        self.run(new).await
    }
}

/// Work around each transaction of the journal.
struct Journaling {
    reserve: Reserve,
    room: Arc<AtomicBool>,
    changes: watch::Sender<u64>,
    _lock: File,
}

impl Around for Journaling {
    /// The revision.
    type State = u64;

    fn before(&mut self) {
        self.reserve.tend();
        self.room.store(self.reserve.held(), Ordering::Release);
    }

    fn state(&mut self, db: &Connection) -> rusqlite::Result<u64> {
        tables::counter(db, tables::REVISION)
    }

    fn committed(&mut self, revision: u64) {
        self.changes.send_if_modified(|known| std::mem::replace(known, revision) != revision);
    }
}
