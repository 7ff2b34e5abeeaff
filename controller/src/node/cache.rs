//! Cache of the sandboxes of all nodes and of the creations under way. The journals of the nodes
//! are the truth; their watch streams and the answers to the controller's own calls fill the cache.
//!
//! ```text
//!  create task      -> begin ... placed ... settle        (CREATING until it settles)
//!  watch stream     -> apply                              (dedup by node, attempt, revision)
//!  store writer     <- take                               (with the events that led to the state)
//!  whole inventory  -> begin_inventory ... end_inventory  (absent: lost or moved)
//!  restart          -> recall                             (UNREACHABLE until the node is back)
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{Mutex, MutexGuard, PoisonError},
};

use proto::{
    Cause, Progress,
    id::{SandboxId, SandboxRef},
    name::{NodeName, Team},
    sandbox::v1::{Phase, Sandbox},
};
use tokio::sync::{Notify, watch};

mod moved;

use self::moved::{has_moved, is_gone};
use super::compact::{CompactSandbox, Interner, ended};
use crate::store::Event;

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
    pub later: Option<Box<Sandbox>>,
    /// Time at which the end was seen, milliseconds since 1970; 0 while the sandbox is alive.
    pub ended_ms: u64,
    inventory: u64,
}

impl Entry {
    /// Returns true when the sandbox is deleted or failed and its creation is over.
    pub fn ended(&self) -> bool {
        !self.creating && ended(&self.sandbox)
    }
}

/// Number of watched sandboxes below which unused watch channels are not removed.
const WATCHED_MIN: usize = 64;

/// Outcome of applying a node's report of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The report changed the entry.
    Changed,
    /// The report is of a later attempt than the known one, which is alive on the given node: that
    /// stale attempt must be cancelled there.
    Replaced(NodeName, u32),
    /// The container moved to another node; `left` must drop its record.
    Moved {
        /// Node that the container left.
        left: NodeName,
        /// Node that has the container.
        to: NodeName,
    },
    /// The report contained nothing new.
    Known,
    /// The report is of a stale attempt and is not shown.
    Stray,
    /// The report is of a stale attempt that is still alive: the node must be told to cancel it.
    Void,
    /// An identity in the report is malformed.
    Malformed,
}

/// State of all sandboxes in memory, with indexes.
#[derive(Debug, Default)]
pub struct Cache {
    inner: Mutex<Inner>,
    dirty: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: BTreeMap<SandboxId, Box<CompactSandbox>>,
    teams: Interner<Team>,
    nodes: Interner<NodeName>,
    /// Index by the numbers of the team and of the node.
    by_team: BTreeMap<u32, BTreeSet<SandboxId>>,
    by_node: BTreeMap<u32, BTreeSet<SandboxId>>,
    /// Index by vmid, in the order of the ids; mostly one id each.
    by_vmid: BTreeMap<u32, Box<[SandboxId]>>,
    /// Number of living sandboxes, by team and by node.
    counts: BTreeMap<Team, BTreeMap<NodeName, u32>>,
    /// Number of living sandboxes by node.
    on: BTreeMap<NodeName, u32>,
    /// Nodes that are up.
    up: BTreeSet<NodeName>,
    inventories: BTreeMap<NodeName, u64>,
    /// Sandboxes whose state must be written to the store.
    dirty: BTreeSet<SandboxId>,
    watched: BTreeMap<SandboxId, watch::Sender<u64>>,
    /// Number of watch channels at which unused ones are removed.
    watched_max: usize,
}

impl Cache {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an accepted creation that is on no node yet.
    pub fn begin(&self, id: SandboxId, team: Team, sandbox: Sandbox) {
        let entry = Entry {
            id,
            team,
            node: sandbox.node.parse().ok(),
            sandbox,
            creating: true,
            lost: false,
            later: None,
            ended_ms: 0,
            inventory: 0,
        };
        self.inner().put(entry);
    }

    /// Adds the stored state of a sandbox, until its node reports it.
    pub fn recall(&self, id: SandboxId, team: Team, sandbox: Sandbox, ended_ms: u64) {
        let entry = Entry {
            id,
            team,
            node: sandbox.node.parse().ok(),
            sandbox,
            creating: false,
            lost: false,
            later: None,
            ended_ms,
            inventory: 0,
        };
        self.inner().put(entry);
    }

