//! The journal on disk: one SQLite file in WAL mode with `synchronous=FULL`, so a commit is an
//! fsync. Requests that wait share one; reads never wait for a write.

mod connection;
mod reserve;
mod sealed;
mod tables;
mod writer;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use daemon::{
    group_commit::Handle,
    seal::{Db, Key},
};
use proto::id::{SandboxId, SandboxRef, Vmid};
use rusqlite::Connection;
use tokio::sync::watch;

use super::{Error, Feed, Intent, Journal, Node, Pools, Record, Result, scheduling};
use reserve::Reserve;
use writer::Writer;

/// Reads that wait at most; further callers wait to get in.
const READS_MAX: usize = 256;

/// Journal in a SQLite file; see the module.
#[derive(Debug)]
pub struct SqliteJournal {
    id: String,
    pools: Pools,
    writer: Writer,
    reader: Handle,
    key: Arc<Key>,
    revision: watch::Receiver<u64>,
}

impl SqliteJournal {
    /// Opens the file, creating it if absent. The key of the node, `secret.key`, is beside it; a
    /// journal whose key is lost opens too, and its records have no environment then.
    ///
    /// # Errors
    /// When the file cannot be opened, is in use by another process, or was written by a version
    /// that is more than one schema ahead.
    pub fn open(path: &Path, pools: Pools) -> Result<Self> {
        // Comes first, because a full disk may have no room to open a journal either.
        let reserve = Reserve::beside(path);
        let mut opened = connection::open(path)?;
        let revision = tables::revision(&opened.writer)?;
        let key = Arc::new(sealed::key_beside(path)?);
        sealed::seal_the_plain(&mut opened.writer, &key, opened.new)?;
        sealed::tell_lost(&tables::all(&Db { connection: &opened.writer, key: &key })?);
        let (changes, watched) = watch::channel(revision);
        Ok(Self {
            id: opened.id,
            pools,
            writer: Writer::start(
                (opened.writer, Arc::clone(&key)),
                opened.lock,
                reserve,
                changes,
            )?,
            reader: Handle::reader("journal-read", opened.reader, READS_MAX)
                .map_err(|error| Error::Storage(format!("no thread for the journal: {error}")))?,
            key,
            revision: watched,
        })
    }

    /// Node that the journal at `path` belongs to, read without opening it for writing: the
    /// configuration needs the node before the journal is open. `None` when there is no file, or no
    /// node in it.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn node_of(path: &Path) -> Result<Option<Node>> {
        if !path.exists() {
            return Ok(None);
        }
        tables::node(&connection::look(path)?)
    }

    /// Whether the journal at `path` has a sandbox that has not ended, read beside an agent that runs. False when there
    /// is no file.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn has_live(path: &Path) -> Result<bool> {
        if !path.exists() {
            return Ok(false);
        }
        tables::has_live(&connection::look(path)?)
    }

    /// Record of a sandbox in the journal at `path`, read beside an agent that runs; by vmid: that of the
    /// sandbox which has it now. `None` when there is no such record.
    ///
    /// # Errors
    /// When the journal is missing or cannot be read.
    pub fn record_of(path: &Path, sandbox: SandboxRef) -> Result<Option<Record>> {
        let connection = connection::look(path)?;
        let key = sealed::key_beside(path)?;
        let db = Db { connection: &connection, key: &key };
        match sandbox {
            SandboxRef::Id(id) => tables::get(&db, &id),
            SandboxRef::Vmid(vmid) => {
                let mut all = tables::all(&db)?.into_iter();
                Ok(all.find(|record| record.vmid == vmid && !record.phase.ended()))
            }
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Db<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let key = Arc::clone(&self.key);
        let work = move |connection: &Connection| work(&Db { connection, key: &key });
        self.reader.run(work).await.map_err(connection::failed)?
    }
}

#[async_trait::async_trait]
impl Feed for SqliteJournal {
    fn id(&self) -> &str {
        &self.id
    }

    fn vmids(&self) -> (Vmid, Vmid) {
        self.pools.vmids
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Record>> {
        let id = *id;
        self.read(move |db| tables::get(db, &id)).await
    }

    async fn all(&self) -> Result<Vec<Record>> {
        self.read(tables::all).await
    }

    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>> {
        self.read(move |db| tables::changed_since(db, revision, limit)).await
    }

    async fn revision(&self) -> Result<u64> {
        self.read(|db| tables::revision(db)).await
    }

    async fn horizon(&self) -> Result<u64> {
        self.read(|db| tables::horizon(db)).await
    }

    async fn scheduling(&self) -> Result<scheduling::Scheduling> {
        self.read(|db| tables::scheduling(db)).await
    }

    async fn node(&self) -> Result<Option<Node>> {
        self.read(|db| tables::node(db)).await
    }

    async fn cancelled(&self, id: &SandboxId) -> Result<u32> {
        let id = *id;
        self.read(move |db| tables::cancelled(db, &id)).await
    }

    async fn room(&self, now_ms: u64) -> Result<(u32, u32)> {
        let pools = self.pools.clone();
        self.read(move |db| tables::room(db, &pools, now_ms)).await
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.clone()
    }
}

#[async_trait::async_trait]
impl Journal for SqliteJournal {
    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record> {
        let pools = self.pools.clone();
        self.writer.run_new(move |db| tables::begin(db, &pools, &intent, now_ms)).await
    }

    async fn adopt(&self, record: &Record) -> Result<Record> {
        let record = record.clone();
        self.writer.run_new(move |db| tables::adopt(db, &record)).await
    }

    async fn import(
        &self,
        record: &Record,
        taken_ips: BTreeSet<std::net::Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record> {
        let (pools, record) = (self.pools.clone(), record.clone());
        self.writer.run_new(move |db| tables::import(db, &pools, &record, &taken_ips, now_ms)).await
    }

    async fn next_vmid(&self, record: &Record, taken: BTreeSet<Vmid>) -> Result<Record> {
        let (pools, record) = (self.pools.clone(), record.clone());
        self.writer.run(move |db| tables::next_vmid(db, &pools, &record, &taken)).await
    }

    async fn update(&self, record: &Record) -> Result<Record> {
        let (pools, record) = (self.pools.clone(), record.clone());
        self.writer.run(move |db| tables::update(db, &pools, &record)).await
    }

    async fn forget(&self, before_ms: u64) -> Result<usize> {
        self.writer.run(move |db| tables::forget(db, before_ms)).await
    }

    async fn epoch(&self, epoch: u64) -> Result<u64> {
        self.writer.run(move |db| tables::epoch(db, epoch)).await
    }

    async fn set_scheduling(&self, order: &scheduling::Scheduling) -> Result<()> {
        let order = order.clone();
        self.writer.run(move |db| tables::set_scheduling(db, &order)).await
    }

    async fn set_node(&self, node: &Node) -> Result<()> {
        let node = node.clone();
        self.writer.run(move |db| tables::set_node(db, &node)).await
    }

    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<()> {
        let id = *id;
        self.writer.run(move |db| tables::cancel(db, &id, attempt, now_ms)).await
    }
}

#[cfg(test)]
mod tests;
