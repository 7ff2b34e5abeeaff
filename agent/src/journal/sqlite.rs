//! The journal on disk: one SQLite file in WAL mode with `synchronous=FULL`, so a commit is an
//! fsync. One thread writes: it puts all waiting requests into one transaction, each in a savepoint
//! of its own, and answers them when the transaction is on the disk. Reads have their own
//! connection and never wait for a write.

mod connection;
mod reserve;
mod tables;
mod writer;

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex},
};

use proto::id::{SandboxId, Vmid};
use rusqlite::Connection;
use tokio::sync::watch;

use super::{Error, Intent, Journal, Node, Pools, Record, intake};
use reserve::Reserve;
use writer::Writer;

/// Journal in a SQLite file; see the module.
#[derive(Debug)]
pub struct SqliteJournal {
    id: String,
    pools: Pools,
    writer: Writer,
    reader: Arc<Mutex<Connection>>,
    revision: watch::Receiver<u64>,
}

impl SqliteJournal {
    /// Opens the file, creating it if absent.
    ///
    /// # Errors
    /// When the file cannot be opened, is in use by another process, or was written by a version
    /// that is more than one schema ahead.
    pub fn open(path: &Path, pools: Pools) -> Result<Self, Error> {
        // Comes first, because a full disk may have no room to open a journal either.
        let reserve = Reserve::beside(path);
        let opened = connection::open(path)?;
        let revision = tables::revision(&opened.writer)?;
        let (changes, watched) = watch::channel(revision);
        Ok(Self {
            id: opened.id,
            pools,
            writer: Writer::start(opened.writer, opened.lock, reserve, changes)?,
            reader: Arc::new(Mutex::new(opened.reader)),
            revision: watched,
        })
    }

    /// Node that the journal at `path` belongs to, read without opening it for writing: the
    /// configuration needs the node before the journal is open. `None` when there is no file, or no
    /// node in it.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn node_of(path: &Path) -> Result<Option<Node>, Error> {
        if !path.exists() {
            return Ok(None);
        }
        tables::node(&connection::look(path)?)
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let reader = Arc::clone(&self.reader);
        tokio::task::spawn_blocking(move || {
            let reader = reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            work(&reader)
        })
        .await
        .map_err(|_| Error::Storage("the reading task was stopped".into()))?
    }
}

#[async_trait::async_trait]
impl Journal for SqliteJournal {
    fn id(&self) -> &str {
        &self.id
    }

    fn vmids(&self) -> (Vmid, Vmid) {
        self.pools.vmids
    }

    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record, Error> {
        let pools = self.pools.clone();
        self.writer.run_new(move |db| tables::begin(db, &pools, &intent, now_ms)).await
    }

    async fn adopt(&self, record: &Record) -> Result<Record, Error> {
        let record = record.clone();
        self.writer.run_new(move |db| tables::adopt(db, &record)).await
    }

    async fn import(
        &self,
        record: &Record,
        taken_ips: BTreeSet<std::net::Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record, Error> {
        let (pools, record) = (self.pools.clone(), record.clone());
        let work = move |db: &_| tables::import(db, &pools, &record, &taken_ips, now_ms);
        self.writer.run_new(work).await
    }

    async fn next_vmid(&self, record: &Record, taken: BTreeSet<Vmid>) -> Result<Record, Error> {
        let (pools, record) = (self.pools.clone(), record.clone());
        self.writer.run(move |db| tables::next_vmid(db, &pools, &record, &taken)).await
    }

    async fn update(&self, record: &Record) -> Result<Record, Error> {
        let (pools, record) = (self.pools.clone(), record.clone());
        self.writer.run(move |db| tables::update(db, &pools, &record)).await
    }

    async fn forget(&self, before_ms: u64) -> Result<usize, Error> {
        self.writer.run(move |db| tables::forget(db, before_ms)).await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Record>, Error> {
        let id = *id;
        self.read(move |db| tables::get(db, &id)).await
    }

    async fn all(&self) -> Result<Vec<Record>, Error> {
        self.read(tables::all).await
    }

    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>, Error> {
        self.read(move |db| tables::changed_since(db, revision, limit)).await
    }

    async fn revision(&self) -> Result<u64, Error> {
        self.read(tables::revision).await
    }

    async fn horizon(&self) -> Result<u64, Error> {
        self.read(tables::horizon).await
    }

    async fn epoch(&self, epoch: u64) -> Result<u64, Error> {
        self.writer.run(move |db| tables::epoch(db, epoch)).await
    }

    async fn intake(&self) -> Result<intake::Order, Error> {
        self.read(tables::intake).await
    }

    async fn set_intake(&self, order: &intake::Order) -> Result<(), Error> {
        let order = order.clone();
        self.writer.run(move |db| tables::set_intake(db, &order)).await
    }

    async fn node(&self) -> Result<Option<Node>, Error> {
        self.read(tables::node).await
    }

    async fn set_node(&self, node: &Node) -> Result<(), Error> {
        let node = node.clone();
        self.writer.run(move |db| tables::set_node(db, &node)).await
    }

    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<(), Error> {
        let id = *id;
        self.writer.run(move |db| tables::cancel(db, &id, attempt, now_ms)).await
    }

    async fn cancelled(&self, id: &SandboxId) -> Result<u32, Error> {
        let id = *id;
        self.read(move |db| tables::cancelled(db, &id)).await
    }

    async fn room(&self, now_ms: u64) -> Result<(u32, u32), Error> {
        let pools = self.pools.clone();
        self.read(move |db| tables::room(db, &pools, now_ms)).await
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.clone()
    }
}

#[cfg(test)]
mod tests;
