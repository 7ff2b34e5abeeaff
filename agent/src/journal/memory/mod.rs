//! The journal in memory, for the simulation: it behaves as the one on disk, and a crash loses
//! unsynced writes.

mod book;

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use daemon::{disk::Disk, sync::Mutex};
use proto::id::{SandboxId, Vmid};
use tokio::sync::watch;

use super::{Error, Feed, Intent, Journal, Node, Phase, Pools, Record, Result, scheduling};
use book::Book;

/// Deliberate defect of the journal. The simulation must notice each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Syncs nothing but intents.
    Sync,
    /// Syncs what is written of a creation before it is up only with the next other write.
    Intent,
    /// Syncs that a creation came up only with the next write.
    Answer,
    /// Leases a vmid of a sandbox that has not ended.
    Vmids,
    /// Leases an address of a sandbox that has not ended.
    Addresses,
    /// Ends sandboxes without a tombstone.
    Tombstones,
    /// Loses the epoch.
    Epoch,
    /// Reports that no controller has ever been in charge.
    Fence,
    /// Ends the record of a sandbox when its container is given to another node.
    Exports,
    /// Hides ends from `changed_since`.
    News,
    /// Counts tombstones as leases.
    Room,
    /// Confirms changed rules of a lifetime without storing them.
    Extensions,
    /// Leases an address of a container that is no sandbox.
    Strangers,
    /// Reports failed writes as successful.
    Failures,
}

/// Journal in memory; see the module.
#[derive(Debug)]
pub struct MemoryJournal {
    id: String,
    pools: Pools,
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// State that writes see.
    written: Book,
    /// State that reads see and that survives a crash.
    synced: Book,
    /// State that survives a crash instead, when a defect left out a sync.
    durable: Option<Book>,
    /// Reason why every write fails now.
    failing: Option<String>,
    /// Number of crashes: a write from before a crash must not be acknowledged after it.
    crashes: u64,
}

impl MemoryJournal {
    /// Creates an empty journal. The caller chooses the id, so that a simulation can be repeated.
    pub fn new(id: impl Into<String>, pools: Pools, disk: Arc<dyn Disk>) -> Self {
        Self {
            id: id.into(),
            pools,
            disk,
            state: Mutex::default(),
            revision: watch::Sender::new(0),
        }
    }

    /// Activates a defect.
    #[must_use]
    pub fn lapsing(self, mutation: Mutation) -> Self {
        {
            let mut state = self.state.lock();
            (state.written.mutation, state.synced.mutation) = (Some(mutation), Some(mutation));
        }
        self
    }

    /// Record of this sandbox as a crash would leave it now.
    pub fn durable(&self, id: &SandboxId) -> Option<Record> {
        let state = self.state.lock();
        let book = state.durable.as_ref().unwrap_or(&state.synced);
        book.records.get(id).map(|record| Record::clone(record))
    }

    /// Makes every write fail for this reason and change nothing, as on a full or broken disk;
    /// `None` ends it.
    pub fn fail(&self, why: Option<&str>) {
        self.state.lock().failing = why.map(str::to_owned);
    }

    /// True while writes fail.
    pub fn is_failing(&self) -> bool {
        self.state.lock().failing.is_some()
    }

    /// Loses unsynced writes. Writes that wait for their sync fail.
    pub fn crash(&self) {
        let mut state = self.state.lock();
        if let Some(durable) = state.durable.take() {
            state.synced = durable;
        }
        state.written = state.synced.clone();
        state.crashes += 1;
    }

    async fn write<T>(&self, work: impl FnOnce(&mut Book, &Pools) -> Result<T>) -> Result<T> {
        self.write_unless(&[Mutation::Sync], work).await
    }

    /// Writes, and syncs unless a defect leaves that out.
    async fn write_unless<T>(
        &self,
        unsynced: &[Mutation],
        work: impl FnOnce(&mut Book, &Pools) -> Result<T>,
    ) -> Result<T> {
        let (result, crashes) = {
            let mut state = self.state.lock();
            // A failed request changes nothing, like a savepoint that is rolled back.
            let mut book = state.written.clone();
            let result = work(&mut book, &self.pools)?;
            match &state.failing {
                Some(_) if book.mutation == Some(Mutation::Failures) => return Ok(result),
                Some(why) => return Err(Error::Storage(why.clone())),
                None => state.written = book,
            }
            (result, state.crashes)
        };
        self.disk.before_sync().await;
        self.sync(crashes, unsynced)?;
        self.disk.after_sync().await;
        Ok(result)
    }

    fn sync(&self, crashes: u64, unsynced: &[Mutation]) -> Result<()> {
        let mut state = self.state.lock();
        if state.crashes != crashes {
            return Err(Error::Storage("the node crashed before the sync".into()));
        }
        let left_out = state.written.mutation.is_some_and(|mutation| unsynced.contains(&mutation));
        state.durable =
            left_out.then(|| state.durable.take().unwrap_or_else(|| state.synced.clone()));
        state.synced = state.written.clone();
        let revision = state.synced.revision;
        drop(state);
        self.revision.send_if_modified(|known| std::mem::replace(known, revision) != revision);
        Ok(())
    }

    fn read<T>(&self, work: impl FnOnce(&Book) -> T) -> T {
        work(&self.state.lock().synced)
    }
}

#[async_trait::async_trait]
impl Feed for MemoryJournal {
    fn id(&self) -> &str {
        &self.id
    }

