//! The journal in memory, for the simulation: it behaves as the one on disk, and a crash loses
//! unsynced writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::{
    id::{SandboxId, Vmid},
    spec::Network,
};
use tokio::sync::watch;

use super::{Error, Intent, Journal, Node, Phase, Pools, Record, intake, ring};

/// Hooks around a sync, for the simulation: they take time, or crash the node and never return.
#[async_trait::async_trait]
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Called after the write, while a crash still loses it.
    async fn before_sync(&self);
    /// Called when the write survives a crash, but its caller does not know that yet.
    async fn after_sync(&self);
}

/// Disk that takes no time and does not crash.
#[derive(Debug)]
pub struct SoundDisk;

#[async_trait::async_trait]
impl Disk for SoundDisk {
    async fn before_sync(&self) {}
    async fn after_sync(&self) {}
}

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

/// Content of the file.
#[derive(Debug, Clone, Default)]
struct Book {
    mutation: Option<Mutation>,
    records: BTreeMap<SandboxId, Arc<Record>>,
    resting: BTreeMap<Ipv4Addr, u64>,
    cancelled: BTreeMap<SandboxId, (u32, u64)>,
    revision: u64,
    horizon: u64,
    epoch: u64,
    intake: intake::Order,
    node: Option<Node>,
    vmid_cursor: Option<u32>,
    address_cursor: Option<u32>,
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
            let mut state = self.lock();
            (state.written.mutation, state.synced.mutation) = (Some(mutation), Some(mutation));
        }
        self
    }

    /// Record of this sandbox as a crash would leave it now.
    pub fn durable(&self, id: &SandboxId) -> Option<Record> {
        let state = self.lock();
        let book = state.durable.as_ref().unwrap_or(&state.synced);
        book.records.get(id).map(|record| Record::clone(record))
    }

    /// Makes every write fail for this reason and change nothing, as on a full or broken disk;
    /// `None` ends it.
    pub fn fail(&self, why: Option<&str>) {
        self.lock().failing = why.map(str::to_owned);
    }

    /// True while writes fail.
    pub fn is_failing(&self) -> bool {
        self.lock().failing.is_some()
    }

    /// Loses unsynced writes. Writes that wait for their sync fail.
    pub fn crash(&self) {
        let mut state = self.lock();
        if let Some(durable) = state.durable.take() {
            state.synced = durable;
        }
        state.written = state.synced.clone();
        state.crashes += 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write<T>(
        &self,
        work: impl FnOnce(&mut Book, &Pools) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.write_unless(&[Mutation::Sync], work).await
    }

    /// Writes, and syncs unless a defect leaves that out.
    async fn write_unless<T>(
        &self,
        unsynced: &[Mutation],
        work: impl FnOnce(&mut Book, &Pools) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (result, crashes) = {
            let mut state = self.lock();
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

    fn sync(&self, crashes: u64, unsynced: &[Mutation]) -> Result<(), Error> {
        let mut state = self.lock();
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
        work(&self.lock().synced)
    }
}

impl Book {
    fn begin(&mut self, pools: &Pools, intent: &Intent, now_ms: u64) -> Result<Record, Error> {
        let mut record = intent.record.clone();
        if let Some(before) = self.records.get(&record.id)
            && (!before.phase.ended() || before.attempt >= record.attempt)
        {
            return Err(Error::Conflict { id: record.id, expected: 0, found: before.revision });
        }
        let none = BTreeSet::new();
        let strangers =
            if self.mutation == Some(Mutation::Strangers) { &none } else { &intent.taken_ips };
        record.vmid = self.lease_vmid(pools, &intent.taken)?;
        if self.mutation == Some(Mutation::Vmids) {
            record.vmid = self.living().next().map_or(record.vmid, |other| other.vmid);
        }
        if intent.lease_address {
            record.ip = Some(self.lease_address(pools, strangers, now_ms)?);
        }
        self.put(record)
    }

    fn adopt(&mut self, record: &Record) -> Result<Record, Error> {
        if let Some(known) = self.records.get(&record.id) {
            return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
        }
        self.write_found(record)
    }

    fn import(
        &mut self,
        pools: &Pools,
        record: &Record,
        taken_ips: &BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record, Error> {
        if let Some(known) =
            self.records.get(&record.id).filter(|known| !known.gives_way_to(record))
        {
            return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
        }
        let mut record = record.clone();
        if record.network == Network::Static {
            record.ip = Some(self.lease_address(pools, taken_ips, now_ms)?);
        }
        self.write_found(&record)
    }

    /// Writes the record of a container that existed before it.
    fn write_found(&mut self, record: &Record) -> Result<Record, Error> {
        let clashes = |other: &Record| {
            other.vmid == record.vmid
                || (other.lease().is_some() && other.lease() == record.lease())
                || (&other.team, &other.request_id) == (&record.team, &record.request_id)
        };
        let other = self.living().find(|other| clashes(other));
        if let Some(other) = other {
            return Err(Error::Conflict { id: record.id, expected: 0, found: other.revision });
        }
        self.put(record.clone())
    }

    fn next_vmid(
        &mut self,
        pools: &Pools,
        record: &Record,
        taken: &BTreeSet<Vmid>,
    ) -> Result<Record, Error> {
        self.at_revision(record)?;
        let mut taken = taken.clone();
        taken.insert(record.vmid);
        let mut record = record.clone();
        record.vmid = self.lease_vmid(pools, &taken)?;
        self.put(record)
    }

    fn update(&mut self, pools: &Pools, record: &Record) -> Result<Record, Error> {
        let before = self.at_revision(record)?;
        if let (false, true, Some(ip)) =
            (before.phase.ended(), record.phase.ended(), before.lease())
        {
            let until = record.ended_ms.saturating_add(pools.address_quarantine_ms);
            self.resting.insert(ip, until);
        }
        let mut record = record.clone();
        let taken = |ip: &Ipv4Addr| {
            self.living().any(|other| other.id != record.id && other.lease() == Some(*ip))
        };
        let lease = record.lease().filter(|_| !record.phase.ended());
        if let Some(ip) = lease.filter(|ip| before.lease() != Some(*ip)).filter(taken) {
            return Err(Error::AddressTaken { ip });
        }
        if self.mutation == Some(Mutation::Extensions) && record.phase == before.phase {
            record.lifetime = before.lifetime.clone();
        }
        self.put(record)
    }

    fn forget(&mut self, before_ms: u64) -> usize {
        self.cancelled.retain(|_, &mut (_, at_ms)| at_ms >= before_ms);
        self.resting.retain(|_, &mut until_ms| until_ms >= before_ms);
        let before = self.records.len();
        let mut horizon = self.horizon;
        self.records.retain(|_, record| {
            let old = record.phase.ended() && record.ended_ms < before_ms;
            if old {
                horizon = horizon.max(record.revision);
            }
            !old
        });
        self.horizon = horizon;
        before - self.records.len()
    }

    fn lease_vmid(&mut self, pools: &Pools, taken: &BTreeSet<Vmid>) -> Result<Vmid, Error> {
        let range = (pools.vmids.0.get(), pools.vmids.1.get());
        let leased = |live_only: bool| -> BTreeSet<u32> {
            let records = self.records.values().filter(|r| !live_only || !r.phase.ended());
            records.map(|record| record.vmid.get()).chain(taken.iter().map(|v| v.get())).collect()
        };
        for busy in [leased(false), leased(true)] {
            let found = ring::next(range, self.vmid_cursor, |n| Ok::<_, Error>(!busy.contains(&n)));
            if let Some(vmid) = found?.and_then(|number| Vmid::try_from(number).ok()) {
                self.vmid_cursor = Some(vmid.get());
                return Ok(vmid);
            }
        }
        Err(Error::VmidsExhausted { first: pools.vmids.0, last: pools.vmids.1 })
    }

    fn lease_address(
        &mut self,
        pools: &Pools,
        taken: &BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Ipv4Addr, Error> {
        if let (Some(Mutation::Addresses), Some(ip)) =
            (self.mutation, self.living().find_map(|other| other.ip))
        {
            return Ok(ip);
        }
        let range = (u32::from(pools.addresses.0), u32::from(pools.addresses.1));
        let busy = self.busy_addresses(now_ms);
        let free = |number: u32| {
            let address = Ipv4Addr::from(number);
            Ok::<_, Error>(!busy.contains(&address) && !taken.contains(&address))
        };
        let found = ring::next(range, self.address_cursor, free)?;
        let number = found.ok_or(Error::AddressesExhausted)?;
        self.address_cursor = Some(number);
        Ok(number.into())
    }

    fn living(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.records.values().filter(|record| !record.phase.ended())
    }

    fn busy_addresses(&self, now_ms: u64) -> BTreeSet<Ipv4Addr> {
        let live = self.records.values().filter(|record| !record.phase.ended());
        let resting = self.resting.iter().filter(|&(_, &until_ms)| until_ms > now_ms);
        live.filter_map(|record| record.lease()).chain(resting.map(|(&ip, _)| ip)).collect()
    }

    fn at_revision(&self, record: &Record) -> Result<Arc<Record>, Error> {
        match self.records.get(&record.id) {
            Some(found) if found.revision == record.revision => Ok(Arc::clone(found)),
            other => Err(Error::Conflict {
                id: record.id,
                expected: record.revision,
                found: other.map_or(0, |found| found.revision),
            }),
        }
    }

    fn put(&mut self, mut record: Record) -> Result<Record, Error> {
        let rival = self.records.values().find(|other| {
            other.id != record.id
                && !other.phase.ended()
                && !record.phase.ended()
                && (&other.team, &other.request_id) == (&record.team, &record.request_id)
        });
        if let Some(rival) = rival {
            return Err(Error::Storage(format!("{} has this request_id", rival.id)));
        }
        self.revision += 1;
        record.revision = self.revision;
        if self.mutation == Some(Mutation::Tombstones) && record.phase.ended() {
            self.records.remove(&record.id);
        } else {
            self.records.insert(record.id, Arc::new(record.clone()));
        }
        Ok(record)
    }

    fn room(&self, pools: &Pools, now_ms: u64) -> (u32, u32) {
        let vmids = pools.vmids.0..=pools.vmids.1;
        let addresses = pools.addresses.0..=pools.addresses.1;
        let leased = self
            .records
            .values()
            .filter(|record| !record.phase.ended() || self.mutation == Some(Mutation::Room))
            .filter(|record| vmids.contains(&record.vmid))
            .count();
        let busy = self.busy_addresses(now_ms);
        let busy = busy.iter().filter(|&ip| addresses.contains(ip)).count();
        let free = |first: u32, last: u32, used: usize| {
            let used = u32::try_from(used).unwrap_or(u32::MAX);
            (last - first).saturating_add(1).saturating_sub(used)
        };
        (
            free(pools.vmids.0.get(), pools.vmids.1.get(), leased),
            free(pools.addresses.0.into(), pools.addresses.1.into(), busy),
        )
    }
}

#[async_trait::async_trait]
impl Journal for MemoryJournal {
    fn id(&self) -> &str {
        &self.id
    }

    fn vmids(&self) -> (Vmid, Vmid) {
        self.pools.vmids
    }

    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record, Error> {
        self.write_unless(&[Mutation::Intent], |book, pools| book.begin(pools, &intent, now_ms))
            .await
    }

    async fn adopt(&self, record: &Record) -> Result<Record, Error> {
        self.write(|book, _| book.adopt(record)).await
    }

    async fn import(
        &self,
        record: &Record,
        taken_ips: BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record, Error> {
        self.write(|book, pools| book.import(pools, record, &taken_ips, now_ms)).await
    }

    async fn next_vmid(&self, record: &Record, taken: BTreeSet<Vmid>) -> Result<Record, Error> {
        self.write(|book, pools| book.next_vmid(pools, record, &taken)).await
    }

    async fn update(&self, record: &Record) -> Result<Record, Error> {
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

    async fn forget(&self, before_ms: u64) -> Result<usize, Error> {
        self.write(|book, _| Ok(book.forget(before_ms))).await
    }

    async fn get(&self, id: &SandboxId) -> Result<Option<Record>, Error> {
        Ok(self.read(|book| book.records.get(id).map(|record| Record::clone(record))))
    }

    async fn all(&self) -> Result<Vec<Record>, Error> {
        Ok(self.read(|book| book.records.values().map(|record| Record::clone(record)).collect()))
    }

    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>, Error> {
        let mut changed: Vec<Arc<Record>> = self.read(|book| {
            let told = |r: &&Arc<Record>| !r.phase.ended() || book.mutation != Some(Mutation::News);
            let changed = book.records.values().filter(|record| record.revision > revision);
            changed.filter(told).cloned().collect()
        });
        changed.sort_by_key(|record| record.revision);
        changed.truncate(limit);
        Ok(changed.iter().map(|record| Record::clone(record)).collect())
    }

    async fn revision(&self) -> Result<u64, Error> {
        Ok(self.read(|book| book.revision))
    }

    async fn horizon(&self) -> Result<u64, Error> {
        Ok(self.read(|book| book.horizon))
    }

    async fn epoch(&self, epoch: u64) -> Result<u64, Error> {
        self.write(|book, _| {
            let highest = book.epoch.max(epoch);
            if book.mutation != Some(Mutation::Epoch) {
                book.epoch = highest;
            }
            Ok(highest)
        })
        .await
    }

    async fn intake(&self) -> Result<intake::Order, Error> {
        Ok(self.read(|book| book.intake.clone()))
    }

    async fn set_intake(&self, order: &intake::Order) -> Result<(), Error> {
        self.write(|book, _| {
            book.intake.clone_from(order);
            Ok(())
        })
        .await
    }

    async fn node(&self) -> Result<Option<Node>, Error> {
        Ok(self.read(|book| book.node.clone()))
    }

    async fn set_node(&self, node: &Node) -> Result<(), Error> {
        self.write(|book, _| {
            book.node = Some(node.clone());
            Ok(())
        })
        .await
    }

    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<(), Error> {
        self.write(|book, _| {
            let (known, at_ms) = book.cancelled.entry(*id).or_default();
            (*known, *at_ms) = ((*known).max(attempt), now_ms);
            Ok(())
        })
        .await
    }

    async fn cancelled(&self, id: &SandboxId) -> Result<u32, Error> {
        Ok(self.read(|book| book.cancelled.get(id).map_or(0, |&(attempt, _)| attempt)))
    }

    async fn room(&self, now_ms: u64) -> Result<(u32, u32), Error> {
        Ok(self.read(|book| book.room(&self.pools, now_ms)))
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

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
    async fn a_write_that_fails_changes_nothing_and_the_next_may_not_fail() {
        let journal = MemoryJournal::new("j", suite::pools(), Arc::new(SoundDisk));
        journal.fail(Some("no space left on device"));
        let failed = journal.begin(suite::intent(1), 0).await;
        assert!(matches!(failed, Err(Error::Storage(_))), "{failed:?}");
        assert_eq!(journal.all().await.expect("reads go on"), []);
        journal.fail(None);
        journal.begin(suite::intent(1), 0).await.expect("written");
    }

    #[tokio::test]
    async fn a_crash_loses_what_was_not_synced_and_only_that() {
        assert!(!survives(true).await);
        assert!(survives(false).await);
    }
}
