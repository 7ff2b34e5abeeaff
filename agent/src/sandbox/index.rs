//! The records in memory, for whoever only asks: lists, exec, and every HTTP request. Fed by the
//! journal's writes, after they are durable; never the truth.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use proto::{
    Cause,
    id::{SandboxId, SandboxRef, Vmid},
    name::{RequestId, Team},
};

use crate::journal::{Phase, Record};

/// What is kept in memory of a sandbox that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// Who it was.
    pub id: SandboxId,
    /// Its last container.
    pub vmid: Vmid,
    /// Deleted or failed.
    pub phase: Phase,
    /// The controller's try.
    pub attempt: u32,
    /// Owner.
    pub team: Team,
    /// The owner's idempotency key.
    pub request_id: RequestId,
    /// Digest of the request's body.
    pub body_digest: String,
    /// When it ended.
    pub ended_ms: u64,
    /// What it was cloned from.
    pub template: Vmid,
    /// Its creation ended in the middle of the clone.
    pub cloning: bool,
    /// Its container was given back: what is there under the number is left.
    pub released: bool,
    /// Another node took it over: should its container come back here, that one's word counts.
    pub moved: bool,
    revision: u64,
}

impl From<&Record> for Tombstone {
    fn from(record: &Record) -> Self {
        Self {
            id: record.id,
            vmid: record.vmid,
            phase: record.phase,
            attempt: record.attempt,
            team: record.team.clone(),
            request_id: record.request_id.clone(),
            body_digest: record.body_digest.clone(),
            ended_ms: record.ended_ms,
            template: record.template,
            cloning: record.progress.is_cloning(),
            released: record.cause == Cause::Released,
            moved: record.cause == Cause::Moved,
            revision: record.revision,
        }
    }
}

/// What the node knows of a name.
#[derive(Debug, Clone)]
pub enum Known {
    /// It lives.
    Live(Arc<Record>),
    /// It has ended.
    Ended(Tombstone),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Index(RwLock<Maps>);

#[derive(Debug, Default)]
struct Maps {
    live: BTreeMap<SandboxId, Arc<Record>>,
    ended: BTreeMap<SandboxId, Tombstone>,
    /// Who has a vmid; else who had it last.
    vmids: HashMap<Vmid, SandboxId>,
    /// Who was made for a request; else who was last.
    requests: HashMap<(Team, RequestId), SandboxId>,
}

impl Index {
    /// Of all records of the journal.
    pub(super) fn new(mut records: Vec<Record>) -> Self {
        records.sort_by_key(|record| record.revision);
        let mut maps = Maps::default();
        for record in records {
            maps.apply(Arc::new(record));
        }
        Self(RwLock::new(maps))
    }

    /// Takes in a record that the journal has written; an older one than is here changes nothing.
    pub(super) fn apply(&self, record: Record) -> Arc<Record> {
        let record = Arc::new(record);
        self.write().apply(Arc::clone(&record));
        record
    }

    /// Drops tombstones as `Journal::forget` does.
    pub(super) fn forget(&self, before_ms: u64) {
        self.write().forget(before_ms);
    }

    pub(super) fn live(&self, id: &SandboxId) -> Option<Arc<Record>> {
        self.read().live.get(id).cloned()
    }

    pub(super) fn known(&self, name: &SandboxRef) -> Option<Known> {
        let maps = self.read();
        let id = match name {
            SandboxRef::Id(id) => *id,
            SandboxRef::Vmid(vmid) => *maps.vmids.get(vmid)?,
        };
        maps.known(&id)
    }

    pub(super) fn by_request(&self, team: &Team, request: &RequestId) -> Option<Known> {
        let maps = self.read();
        let id = maps.requests.get(&(team.clone(), request.clone()))?;
        maps.known(id)
    }

    /// Those that live, by id.
    pub(super) fn all_live(&self) -> Vec<Arc<Record>> {
        self.read().live.values().cloned().collect()
    }

    /// Ids after this one, living and ended, in order.
    pub(super) fn ids_after(&self, after: Option<SandboxId>, limit: usize) -> Vec<SandboxId> {
        let from = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let maps = self.read();
        let live = maps.live.range(from).map(|(id, _)| *id).take(limit);
        let ended = maps.ended.range(from).map(|(id, _)| *id).take(limit);
        let mut ids: Vec<SandboxId> = live.chain(ended).collect();
        ids.sort_unstable();
        ids.truncate(limit);
        ids
    }