    fn vmids(&self) -> (Vmid, Vmid) {
        self.pools.vmids
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Record>> {
        Ok(self.read(|book| book.records.get(id).map(|record| Record::clone(record))))
    }

    async fn all(&self) -> Result<Vec<Record>> {
        Ok(self.read(|book| book.records.values().map(|record| Record::clone(record)).collect()))
    }

    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>> {
        let mut changed: Vec<Arc<Record>> = self.read(|book| {
            let told = |r: &&Arc<Record>| !r.phase.ended() || book.mutation != Some(Mutation::News);
            let changed = book.records.values().filter(|record| record.revision > revision);
            changed.filter(told).cloned().collect()
        });
        changed.sort_by_key(|record| record.revision);
        changed.truncate(limit);
        Ok(changed.iter().map(|record| Record::clone(record)).collect())
    }

    async fn revision(&self) -> Result<u64> {
        Ok(self.read(|book| book.revision))
    }

    async fn horizon(&self) -> Result<u64> {
        Ok(self.read(|book| book.horizon))
    }

    async fn scheduling(&self) -> Result<scheduling::Scheduling> {
        Ok(self.read(|book| book.scheduling.clone()))
    }

    async fn node(&self) -> Result<Option<Node>> {
        Ok(self.read(|book| book.node.clone()))
    }

    async fn cancelled(&self, id: &SandboxId) -> Result<u32> {
        Ok(self.read(|book| book.cancelled.get(id).map_or(0, |&(attempt, _)| attempt)))
    }

    async fn room(&self, now_ms: u64) -> Result<(u32, u32)> {
        Ok(self.read(|book| book.room(&self.pools, now_ms)))
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

#[async_trait::async_trait]
impl Journal for MemoryJournal {
    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record> {
        self.write_unless(&[Mutation::Intent], |book, pools| book.begin(pools, &intent, now_ms))
            .await
    }

    async fn adopt(&self, record: &Record) -> Result<Record> {
        self.write(|book, _| book.adopt(record)).await
    }

    async fn import(
        &self,
        record: &Record,
        taken_ips: BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record> {
        self.write(|book, pools| book.import(pools, record, &taken_ips, now_ms)).await
    }

    async fn next_vmid(&self, record: &Record, taken: BTreeSet<Vmid>) -> Result<Record> {
        self.write(|book, pools| book.next_vmid(pools, record, &taken)).await
    }

    async fn update(&self, record: &Record) -> Result<Record> {
        let unsynced: &[_] = match record.phase {
            Phase::Creating => &[Mutation::Sync, Mutation::Intent],
            Phase::Running => &[Mutation::Sync, Mutation::Answer],
            Phase::Undoing
            | Phase::Paused
            | Phase::Starting
            | Phase::Stopping
            | Phase::Stopped
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => &[Mutation::Sync],
        };
        self.write_unless(unsynced, |book, pools| book.update(pools, record)).await
    }

    async fn forget(&self, before_ms: u64) -> Result<usize> {
        self.write(|book, _| Ok(book.forget(before_ms))).await
    }

    async fn epoch(&self, epoch: u64) -> Result<u64> {
        self.write(|book, _| {
            let highest = book.epoch.max(epoch);
            if book.mutation != Some(Mutation::Epoch) {
                book.epoch = highest;
            }
            Ok(if book.mutation == Some(Mutation::Fence) { 0 } else { highest })
        })
        .await
    }

    async fn set_scheduling(&self, order: &scheduling::Scheduling) -> Result<()> {
        self.write(|book, _| {
            book.scheduling.clone_from(order);
            Ok(())
        })
        .await
    }

    async fn set_node(&self, node: &Node) -> Result<()> {
        self.write(|book, _| {
            book.node = Some(node.clone());
            Ok(())
        })
        .await
    }

    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<()> {
        self.write(|book, _| {
            let (known, at_ms) = book.cancelled.entry(*id).or_default();
            (*known, *at_ms) = ((*known).max(attempt), now_ms);
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use daemon::disk::SoundDisk;

    use super::{super::conformance as suite, *};

    /// Disk that crashes the journal at the chosen point, once it is armed.
    #[derive(Debug, Default)]
    struct Crashing {
        journal: OnceLock<Arc<MemoryJournal>>,
        before: bool,
    }

    #[async_trait::async_trait]
    impl Disk for Crashing {
        async fn before_sync(&self) {
            if let Some(journal) = self.journal.get().filter(|_| self.before) {
                journal.crash();
            }
        }

        async fn after_sync(&self) {
            if let Some(journal) = self.journal.get() {
                journal.crash();
            }
        }
    }

    async fn survives(before: bool) -> bool {
        let disk = Arc::new(Crashing { before, ..Crashing::default() });
        let journal = Arc::new(MemoryJournal::new("j", suite::pools(), Arc::clone(&disk) as _));
        disk.journal.set(Arc::clone(&journal)).expect("set once");
        let answer = journal.begin(suite::intent(1), 0).await;
        let kept = journal.get(&suite::id(1)).await.expect("reads").is_some();
        assert!(kept || answer.is_err(), "an acknowledged write was lost");
        kept
    }

    #[tokio::test]
    async fn failed_write_changes_nothing_and_the_next_can_succeed() {
        let journal = MemoryJournal::new("j", suite::pools(), Arc::new(SoundDisk));
        journal.fail(Some("no space left on device"));
        let failed = journal.begin(suite::intent(1), 0).await;
        assert!(matches!(failed, Err(Error::Storage(_))), "{failed:?}");
        assert_eq!(journal.all().await.expect("reads go on"), []);
        journal.fail(None);
        journal.begin(suite::intent(1), 0).await.expect("written");
    }

    #[tokio::test]
    async fn crash_loses_only_unsynced_writes() {
        assert!(!survives(true).await);
        assert!(survives(false).await);
    }
}
