//! Records in memory, for reads: lists, exec, and every HTTP request. Updated after each write to
//! the journal is durable; the journal stays the authority.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
};

use daemon::sync::RwLock;
use proto::{
    Cause,
    host::FullName,
    id::{SandboxId, SandboxRef, Vmid},
    name::{RequestId, Team},
};

use crate::journal::{Phase, Record};

/// Part of an ended sandbox's record that is kept in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Vmid of its last container.
    pub vmid: Vmid,
    /// Deleted or failed.
    pub phase: Phase,
    /// Attempt of the controller.
    pub attempt: u32,
    /// Team that owned the sandbox.
    pub team: Team,
    /// Idempotency key of the creation.
    pub request_id: RequestId,
    /// Digest of the request's body.
    pub body_digest: String,
    /// Time of the end, milliseconds since 1970.
    pub ended_ms: u64,
    /// Template that it was cloned from.
    pub template: Vmid,
    /// True when its creation ended in the middle of the clone.
    pub cloning: bool,
    /// True when it was released: the container that has its vmid now is left alone.
    pub released: bool,
    /// True when another node took it over: that node decides, even if the container comes back.
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

/// Live or ended sandbox that a name refers to.
#[derive(Debug, Clone)]
pub enum Known {
    /// Sandbox that has not ended.
    Live(Arc<Record>),
    /// Sandbox that has ended.
    Ended(Tombstone),
}

/// Index of all records; see the module.
#[derive(Debug, Default)]
pub(crate) struct Index(RwLock<Maps>);

#[derive(Debug, Default)]
struct Maps {
    live: BTreeMap<SandboxId, Arc<Record>>,
    ended: BTreeMap<SandboxId, Tombstone>,
    /// Sandbox that has a vmid; if none lives, the last that had it.
    vmids: HashMap<Vmid, SandboxId>,
    /// Sandbox of a request; if none lives, the last one.
    requests: HashMap<(Team, RequestId), SandboxId>,
    /// Live sandboxes by the names that host names have; mostly one each.
    names: HashMap<FullName, Vec<SandboxId>>,
}

impl Index {
    /// Builds the index from all records of the journal.
    pub(super) fn new(mut records: Vec<Record>) -> Self {
        records.sort_by_key(|record| record.revision);
        let mut maps = Maps::default();
        for record in records {
            maps.apply(Arc::new(record));
        }
        Self(RwLock::new(maps))
    }

    /// Stores a record that the journal has written; ignores one that is older than the stored one.
    pub(super) fn apply(&self, record: Record) -> Arc<Record> {
        let record = Arc::new(record);
        self.0.write().apply(Arc::clone(&record));
        record
    }

    /// Drops tombstones as `Journal::forget` does.
    pub(super) fn forget(&self, before_ms: u64) {
        self.0.write().forget(before_ms);
    }

    /// Returns the record of a sandbox that has not ended.
    pub(crate) fn live(&self, id: &SandboxId) -> Option<Arc<Record>> {
        self.0.read().live.get(id).cloned()
    }

    /// Returns the record or the tombstone of this name.
    pub(crate) fn known(&self, name: &SandboxRef) -> Option<Known> {
        let maps = self.0.read();
        let id = match name {
            SandboxRef::Id(id) => *id,
            SandboxRef::Vmid(vmid) => *maps.vmids.get(vmid)?,
        };
        maps.known(&id)
    }

    /// Returns the sandbox that has this name and is not being deleted; `None` when several have it.
    pub(crate) fn named(&self, name: &FullName) -> Option<SandboxId> {
        let maps = self.0.read();
        let stays = |id: &&SandboxId| {
            maps.live.get(id).is_some_and(|record| record.phase != Phase::Deleting)
        };
        let mut ids = maps.names.get(name)?.iter().filter(stays);
        let id = ids.next()?;
        ids.next().is_none().then_some(*id)
    }

    /// Returns the record or the tombstone that was made for a request.
    pub(crate) fn by_request(&self, team: &Team, request: &RequestId) -> Option<Known> {
        let maps = self.0.read();
        let id = maps.requests.get(&(team.clone(), request.clone()))?;
        maps.known(id)
    }

    /// Returns the records of all sandboxes that have not ended, by id.
    pub(crate) fn all_live(&self) -> Vec<Arc<Record>> {
        self.0.read().live.values().cloned().collect()
    }

