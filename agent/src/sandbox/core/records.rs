//! Writes records: journal first, then the index in memory. Nothing else writes either of them, so
//! a record that anybody can see is durable.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use daemon::keyed_lock::KeyedLock;
use proto::id::{SandboxId, SandboxRef, Vmid};

use super::{index::Index, queries};
use crate::{
    journal::{self, Feed, Intent, Journal, Record, scheduling},
    pve::OwnVolumes,
    sandbox::Result,
};

/// Records of all sandboxes of this node.
#[derive(Debug)]
pub(crate) struct Records {
    journal: Arc<dyn Journal>,
    /// Reads of records; the journal is ahead of it only while a write is under way.
    pub(crate) index: Index,
    /// Two writes on one record take turns.
    locks: KeyedLock<SandboxId>,
}

impl Records {
    /// Reads the journal.
    pub(crate) async fn open(journal: Arc<dyn Journal>) -> Result<Self> {
        let index = Index::new(journal.all().await?);
        Ok(Self { journal, index, locks: KeyedLock::default() })
    }

    // Writes.

    /// Records the intent of a creation, with a vmid and an address of its own.
    pub(crate) async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Arc<Record>> {
        Ok(self.index.apply(self.journal.begin(intent, now_ms).await?))
    }

    /// Writes the first record of a container that existed before it.
    pub(crate) async fn adopt(&self, record: &Record) -> Result<Arc<Record>, journal::Error> {
        Ok(self.index.apply(self.journal.adopt(record).await?))
    }

    /// Writes the record of a sandbox that came from another node.
    pub(crate) async fn import(
        &self,
        record: &Record,
        taken: BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Arc<Record>, journal::Error> {
        Ok(self.index.apply(self.journal.import(record, taken, now_ms).await?))
    }

    /// Changes a record and returns it once the change is durable. No change, no write. `change` may
    /// run several times.
    pub(crate) async fn amend(
        &self,
        id: &SandboxId,
        change: impl Fn(&mut Record) -> Result<()>,
    ) -> Result<Arc<Record>> {
        let _turn = self.locks.lock(*id).await;
        let mut current = match self.index.live(id) {
            Some(current) => current,
            None => self.reload(id).await?,
        };
        loop {
            let mut record = Record::clone(&current);
            change(&mut record)?;
            if record == *current {
                return Ok(current);
            }
            match self.journal.update(&record).await {
                Ok(record) => return Ok(self.index.apply(record)),
                // A caller gave up between the write and the index: the journal is right.
                Err(journal::Error::Conflict { found, .. }) if found > current.revision => {
                    current = self.reload(id).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Changes a record in a way that cannot be refused; as `amend`.
    pub(crate) async fn change(
        &self,
        id: &SandboxId,
        change: impl Fn(&mut Record),
    ) -> Result<Arc<Record>> {
        self.amend(id, |record| {
            change(record);
            Ok(())
        })
        .await
    }

    /// Gives a creation another vmid, because its first one turned out to be taken.
    pub(crate) async fn renumber(
        &self,
        id: &SandboxId,
        taken: BTreeSet<Vmid>,
    ) -> Result<Arc<Record>> {
        let _turn = self.locks.lock(*id).await;
        // The known volumes are those of the old number.
        let volumes = OwnVolumes::default();
        let current = Record { volumes, ..Record::clone(&*self.reload(id).await?) };
        Ok(self.index.apply(self.journal.next_vmid(&current, taken).await?))
    }

    /// Removes tombstones of sandboxes that ended before this time; returns their number.
    pub(crate) async fn forget(&self, before_ms: u64) -> Result<usize> {
        let forgotten = self.journal.forget(before_ms).await?;
        self.index.forget(before_ms);
        Ok(forgotten)
    }

    /// Records that a creation is cancelled up to this attempt.
    pub(crate) async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<()> {
        Ok(self.journal.cancel(id, attempt, now_ms).await?)
    }

    /// Raises the highest epoch seen; returns the highest.
    pub(crate) async fn epoch(&self, epoch: u64) -> Result<u64> {
        Ok(self.journal.epoch(epoch).await?)
    }

    /// Stores the operator's order for the node.
    pub(crate) async fn set_scheduling(&self, order: &scheduling::Scheduling) -> Result<()> {
        Ok(self.journal.set_scheduling(order).await?)
    }

    /// Stores which node the journal belongs to.
    pub(crate) async fn set_node(&self, node: &journal::Node) -> Result<()> {
        Ok(self.journal.set_node(node).await?)
    }

    /// Reads what the journal holds, without the index and without a way to write it.
    pub(crate) fn feed(&self) -> Arc<dyn Feed> {
        Arc::<dyn Journal>::clone(&self.journal)
    }

    async fn reload(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.journal.get(id).await?;
        let record = record.ok_or_else(|| queries::not_found(&SandboxRef::Id(*id)))?;
        Ok(self.index.apply(record))
    }
}
