//! Cache of the sandboxes of all nodes and of the creations under way. The journals of the nodes
//! are the truth; their watch streams and the answers to the controller's own calls fill the cache.
//!
//! ```text
//!  create task      -> begin ... placed ... settle        (CREATING until it settles)
//!  watch stream     -> apply                              (dedup by node, attempt, revision)
//!  store writer     <- take_dirty                         (with the events that led to the state)
//!  whole inventory  -> begin_inventory ... end_inventory  (absent: lost or moved)
//!  restart          -> restore                            (UNREACHABLE until the node is back)
//! ```

pub mod commands;
mod compact;
mod index;
mod merge;
mod moved;
mod names;
mod usage;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Bound,
};

use daemon::sync::Mutex;
use proto::{
    Cause, Progress,
    id::{SandboxId, SandboxRef},
    name::{NodeName, SandboxName, Team},
    sandbox::v1::{Phase, Sandbox},
    spec::Size,
};
use tokio::sync::{
    Notify,
    broadcast::{self, error::RecvError},
    watch,
};

use self::{
    compact::{encode, ended, has_moved, mask},
    index::Index,
    merge::{Merge, Report, merge},
};
use crate::store::Event;

pub use self::{index::TeamCount, merge::Applied, usage::Usage};

/// One sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Owner.
    pub team: Team,
    /// Node that has the sandbox; `None` while it is being placed.
    pub node: Option<NodeName>,
    /// Last known state.
    pub sandbox: Sandbox,
    /// Whether the creation is still under way: callers see CREATING, whatever the node reports.
    pub creating: bool,
    /// Whether a whole inventory of its node lacked it although it was alive; never shown as
    /// deleted.
    pub lost: bool,
    /// Record of another node. During a creation: a later attempt, because the store is an old
    /// copy. Afterwards: the same attempt on the node that imported the sandbox.
    pub elsewhere: Option<Box<Sandbox>>,
    /// Time at which the end was seen, milliseconds since 1970; 0 while the sandbox is alive.
    pub ended_ms: u64,
    inventory: u64,
}

impl Entry {
    fn new(id: SandboxId, team: Team, sandbox: Sandbox) -> Self {
        Self {
            id,
            team,
            node: sandbox.node.parse().ok(),
            sandbox,
            creating: false,
            lost: false,
            elsewhere: None,
            ended_ms: 0,
            inventory: 0,
        }
    }

    /// Changes it to an attempt that begins on a node, or on none yet.
    fn placed(self, node: Option<&NodeName>, attempt: u32, progress: Progress) -> Self {
        // The state that the previous node reported no longer applies.
        let sandbox = Sandbox {
            node: node.map(ToString::to_string).unwrap_or_default(),
            attempt,
            progress: progress.into(),
            phase: Phase::Creating.into(),
            vmid: 0,
            ip: String::new(),
            services: Vec::new(),
            started_at: None,
            boot: 0,
            revision: 0,
            failure: None,
            ..self.sandbox
        };
        Self { node: node.cloned(), sandbox, ..self }
    }

    /// Returns true when the sandbox is deleted or failed and its creation is over.
    pub fn ended(&self) -> bool {
        !self.creating && ended(&self.sandbox)
    }
}

/// Sandboxes that are looked at in one step of a page.
const SCAN: usize = 1000;

/// Part of a team's sandboxes, ordered by id.
pub struct Page<'a> {
    /// Id of the last sandbox of the previous page.
    pub after: Option<SandboxId>,
    /// Most sandboxes.
    pub limit: usize,
    /// Whether deleted and failed sandboxes count.
    pub include_ended: bool,
    /// Whether the newest one comes first.
    pub newest_first: bool,
    /// Sandboxes that count.
    pub filter: &'a (dyn Fn(&Sandbox) -> bool + Sync),
}

impl fmt::Debug for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").field("after", &self.after).finish_non_exhaustive()
    }
}

impl Page<'static> {
    /// All living sandboxes.
    pub const ALL: Self = Self {
        after: None,
        limit: usize::MAX,
        include_ended: false,
        newest_first: false,
        filter: &|_| true,
    };
}