    /// The tombstones, by id.
    pub(super) fn ended(&self) -> Vec<Tombstone> {
        self.read().ended.values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maps {
    fn known(&self, id: &SandboxId) -> Option<Known> {
        let live = self.live.get(id).cloned().map(Known::Live);
        live.or_else(|| self.ended.get(id).cloned().map(Known::Ended))
    }

    fn apply(&mut self, record: Arc<Record>) {
        let (id, vmid) = (record.id, record.vmid);
        let before = self.live.get(&id).map(|before| (before.revision, before.vmid));
        let before =
            before.or_else(|| self.ended.get(&id).map(|before| (before.revision, before.vmid)));
        if let Some((revision, before)) = before {
            if revision >= record.revision {
                return;
            }
            if before != vmid && self.vmids.get(&before) == Some(&id) {
                self.vmids.remove(&before);
            }
        }
        let request = (record.team.clone(), record.request_id.clone());
        // A tombstone does not push aside one that lives.
        let takes = |holder: Option<&SandboxId>| {
            !record.phase.ended()
                || holder.is_none_or(|holder| *holder == id || !self.live.contains_key(holder))
        };
        if takes(self.vmids.get(&vmid)) {
            self.vmids.insert(vmid, id);
        }
        if takes(self.requests.get(&request)) {
            self.requests.insert(request, id);
        }
        if record.phase.ended() {
            self.live.remove(&id);
            self.ended.insert(id, Tombstone::from(&*record));
        } else {
            self.ended.remove(&id);
            self.live.insert(id, record);
        }
    }

    fn forget(&mut self, before_ms: u64) {
        let Self { ended, vmids, requests, .. } = self;
        ended.retain(|id, tombstone| {
            let keep = tombstone.ended_ms >= before_ms;
            if !keep {
                if vmids.get(&tombstone.vmid) == Some(id) {
                    vmids.remove(&tombstone.vmid);
                }
                let request = (tombstone.team.clone(), tombstone.request_id.clone());
                if requests.get(&request) == Some(id) {
                    requests.remove(&request);
                }
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::conformance::{id, record, vmid};

    fn at(number: u8, on: u32, phase: Phase, revision: u64) -> Record {
        Record { vmid: vmid(on), phase, revision, ended_ms: revision, ..record(number) }
    }

    fn who(index: &Index, on: u32) -> Option<(SandboxId, bool)> {
        index.known(&SandboxRef::Vmid(vmid(on))).map(|known| match known {
            Known::Live(record) => (record.id, true),
            Known::Ended(tombstone) => (tombstone.id, false),
        })
    }

    #[test]
    fn a_vmid_names_who_lives_there_else_who_did() {
        let index = Index::new(vec![at(1, 100, Phase::Running, 1)]);
        assert_eq!(who(&index, 100), Some((id(1), true)));
        index.apply(at(1, 100, Phase::Deleted, 2));
        assert_eq!(who(&index, 100), Some((id(1), false)));
        index.apply(at(2, 100, Phase::Creating, 3));
        assert_eq!(who(&index, 100), Some((id(2), true)));
        // A late write on the tombstone does not push the living one aside.
        index.apply(at(1, 100, Phase::Deleted, 4));
        assert_eq!(who(&index, 100), Some((id(2), true)));
        index.apply(at(2, 101, Phase::Creating, 5));
        assert_eq!((who(&index, 100), who(&index, 101)), (None, Some((id(2), true))));
    }

    #[test]
    fn an_older_write_changes_nothing() {
        let index = Index::new(vec![at(1, 100, Phase::Running, 5)]);
        index.apply(at(1, 100, Phase::Creating, 4));
        assert_eq!(index.live(&id(1)).map(|record| record.phase), Some(Phase::Running));
    }

    #[test]
    fn forgetting_leaves_nothing_behind() {
        let index = Index::new(vec![at(1, 100, Phase::Deleted, 5), at(2, 101, Phase::Running, 6)]);
        index.forget(5);
        assert_eq!(index.ended().len(), 1);
        index.forget(6);
        assert_eq!(who(&index, 100), None);
        let maps = index.read();
        assert_eq!((maps.ended.len(), maps.vmids.len(), maps.requests.len()), (0, 1, 1));
    }
}
