//! Read access to the journal, for code that must not write it.

use std::sync::Arc;

use proto::id::{SandboxId, Vmid};
use tokio::sync::watch;

use super::{Error, Journal, Record};

/// The journal without its writes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Feed(Arc<dyn Journal>);

impl Feed {
    /// Takes the writes away from a journal.
    pub fn of(journal: Arc<dyn Journal>) -> Self {
        Self(journal)
    }

    /// Random id of the journal file: another id means another history.
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// Range of the vmids that are leased, inclusive.
    pub fn vmids(&self) -> (Vmid, Vmid) {
        self.0.vmids()
    }

    /// Reads one record, tombstones included.
    ///
    /// # Errors
    /// When the journal cannot be read; likewise below.
    pub async fn get(&self, id: &SandboxId) -> Result<Option<Record>, Error> {
        self.0.get(id).await
    }

    /// Reads all records, tombstones included, ordered by id.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn all(&self) -> Result<Vec<Record>, Error> {
        self.0.all().await
    }

    /// Reads the records changed after `revision`, in the order of their revision, at most `limit`.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>, Error> {
        self.0.changed_since(revision, limit).await
    }

    /// Last revision that was written.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn revision(&self) -> Result<u64, Error> {
        self.0.revision().await
    }

    /// Highest revision of a removed tombstone: a reader that is further behind must read all
    /// records again.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn horizon(&self) -> Result<u64, Error> {
        self.0.horizon().await
    }

    /// Highest cancelled attempt of a sandbox; 0 when there is none.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn cancelled(&self, id: &SandboxId) -> Result<u32, Error> {
        self.0.cancelled(id).await
    }

    /// Number of vmids and of addresses that can still be leased.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn room(&self, now_ms: u64) -> Result<(u32, u32), Error> {
        self.0.room(now_ms).await
    }

    /// Revision, for watchers: increases at every write.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.watch()
    }
}