    /// Records the node of a creation's next attempt, or that it has none yet.
    pub fn placed(
        &self,
        id: &SandboxId,
        node: Option<&NodeName>,
        attempt: u32,
        progress: Progress,
    ) {
        let mut inner = self.inner();
        let Some(mut entry) = inner.get(id).filter(|entry| entry.creating) else { return };
        entry.node = node.cloned();
        entry.later = None;
        // The state that the previous node reported no longer applies.
        entry.sandbox = Sandbox {
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
            ..entry.sandbox
        };
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
        let mut inner = self.inner();
        let mut entry = inner.get(id)?;
        entry.creating = false;
        let later = entry.later.take().filter(|later| later.attempt > sandbox.attempt);
        let newer = entry.sandbox.attempt == sandbox.attempt
            && entry.node.as_ref().is_some_and(|node| node.as_str() == sandbox.node)
            && entry.sandbox.revision > sandbox.revision;
        if newer && has_moved(&entry.sandbox) {
            let left = std::mem::replace(&mut entry.sandbox, sandbox);
            inner.go_on(&mut entry, &left);
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
        later
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
        let mut inner = self.inner();
        let inventory = inner.inventories.get(node).copied().unwrap_or_default();
        let here = inner.nodes.find(node);
        let Some(old) = inner.by_id.get_mut(&id) else {
            if has_moved(&sandbox) {
                // The node that has the sandbox now reports it.
                return Applied::Known;
            }
            let ended_ms = if ended(&sandbox) { now_ms } else { 0 };
            let node = Some(node.clone());
            let entry = Entry {
                id,
                team,
                node,
                sandbox,
                creating: false,
                lost: false,
                later: None,
                ended_ms,
                inventory,
            };
            news(None, &entry);
            inner.dirty.insert(id);
            inner.put(entry);
            drop(inner);
            self.dirty.notify_one();
            return Applied::Changed;
        };
        let on_it = here.is_some() && old.node == here;
        let same = on_it && sandbox.attempt == old.attempt;
        // The sandbox moved: from now on the reports of the other node count.
        if same && has_moved(&sandbox) && !old.creating && !old.ended() {
            let Some(before) = inner.get(&id) else { return Applied::Stray };
            let mut entry = before.clone();
            inner.go_on(&mut entry, &sandbox);
            entry.ended_ms = if entry.ended() { now_ms } else { 0 };
            news(Some(&before), &entry);
            inner.dirty.insert(id);
            inner.put(entry);
            drop(inner);
            self.dirty.notify_one();
            return Applied::Changed;
        }
        // A lost sandbox is reported by another node; its old node no longer has even the
        // tombstone, which is older than what nodes keep.
        let was_lost = old.lost && !on_it && sandbox.attempt == old.attempt;
        let comes_back = !old.creating && !ended(&sandbox) && (old.let_go || was_lost);
        if !same && !comes_back {
            // A different attempt than the known one. During the creation its task decides which
            // one stays; afterwards only a later attempt can be right (our store was behind).
            let later = sandbox.attempt > old.attempt;
            let twin = sandbox.attempt == old.attempt && !old.creating && !old.ended();
            // A MOVED tombstone concerns its own node only.
            let known_there = old.later.as_ref().is_some_and(|there| there.node == node.as_str());
            if twin && (!has_moved(&sandbox) || known_there) {
                let (known_gone, gone) = (is_gone(&old.sandbox(&id)), is_gone(&sandbox));
                let lives = !ended(&sandbox);
                // Without a container the sandbox cannot continue there.
                old.later = (!gone).then(|| Box::new(sandbox));
                let on = old.node.map(|on| inner.nodes.name(on).clone());
                return match on.filter(|_| lives) {
                    Some(on) if gone && !known_gone => {
                        Applied::Moved { left: node.clone(), to: on }
                    }
                    Some(on) if known_gone && !gone => {
                        Applied::Moved { left: on, to: node.clone() }
                    }
                    Some(_) | None => Applied::Stray,
                };
            }
            if later && old.creating && !on_it {
                // Ended attempts count too: a deleted sandbox is not created again.
                let known = old.later.as_ref().map_or(0, |known| known.attempt);
                if sandbox.attempt >= known {
                    old.later = Some(Box::new(sandbox));
                }
                return Applied::Stray;
            }
            if has_moved(&sandbox) {
                return Applied::Stray;
            }
            if !later {
                // An earlier attempt, or the sandbox was deleted where it had moved to.
                let off = sandbox.attempt < old.attempt || old.ended() && is_gone(&sandbox);
                let void = off && !ended(&sandbox);
                return if void { Applied::Void } else { Applied::Stray };
            }
        }
        old.inventory = inventory;
        // A tombstone that the controller wrote is not replaced by the node's own. The tombstone of
        // an earlier attempt does not apply to a later attempt, which may be reported after it.
        let over = same && old.ended() && !comes_back;
        if over || (same && !comes_back && sandbox.revision < old.revision) {
            return Applied::Known;
        }
        // Byte for byte what is known, and so stored already. Most of an inventory after a restart
        // is like this, and each entry would cost a write.
        if on_it && !old.lost && old.was_told(&mut sandbox) {
            old.revision = sandbox.revision;
            return Applied::Known;
        }
        let Some(before) = inner.get(&id) else { return Applied::Stray };
        let mut entry = before.clone();
        entry.ended_ms = if ended(&sandbox) && !entry.creating { now_ms } else { 0 };
        entry.node = Some(node.clone());
        (entry.sandbox, entry.lost) = (sandbox, false);
        // During a creation its task writes the events.
        if !entry.creating {
            news(Some(&before), &entry);
            inner.dirty.insert(id);
        }
        let left = before.node.filter(|left| left != node);
        let lived = !entry.creating && !ended(&before.sandbox);
        let later = entry.sandbox.attempt > before.sandbox.attempt;
        let twin = entry.twin().filter(|there| !ended(there) && is_gone(&entry.sandbox));
        let to = twin.and_then(|there| there.node.parse().ok());
        let applied = match (left.filter(|_| lived && later), to) {
            (Some(left), _) => Applied::Replaced(left, before.sandbox.attempt),
            (None, Some(to)) => Applied::Moved { left: node.clone(), to },
            (None, None) => Applied::Changed,
        };
        inner.put(entry);
        drop(inner);
        self.dirty.notify_one();
        applied
    }

    /// Starts a whole inventory of a node; a new journal resets the known revisions.
    pub fn begin_inventory(&self, node: &NodeName, same_journal: bool) {
        let mut inner = self.inner();
        *inner.inventories.entry(node.clone()).or_default() += 1;
        if !same_journal {
            for id in inner.on_node(node) {
                if let Some(kept) = inner.by_id.get_mut(&id) {
                    kept.revision = 0;
                }
            }
        }
    }

    /// Ends an inventory. Sandboxes that are missing in it and were alive are marked lost and
    /// returned, unless they moved to another node.
    pub fn end_inventory(&self, node: &NodeName) -> Vec<Entry> {
        let mut inner = self.inner();
        let current = inner.inventories.get(node).copied().unwrap_or_default();
        let mut absent = inner.on_node(node);
        absent.retain(|id| {
            let kept = inner.by_id.get(id);
            kept.is_some_and(|kept| {
                kept.inventory != current && !kept.creating && !kept.over && !kept.lost
            })
        });
        let mut absent: Vec<Entry> = absent.iter().filter_map(|id| inner.get(id)).collect();
        absent.retain(|entry| !inner.stays(entry));
        let lost = absent.into_iter().map(|entry| Entry { lost: true, ..entry });
        lost.inspect(|entry| inner.put(entry.clone())).collect()
    }

    /// Marks a node as up or down and notifies the watchers of its sandboxes.
    pub fn set_up(&self, node: &NodeName, up: bool) {
        let mut inner = self.inner();
        let changed = if up { inner.up.insert(node.clone()) } else { inner.up.remove(node) };
        if !changed {
            return;
        }
        let Some(number) = inner.nodes.find(node) else { return };
        let Inner { watched, by_id, .. } = &mut *inner;
        for (id, version) in watched {
            if by_id.get(id).is_some_and(|kept| kept.node == Some(number)) {
                version.send_modify(|version| *version += 1);
            }
        }
    }

    /// Ends all sandboxes of a node that is forgotten. `news` as in `apply`.
    pub fn give_up(&self, node: &NodeName, now_ms: u64, news: impl Fn(&Entry, &Entry)) {
        let mut inner = self.inner();
        for old in inner.living_on(node) {
            if inner.stays(&old) {
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
        self.inner().living_on(node)
    }

    /// Removes ended sandboxes whose retention is over.
    pub fn forget(&self, ids: &[SandboxId]) {
        let mut inner = self.inner();
        for id in ids {
            if inner.by_id.get(id).is_some_and(|kept| kept.ended()) {
                inner.remove(id);
            }
        }
    }

    /// Returns an entry by id or vmid.
    pub fn get(&self, name: &SandboxRef) -> Option<Entry> {
        let inner = self.inner();
        match name {
            SandboxRef::Id(id) => inner.get(id),
            SandboxRef::Vmid(vmid) => {
                let ids = inner.by_vmid.get(&vmid.get())?;
                let lives = |id: &&SandboxId| inner.by_id.get(id).is_some_and(|kept| !kept.ended());
                // A vmid is used again: without a living sandbox the newest one counts.
                inner.get(ids.iter().find(lives).or(ids.last())?)
            }
        }
    }

    /// Returns the sandbox as callers see it.
    pub fn view(&self, entry: &Entry) -> Sandbox {
        let mut sandbox = entry.sandbox.clone();
        let inner = self.inner();
        let up = entry.node.as_ref().is_some_and(|node| inner.up.contains(node));
        show(&mut sandbox, entry.creating, !entry.lost && up);
        sandbox
    }

    /// Returns a page of a team's sandboxes after `after`, ordered by id and as callers see them,
    /// and whether more follow.
    pub fn page(
        &self,
        team: &Team,
        after: Option<SandboxId>,
        limit: usize,
        include_ended: bool,
    ) -> (Vec<Sandbox>, bool) {
        let inner = self.inner();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut page = Vec::new();
        let ids = inner.teams.find(team).and_then(|team| inner.by_team.get(&team));
        let ids = ids.into_iter().flat_map(|ids| ids.range((from, Bound::Unbounded)));
        for (id, kept) in ids.filter_map(|id| inner.by_id.get_key_value(id)) {
            if kept.ended() && !include_ended {
                continue;
            }
            if page.len() == limit {
                return (page, true);
            }
            let mut sandbox = kept.sandbox(id);
            let up = kept.node.is_some_and(|node| inner.up.contains(inner.nodes.name(node)));
            show(&mut sandbox, kept.creating, !kept.lost && up);
            page.push(sandbox);
        }
        (page, false)
    }

    /// Returns all entries, for `fsck`.
    pub fn all(&self) -> Vec<Entry> {
        let inner = self.inner();
        inner.by_id.iter().map(|(id, kept)| inner.entry(*id, kept)).collect()
    }

    /// Passes `with` the number of living sandboxes of a team by node. The lock is held for one
    /// decision about many nodes, so that all counts are of the same moment and the team is looked
    /// up once.
    pub fn of_team<T>(&self, team: &Team, with: impl FnOnce(&dyn Fn(&NodeName) -> u32) -> T) -> T {
        let inner = self.inner();
        let counts = inner.counts.get(team);
        with(&|node| counts.and_then(|nodes| nodes.get(node)).copied().unwrap_or_default())
    }

    /// Returns the number of living sandboxes on a node.
    pub fn on(&self, node: &NodeName) -> u32 {
        self.inner().on.get(node).copied().unwrap_or_default()
    }

    /// Returns a counter that increases at every change of one sandbox.
    pub fn watch(&self, id: SandboxId) -> watch::Receiver<u64> {
        let mut inner = self.inner();
        // Channels without receivers are removed when they may be half of all.
        if inner.watched.len() >= inner.watched_max {
            inner.watched.retain(|_, version| version.receiver_count() > 0);
            inner.watched_max = WATCHED_MIN.max(2 * inner.watched.len());
        }
        inner.watched.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Waits until a state must be written to the store.
    pub async fn dirty(&self) {
        while self.inner().dirty.is_empty() {
            self.dirty.notified().await;
        }
    }

    /// Takes entries to be stored: all that `events` are about, and at most `limit` more. Both are
    /// of one moment, so that no state is stored without its events, and no event without its
    /// state.
    pub fn take(
        &self,
        limit: usize,
        events: impl FnOnce() -> Vec<Event>,
    ) -> (Vec<Entry>, Vec<Event>) {
        let mut inner = self.inner();
        let events = events();
        let told: BTreeSet<_> = events.iter().filter_map(|event| event.sandbox).collect();
        let mut ids: BTreeSet<_> = told.intersection(&inner.dirty).copied().collect();
        ids.extend(inner.dirty.iter().take(limit));
        for id in &ids {
            inner.dirty.remove(id);
        }
        let entries = ids.iter().filter_map(|id| inner.get(id)).collect();
        (entries, events)
    }

    /// Marks entries as unsaved again after a failed write.
    pub fn mark_dirty(&self, ids: impl IntoIterator<Item = SandboxId>) {
        self.inner().dirty.extend(ids);
        self.dirty.notify_one();
    }
}

/// Changes a sandbox to what callers see.
fn show(sandbox: &mut Sandbox, creating: bool, reachable: bool) {
    if creating {
        sandbox.set_phase(Phase::Creating);
        // The failure of one attempt stays internal until the creation gives up.
        sandbox.failure = None;
    } else if !ended(sandbox) && !reachable {
        sandbox.set_phase(Phase::Unreachable);
    }
}

impl Inner {
    fn get(&self, id: &SandboxId) -> Option<Entry> {
        self.by_id.get(id).map(|kept| self.entry(*id, kept))
    }

    fn entry(&self, id: SandboxId, kept: &CompactSandbox) -> Entry {
        Entry {
            id,
            team: self.teams.name(kept.team).clone(),
            node: kept.node.map(|node| self.nodes.name(node).clone()),
            sandbox: kept.sandbox(&id),
            creating: kept.creating,
            lost: kept.lost,
            later: kept.later.clone(),
            ended_ms: kept.ended_ms,
            inventory: kept.inventory,
        }
    }

    fn on_node(&self, node: &NodeName) -> Vec<SandboxId> {
        let ids = self.nodes.find(node).and_then(|node| self.by_node.get(&node));
        ids.into_iter().flatten().copied().collect()
    }

    fn living_on(&self, node: &NodeName) -> Vec<Entry> {
        let on = self.on_node(node);
        on.iter().filter_map(|id| self.get(id)).filter(|entry| !entry.ended()).collect()
    }

    fn count(&mut self, kept: &CompactSandbox, add: bool) {
        let Some(node) = kept.node.filter(|_| !kept.ended()) else { return };
        let (node, team) = (self.nodes.name(node), self.teams.name(kept.team));
        let change = |count: &mut u32| *count = if add { *count + 1 } else { *count - 1 };
        change(self.on.entry(node.clone()).or_default());
        let nodes = self.counts.entry(team.clone()).or_default();
        let count = nodes.entry(node.clone()).or_default();
        change(count);
        if *count == 0 {
            nodes.remove(node);
        }
        if nodes.is_empty() {
            self.counts.remove(team);
        }
    }

    fn remove(&mut self, id: &SandboxId) {
        let Some(old) = self.by_id.remove(id) else { return };
        self.count(&old, false);
        for (index, number) in [(&mut self.by_team, Some(old.team)), (&mut self.by_node, old.node)]
        {
            if let Some(ids) = number.and_then(|number| index.get_mut(&number)) {
                ids.remove(id);
            }
        }
        if let Some(ids) = self.by_vmid.remove(&old.vmid) {
            let rest: Box<[_]> = ids.iter().filter(|other| *other != id).copied().collect();
            if !rest.is_empty() {
                self.by_vmid.insert(old.vmid, rest);
            }
        }
    }

    fn put(&mut self, mut entry: Entry) {
        let id = entry.id;
        let (team, node) = (self.teams.give(&entry.team), entry.node.as_ref());
        let node = node.map(|node| self.nodes.give(node));
        let mut kept = CompactSandbox::new(team, node, &mut entry.sandbox);
        (kept.creating, kept.lost) = (entry.creating, entry.lost);
        (kept.ended_ms, kept.inventory) = (entry.ended_ms, entry.inventory);
        kept.later = entry.later;
        self.remove(&id);
        self.count(&kept, true);
        // vmid 0: not on a node yet.
        if kept.vmid != 0 {
            let before = self.by_vmid.remove(&kept.vmid).unwrap_or_default();
            let mut ids = [before.into_vec(), vec![id]].concat();
            ids.sort_unstable();
            self.by_vmid.insert(kept.vmid, ids.into());
        }
        self.by_team.entry(kept.team).or_default().insert(id);
        if let Some(node) = kept.node {
            self.by_node.entry(node).or_default().insert(id);
        }
        self.by_id.insert(id, Box::new(kept));
        if let Some(version) = self.watched.get(&id) {
            version.send_modify(|version| *version += 1);
        }
    }
}

#[cfg(test)]
mod tests;
