//! Writes records: journal first, then the index in memory. Nothing else has the journal and the
//! index in its hands, so a record that anybody can see is durable.

use std::{
    collections::{BTreeSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    net::Ipv4Addr,
    sync::Arc,
};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::{RequestId, Team},
};
use tokio::sync::Mutex;

use super::index::{Index, Known, Tombstone};
use crate::{
    journal::{self, Feed, Intent, Journal, Record, intake},
    pve::OwnVolumes,
    sandbox::{Error, reads},
};

/// Locks for writes: two writes on one record take turns, on two records they mostly do not.
const LOCKS: usize = 64;

/// Records of all sandboxes of this node.
#[derive(Debug)]
pub(in crate::sandbox) struct Records {
    journal: Arc<dyn Journal>,
    index: Index,
    locks: Vec<Mutex<()>>,
}

impl Records {
    /// Reads the journal.
    pub(in crate::sandbox) async fn open(journal: Arc<dyn Journal>) -> Result<Self, Error> {
        let index = Index::new(journal.all().await?);
        let locks = (0..LOCKS).map(|_| Mutex::default()).collect();
        Ok(Self { journal, index, locks })
    }

    // Writes.

    /// Records the intent of a creation, with a vmid and an address of its own.
    pub(in crate::sandbox) async fn begin(
        &self,
        intent: Intent,
        now_ms: u64,
    ) -> Result<Arc<Record>, Error> {
        Ok(self.index.apply(self.journal.begin(intent, now_ms).await?))
    }

    /// Writes the first record of a container that existed before it.
    pub(in crate::sandbox) async fn adopt(
        &self,
        record: &Record,
    ) -> Result<Arc<Record>, journal::Error> {
        Ok(self.index.apply(self.journal.adopt(record).await?))
    }

    /// Writes the record of a sandbox that came from another node.
    pub(in crate::sandbox) async fn import(
        &self,
        record: &Record,
        taken: BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Arc<Record>, journal::Error> {
        Ok(self.index.apply(self.journal.import(record, taken, now_ms).await?))
    }

    /// Changes a record and returns it once the change is durable. No change, no write. `change` may
    /// run several times.
    pub(in crate::sandbox) async fn amend(
        &self,
        id: &SandboxId,
        change: impl Fn(&mut Record) -> Result<(), Error>,
    ) -> Result<Arc<Record>, Error> {
        let _turn = self.locks[lock(id)].lock().await;
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

    /// Gives a creation another vmid, because its first one turned out to be taken.
    pub(in crate::sandbox) async fn renumber(
        &self,
        id: &SandboxId,
        taken: BTreeSet<Vmid>,
    ) -> Result<Arc<Record>, Error> {
        let _turn = self.locks[lock(id)].lock().await;
        // The known volumes are those of the old number.
        let volumes = OwnVolumes::default();
        let current = Record { volumes, ..Record::clone(&*self.reload(id).await?) };
        Ok(self.index.apply(self.journal.next_vmid(&current, taken).await?))
    }

    /// Removes tombstones of sandboxes that ended before this time; returns their number.
    pub(in crate::sandbox) async fn forget(&self, before_ms: u64) -> Result<usize, Error> {
        let forgotten = self.journal.forget(before_ms).await?;
        self.index.forget(before_ms);
        Ok(forgotten)
    }

    /// Records that a creation is cancelled up to this attempt.
    pub(in crate::sandbox) async fn cancel(
        &self,
        id: &SandboxId,
        attempt: u32,
        now_ms: u64,
    ) -> Result<(), Error> {
        Ok(self.journal.cancel(id, attempt, now_ms).await?)
    }

    /// Raises the highest epoch seen; returns the highest.
    pub(in crate::sandbox) async fn epoch(&self, epoch: u64) -> Result<u64, Error> {
        Ok(self.journal.epoch(epoch).await?)
    }

    /// Stores the operator's order for the node.
    pub(in crate::sandbox) async fn set_intake(&self, order: &intake::Order) -> Result<(), Error> {
        Ok(self.journal.set_intake(order).await?)
    }

    /// Stores which node the journal belongs to.
    pub(in crate::sandbox) async fn set_node(&self, node: &journal::Node) -> Result<(), Error> {
        Ok(self.journal.set_node(node).await?)
    }

    // Reads.

    /// Returns the record of a sandbox that has not ended.
    pub(in crate::sandbox) fn live(&self, id: &SandboxId) -> Option<Arc<Record>> {
        self.index.live(id)
    }

    /// Returns the record or the tombstone of this name.
    pub(in crate::sandbox) fn known(&self, name: &SandboxRef) -> Option<Known> {
        self.index.known(name)
    }

    /// Returns the record or the tombstone that was made for a request.
    pub(in crate::sandbox) fn by_request(&self, team: &Team, request: &RequestId) -> Option<Known> {
        self.index.by_request(team, request)
    }

    /// Returns the records of all sandboxes that have not ended, by id.
    pub(in crate::sandbox) fn all_live(&self) -> Vec<Arc<Record>> {
        self.index.all_live()
    }

    /// Returns ids after this one, of living and ended sandboxes, in order.
    pub(in crate::sandbox) fn ids_after(
        &self,
        after: Option<SandboxId>,
        limit: usize,
    ) -> Vec<SandboxId> {
        self.index.ids_after(after, limit)
    }

    /// Returns all tombstones, by id.
    pub(in crate::sandbox) fn ended(&self) -> Vec<Tombstone> {
        self.index.ended()
    }

    /// Reads what the journal holds, without the index and without a way to write it.
    pub(in crate::sandbox) fn feed(&self) -> Feed {
        Feed::of(Arc::clone(&self.journal))
    }

    async fn reload(&self, id: &SandboxId) -> Result<Arc<Record>, Error> {
        let record = self.journal.get(id).await?;
        let record = record.ok_or_else(|| reads::not_found(&SandboxRef::Id(*id)))?;
        Ok(self.index.apply(record))
    }
}

fn lock(id: &SandboxId) -> usize {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    usize::try_from(hasher.finish() % LOCKS as u64).unwrap_or_default()
}