    /// Returns ids after this one, of living and ended sandboxes, in order.
    pub(crate) fn ids_after(&self, after: Option<SandboxId>, limit: usize) -> Vec<SandboxId> {
        let from = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let maps = self.0.read();
        let live = maps.live.range(from).map(|(id, _)| *id).take(limit);
        let ended = maps.ended.range(from).map(|(id, _)| *id).take(limit);
        let mut ids: Vec<SandboxId> = live.chain(ended).collect();
        ids.sort_unstable();
        ids.truncate(limit);
        ids
    }

    /// Returns all tombstones, by id.
    pub(crate) fn ended(&self) -> Vec<Tombstone> {
        self.0.read().ended.values().cloned().collect()
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
        // A tombstone does not replace a live sandbox.
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
        self.rename(id, full_name(&record).filter(|_| !record.phase.ended()));
        if record.phase.ended() {
            self.live.remove(&id);
            self.ended.insert(id, Tombstone::from(&*record));
        } else {
            self.ended.remove(&id);
            self.live.insert(id, record);
        }
    }

    /// Gives a sandbox another name, or none. Called before its record changes.
    fn rename(&mut self, id: SandboxId, name: Option<FullName>) {
        let before = self.live.get(&id).and_then(|record| full_name(record));
        if before == name {
            return;
        }
        if let Some(before) = before
            && let Some(ids) = self.names.get_mut(&before)
        {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.names.remove(&before);
            }
        }
        if let Some(name) = name {
            self.names.entry(name).or_default().push(id);
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

/// Returns the name of a sandbox as host names have it.
fn full_name(record: &Record) -> Option<FullName> {
    FullName::new(&record.team, record.name.as_ref()?)
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
    fn vmid_resolves_to_the_live_sandbox_else_to_the_last_one() {
        let index = Index::new(vec![at(1, 100, Phase::Running, 1)]);
        assert_eq!(who(&index, 100), Some((id(1), true)));
        index.apply(at(1, 100, Phase::Deleted, 2));
        assert_eq!(who(&index, 100), Some((id(1), false)));
        index.apply(at(2, 100, Phase::Creating, 3));
        assert_eq!(who(&index, 100), Some((id(2), true)));
        // A late write of the tombstone does not replace the live sandbox.
        index.apply(at(1, 100, Phase::Deleted, 4));
        assert_eq!(who(&index, 100), Some((id(2), true)));
        index.apply(at(2, 101, Phase::Creating, 5));
        assert_eq!((who(&index, 100), who(&index, 101)), (None, Some((id(2), true))));
    }

    #[test]
    fn older_revision_does_not_replace_a_newer_one() {
        let index = Index::new(vec![at(1, 100, Phase::Running, 5)]);
        index.apply(at(1, 100, Phase::Creating, 4));
        assert_eq!(index.live(&id(1)).map(|record| record.phase), Some(Phase::Running));
    }

    #[test]
    fn name_leads_to_the_one_live_sandbox_that_has_it() {
        let named = |number: u8, name: &str, phase, revision| Record {
            name: (!name.is_empty()).then(|| name.parse().expect("a name")),
            team: "red".parse().expect("a team"),
            ..at(number, 100 + u32::from(number), phase, revision)
        };
        let index = Index::new(vec![named(1, "box", Phase::Running, 1)]);
        let who = |text: &str| index.named(&text.parse().expect("a name"));
        assert_eq!((who("box--red"), who("box--blue"), who("bo--red")), (Some(id(1)), None, None));
        index.apply(named(1, "shed", Phase::Running, 2));
        assert_eq!((who("box--red"), who("shed--red")), (None, Some(id(1))));
        index.apply(named(2, "shed", Phase::Creating, 3));
        assert_eq!(who("shed--red"), None, "several have it");
        index.apply(named(1, "shed", Phase::Deleting, 4));
        assert_eq!(who("shed--red"), Some(id(2)));
        index.apply(named(1, "shed", Phase::Deleted, 5));
        index.apply(named(2, "", Phase::Running, 6));
        assert!(index.0.read().names.is_empty());
    }

    #[test]
    fn forgotten_tombstones_leave_no_entries_behind() {
        let index = Index::new(vec![at(1, 100, Phase::Deleted, 5), at(2, 101, Phase::Running, 6)]);
        index.forget(5);
        assert_eq!(index.ended().len(), 1);
        index.forget(6);
        assert_eq!(who(&index, 100), None);
        let maps = index.0.read();
        assert_eq!((maps.ended.len(), maps.vmids.len(), maps.requests.len()), (0, 1, 1));
    }
}