/// Changes of one team's sandboxes.
#[derive(Debug)]
pub struct TeamChanges {
    team: u32,
    changes: broadcast::Receiver<(u32, SandboxId)>,
}

impl TeamChanges {
    /// Waits for a sandbox of the team to change; `None` when too many have changed meanwhile to
    /// name them.
    pub async fn next(&mut self) -> Option<SandboxId> {
        loop {
            match self.changes.recv().await {
                Ok((team, id)) if team == self.team => return Some(id),
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => return None,
                // The cache lives as long as its readers.
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

/// Number of watched sandboxes below which unused watch channels are not removed.
const WATCHED_MIN: usize = 64;

/// State of all sandboxes in memory, with indexes.
#[derive(Debug, Default)]
pub struct Cache {
    inner: Mutex<Index>,
    dirty: Notify,
}

impl Cache {
    /// Adds an accepted creation that is on no node yet.
    pub fn begin(&self, id: SandboxId, team: Team, sandbox: Sandbox) {
        self.inner.lock().put(Entry { creating: true, ..Entry::new(id, team, sandbox) });
    }

    /// Adds the stored state of a sandbox, until its node reports it.
    pub fn restore(&self, id: SandboxId, team: Team, sandbox: Sandbox, ended_ms: u64) {
        self.inner.lock().put(Entry { ended_ms, ..Entry::new(id, team, sandbox) });
    }

    /// Records the node of a creation's next attempt, or that it has none yet.
    pub fn placed(
        &self,
        id: &SandboxId,
        node: Option<&NodeName>,
        attempt: u32,
        progress: Progress,
    ) {
        let mut inner = self.inner.lock();
        let Some(entry) = inner.get(id).filter(|entry| entry.creating) else { return };
        let placed = entry.placed(node, attempt, progress);
        inner.put(Entry { elsewhere: None, ..placed });
    }

    /// Records that a creation goes back to the node of an attempt that it had abandoned. A later attempt that
    /// another node has reported meanwhile stays known.
    pub fn placed_again(&self, id: &SandboxId, node: &NodeName, attempt: u32) {
        let mut inner = self.inner.lock();
        let away = |entry: &Entry| entry.creating && entry.node.as_ref() != Some(node);
        let Some(entry) = inner.get(id).filter(away) else { return };
        inner.put(entry.placed(Some(node), attempt, Progress::Placing));
    }

    /// Shows what a creation does on its node.
    pub fn progressed(&self, id: &SandboxId, progress: Progress) {
        let mut inner = self.inner.lock();
        let shows = |entry: &Entry| entry.sandbox.progress() == progress;
        let entry = inner.get(id).filter(|entry| entry.creating && !shows(entry));
        let Some(mut entry) = entry else { return };
        entry.sandbox.progress = progress.into();
        inner.put(entry);
    }

    /// Ends a creation with `sandbox` as its result. A newer state that its node has reported
    /// meanwhile is kept and passed to `since` together with `sandbox`. Returns a later attempt on
    /// another node that was reported while the creation's task decided: our store was behind.
    pub fn settle(
        &self,
        id: &SandboxId,
        sandbox: Sandbox,
        now_ms: u64,
        since: impl FnOnce(&Entry, &Sandbox),
    ) -> Option<Box<Sandbox>> {
        let mut inner = self.inner.lock();
        let mut entry = inner.get(id)?;
        entry.creating = false;
        let elsewhere =
            entry.elsewhere.take().filter(|elsewhere| elsewhere.attempt > sandbox.attempt);
        let newer = entry.sandbox.attempt == sandbox.attempt
            && entry.node.as_ref().is_some_and(|node| node.as_str() == sandbox.node)
            && entry.sandbox.revision > sandbox.revision;
        if newer && has_moved(&entry.sandbox) {
            let left = std::mem::replace(&mut entry.sandbox, sandbox);
            inner.follow(&mut entry, &left);
            inner.dirty.insert(*id);
        } else if !newer || ended(&sandbox) {
            entry.node = sandbox.node.parse().ok();
            entry.sandbox = sandbox;
        } else {
            since(&entry, &sandbox);
            inner.dirty.insert(*id);
        }
        if ended(&entry.sandbox) {
            entry.ended_ms = now_ms;
            inner.dirty.insert(*id);
        }
        inner.put(entry);
        drop(inner);
        self.dirty.notify_one();
        elsewhere
    }

    /// Applies a node's report of a sandbox. Calls `news` with the old and the new entry when the
    /// report is news, in the order of application and before the state can be taken for the store.
    pub fn apply(
        &self,
        node: &NodeName,
        mut sandbox: Sandbox,
        now_ms: u64,
        news: impl FnOnce(Option<&Entry>, &Entry),
    ) -> Applied {
        let (Ok(id), Ok(team)) = (sandbox.id.parse(), sandbox.team.parse()) else {
            return Applied::Malformed;
        };
        let message = encode(&mut sandbox);
        let mut inner = self.inner.lock();
        let inventory = inner.inventories.get(node).copied().unwrap_or_default();
        let report = Report { node, sandbox: &sandbox, message: &message };
        let merge = merge(inner.known(&id).as_ref(), &report);
        let known = inner.by_id.get_mut(&id);
        let (follow, applied) = match (merge, known) {
            (Merge::Follow, _) => (true, Applied::Changed),
            (Merge::Replace(applied), _) => (false, applied),
            (Merge::Confirm(revision), Some(known)) => {
                (known.inventory, known.revision) = (inventory, revision);
                return Applied::Known;
            }
            (Merge::Elsewhere { drop, applied }, Some(known)) => {
                known.elsewhere = (!drop).then(|| Box::new(sandbox));
                return applied;
            }
            (Merge::Keep(applied) | Merge::Elsewhere { applied, .. }, _) => return applied,
            (Merge::Confirm(_), None) => return Applied::Known,
        };
        let before = inner.get(&id);
        let mut entry = before.clone().unwrap_or_else(|| Entry::new(id, team, sandbox.clone()));
        if follow {
            inner.follow(&mut entry, &sandbox);
        } else {
            (entry.node, entry.sandbox) = (Some(node.clone()), sandbox);
            (entry.lost, entry.inventory) = (false, inventory);
        }
        entry.ended_ms = if entry.ended() { now_ms } else { 0 };
        // During a creation its task writes the events.
        if !entry.creating {
            news(before.as_ref(), &entry);
            inner.dirty.insert(id);
        }
        inner.put(entry);
        drop(inner);
        self.dirty.notify_one();
        applied
    }

    /// Starts a whole inventory of a node; a new journal resets the known revisions.
    pub fn begin_inventory(&self, node: &NodeName, same_journal: bool) {
        let mut inner = self.inner.lock();
        *inner.inventories.entry(node.clone()).or_default() += 1;
        if !same_journal {
            for id in inner.on_node(node) {
                if let Some(known) = inner.by_id.get_mut(&id) {
                    known.revision = 0;
                }
            }
        }
    }

    /// Ends an inventory. Sandboxes that are missing in it and were alive are marked lost and
    /// returned, unless they moved to another node.
    pub fn end_inventory(&self, node: &NodeName) -> Vec<Entry> {
        let mut inner = self.inner.lock();
        let current = inner.inventories.get(node).copied().unwrap_or_default();
        let mut absent = inner.on_node(node);
        absent.retain(|id| {
            let known = inner.by_id.get(id);
            known.is_some_and(|known| {
                known.inventory != current && !known.creating && !known.over && !known.lost
            })
        });
        let mut absent: Vec<Entry> = absent.iter().filter_map(|id| inner.get(id)).collect();
        absent.retain(|entry| !inner.continue_elsewhere(entry));
        let lost = absent.into_iter().map(|entry| Entry { lost: true, ..entry });
        lost.inspect(|entry| inner.put(entry.clone())).collect()
    }

    /// Marks a node as up or down and notifies the watchers of its sandboxes.
    pub fn set_up(&self, node: &NodeName, up: bool) {
        let mut inner = self.inner.lock();
        let changed = if up { inner.up.insert(node.clone()) } else { inner.up.remove(node) };
        if !changed {
            return;
        }
        let Some(number) = inner.nodes.find(node) else { return };
        for (id, known) in inner.by_id.iter().filter(|(_, known)| known.node == Some(number)) {
            inner.changes.tell(known.team, *id);
            if let Some(version) = inner.watched.get(id) {
                version.send_modify(|version| *version += 1);
            }
        }
    }

    /// Ends all sandboxes of a node that is forgotten. Skips creations under way: the task of each continues it on
    /// another node, or ends it. `news` as in `apply`.
    pub fn end_on(&self, node: &NodeName, now_ms: u64, news: impl Fn(&Entry, &Entry)) {
        let mut inner = self.inner.lock();
        for old in inner.living_on(node) {
            if old.creating || inner.continue_elsewhere(&old) {
                continue;
            }
            let mut entry = old.clone();
            entry.sandbox.set_phase(Phase::Deleted);
            entry.sandbox.set_cause(Cause::NodeLost);
            (entry.ended_ms, entry.lost) = (now_ms, false);
            news(&old, &entry);
            inner.dirty.insert(entry.id);
            inner.put(entry);
        }
        drop(inner);
        self.dirty.notify_one();
    }

    /// Returns the sandboxes of a node that are alive or being created.
    pub fn living_on(&self, node: &NodeName) -> Vec<Entry> {
        self.inner.lock().living_on(node)
    }

    /// Removes ended sandboxes whose retention is over.
    pub fn forget(&self, ids: &[SandboxId]) {
        let mut inner = self.inner.lock();
        for id in ids {
            if inner.by_id.get(id).is_some_and(|known| known.ended()) {
                inner.remove(id);
            }
        }
    }

    /// Returns an entry by id or vmid.
    pub fn get(&self, name: &SandboxRef) -> Option<Entry> {
        let inner = self.inner.lock();
        match name {
            SandboxRef::Id(id) => inner.get(id),
            SandboxRef::Vmid(vmid) => {
                let ids = inner.by_vmid.get(&vmid.get())?;
                let lives =
                    |id: &&SandboxId| inner.by_id.get(id).is_some_and(|known| !known.ended());
                // A vmid is used again: without a living sandbox the newest one counts.
                inner.get(ids.iter().find(lives).or(ids.last())?)
            }
        }
    }

    /// Returns an entry of a team by id or vmid. What another team has is looked up as what nobody has:
    /// it is not decoded, so the time tells nothing either. Of a vmid that is used again, the team
    /// gets its own last sandbox that had it.
    pub fn get_of(&self, team: &Team, name: &SandboxRef) -> Option<Entry> {
        let inner = self.inner.lock();
        let team = inner.teams.find(team);
        let own = |id: &&SandboxId| inner.by_id.get(id).filter(|known| Some(known.team) == team);
        let id = match name {
            SandboxRef::Id(id) => Some(id).filter(|id| own(id).is_some()),
            SandboxRef::Vmid(vmid) => {
                let ids = inner.by_vmid.get(&vmid.get()).map(|ids| &**ids).unwrap_or_default();
                let lives = |id: &&SandboxId| own(id).is_some_and(|known| !known.ended());
                ids.iter().find(lives).or_else(|| ids.iter().rfind(|id| own(id).is_some()))
            }
        };
        inner.get(id?)
    }

    /// Returns the living sandboxes of a team with this name, ordered by id: one at most, unless the
    /// store was lost.
    pub fn named(&self, team: &Team, name: &SandboxName) -> Vec<SandboxId> {
        let inner = self.inner.lock();
        let team = inner.teams.find(team);
        let ids = team.and_then(|team| inner.by_name.get(&(team, name.as_str().into())));
        let mut ids = ids.cloned().unwrap_or_default();
        ids.sort_unstable();
        ids
    }

    /// Returns the sandbox as callers see it.
    pub fn view(&self, entry: &Entry) -> Sandbox {
        let mut sandbox = entry.sandbox.clone();
        let inner = self.inner.lock();
        let up = entry.node.as_ref().is_some_and(|node| inner.up.contains(node));
        mask(&mut sandbox, entry.creating, !entry.lost && up);
        sandbox
    }

    /// Returns a page of a team's sandboxes, as callers see them, and whether more follow.
    pub fn page(&self, team: &Team, page: &Page<'_>) -> (Vec<Sandbox>, bool) {
        let mut after = page.after;
        let mut sandboxes = Vec::new();
        // In steps, so that the lock is not held for a whole scan.
        loop {
            let inner = self.inner.lock();
            let ids = inner.teams.find(team).and_then(|team| inner.by_team.get(&team));
            let (from, to) = match (page.newest_first, after) {
                (_, None) => (Bound::Unbounded, Bound::Unbounded),
                (false, Some(after)) => (Bound::Excluded(after), Bound::Unbounded),
                (true, Some(after)) => (Bound::Unbounded, Bound::Excluded(after)),
            };
            let mut ids = ids.into_iter().flat_map(|ids| ids.range((from, to)));
            for _ in 0..SCAN {
                let next = if page.newest_first { ids.next_back() } else { ids.next() };
                let Some(id) = next else { return (sandboxes, false) };
                let found = inner.by_id.get(id).and_then(|known| {
                    inner.shown(id, known, page.include_ended).filter(|shown| (page.filter)(shown))
                });
                if let Some(found) = found {
                    if sandboxes.len() == page.limit {
                        return (sandboxes, true);
                    }
                    sandboxes.push(found);
                }
                after = Some(*id);
            }
        }
    }

    /// Returns the changes of a team's sandboxes from now on.
    pub fn changes(&self, team: &Team) -> TeamChanges {
        let mut inner = self.inner.lock();
        TeamChanges { team: inner.teams.intern(team), changes: inner.changes.subscribe() }
    }

    /// Returns all entries, for `fsck`.
    pub fn all(&self) -> Vec<Entry> {
        let inner = self.inner.lock();
        inner.by_id.iter().map(|(id, known)| inner.entry(*id, known)).collect()
    }

    /// Passes `with` the number of sandboxes of a team by node. The lock is held for one
    /// decision about many nodes, so that all counts are of the same moment and the team is looked
    /// up once.
    pub fn with_team_counts<T>(
        &self,
        team: &Team,
        with: impl FnOnce(&dyn Fn(&NodeName) -> TeamCount) -> T,
    ) -> T {
        let inner = self.inner.lock();
        let counts = inner.counts.get(team);
        with(&|node| counts.and_then(|nodes| nodes.get(node)).copied().unwrap_or_default())
    }

    /// Returns the teams that have living sandboxes, in no order.
    pub fn teams(&self) -> Vec<Team> {
        let inner = self.inner.lock();
        inner.usage.keys().map(|team| inner.teams.name(*team).clone()).collect()
    }

    /// Returns what the living sandboxes of a team have, together with what they are about to have:
    /// `soon` names sandboxes, also new ones, and their sizes then.
    pub fn usage(&self, team: &Team, soon: impl Iterator<Item = (SandboxId, Size)>) -> Usage {
        let inner = self.inner.lock();
        let team = inner.teams.find(team);
        let now = team.map(|team| inner.usage_of(team)).unwrap_or_default();
        soon.fold(now, |sum, (id, size)| match inner.by_id.get(&id) {
            None => sum.plus(Usage::of(size)),
            Some(known) if known.ended() => sum,
            Some(known) => sum.plus(Usage::growth(inner.counted(known), size)),
        })
    }

    /// Returns the size of a sandbox that counts for its team: with the disk of its snapshot, if it asked for none.
    pub fn counted_size(&self, id: &SandboxId) -> Option<Size> {
        let inner = self.inner.lock();
        inner.by_id.get(id).map(|known| inner.counted(known))
    }

    /// Returns the size of the root disk of a snapshot, GiB; 0 where no node has told it.
    pub fn snapshot_disk_gib(&self, snapshot: &str) -> u32 {
        let inner = self.inner.lock();
        let at = inner.snapshots.find(&snapshot.to_owned());
        let disk = at.and_then(|at| inner.snapshot_disks.get(&at));
        disk.copied().unwrap_or_default()
    }

    /// Records the sizes of the root disks of snapshots, GiB. They stay known while no node tells them: 0, which is
    /// what older agents report, changes nothing.
    pub fn note_snapshot_disks(&self, disks: impl Iterator<Item = (String, u32)>) {
        let mut inner = self.inner.lock();
        for (snapshot, disk_gib) in disks.filter(|(_, disk_gib)| *disk_gib > 0) {
            let snapshot = inner.snapshots.intern(&snapshot);
            inner.snapshot_disks.insert(snapshot, disk_gib);
        }
    }

    /// Counts the use of all teams again; returns the teams whose counters differ, with both.
    pub fn miscounted(&self) -> Vec<(Team, Usage, Usage)> {
        let inner = self.inner.lock();
        let mut recount: BTreeMap<u32, Usage> = BTreeMap::new();
        for (id, known) in inner.by_id.iter().filter(|(_, known)| !known.ended()) {
            let sandbox = known.sandbox(id);
            let asked = Size::from(sandbox.size.unwrap_or_default());
            let snapshot = inner.snapshots.find(&sandbox.snapshot_id);
            let disk = snapshot.and_then(|snapshot| inner.snapshot_disks.get(&snapshot));
            let disk_gib = disk.copied().unwrap_or_default();
            let size = asked.or(Size { cpu_cores: 0, memory_mib: 0, disk_gib });
            let sum = recount.entry(known.team).or_default();
            *sum = sum.plus(Usage::of(size));
        }
        let teams: BTreeSet<_> = recount.keys().chain(inner.usage.keys()).copied().collect();
        let again = |team| recount.get(&team).copied().unwrap_or_default();
        let both = teams.into_iter().map(|team| (team, inner.usage_of(team), again(team)));
        let wrong = both.filter(|(_, counted, recounted)| counted != recounted);
        wrong
            .map(|(team, counted, again)| (inner.teams.name(team).clone(), counted, again))
            .collect()
    }

    /// Returns the team of a sandbox that has not ended.
    pub fn team_of_living(&self, id: &SandboxId) -> Option<Team> {
        let inner = self.inner.lock();
        let known = inner.by_id.get(id).filter(|known| !known.ended())?;
        Some(inner.teams.name(known.team).clone())
    }

    /// Returns the number of living sandboxes on a node.
    pub fn count_on(&self, node: &NodeName) -> u32 {
        self.inner.lock().on.get(node).copied().unwrap_or_default()
    }

    /// Returns a counter that increases at every change of one sandbox.
    pub fn watch(&self, id: SandboxId) -> watch::Receiver<u64> {
        let mut inner = self.inner.lock();
        // Channels without receivers are removed when they may be half of all.
        if inner.watched.len() >= inner.watched_max {
            inner.watched.retain(|_, version| version.receiver_count() > 0);
            inner.watched_max = WATCHED_MIN.max(2 * inner.watched.len());
        }
        inner.watched.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Waits until a state must be written to the store.
    pub async fn dirty(&self) {
        while self.inner.lock().dirty.is_empty() {
            self.dirty.notified().await;
        }
    }

    /// Takes entries to be stored: all that `events` are about, and at most `limit` more. Both are
    /// of one moment, so that no state is stored without its events, and no event without its
    /// state.
    pub fn take_dirty(
        &self,
        limit: usize,
        events: impl FnOnce() -> Vec<Event>,
    ) -> (Vec<Entry>, Vec<Event>) {
        let mut inner = self.inner.lock();
        let events = events();
        let sandboxes: BTreeSet<_> = events.iter().filter_map(|event| event.sandbox).collect();
        let mut ids: BTreeSet<_> = sandboxes.intersection(&inner.dirty).copied().collect();
        ids.extend(inner.dirty.iter().take(limit));
        for id in &ids {
            inner.dirty.remove(id);
        }
        let entries = ids.iter().filter_map(|id| inner.get(id)).collect();
        (entries, events)
    }

    /// Marks entries as unsaved again after a failed write.
    pub fn mark_dirty(&self, ids: impl IntoIterator<Item = SandboxId>) {
        self.inner.lock().dirty.extend(ids);
        self.dirty.notify_one();
    }
}

#[cfg(test)]
mod tests;
