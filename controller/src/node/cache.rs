//! What the nodes last said of their sandboxes, and what this controller is about to create. It is
//! a cache: the journals of the nodes are the truth, and it is fed by their watch streams and by
//! the answers to our own calls.
//!
//! ```text
//!  create task      -> begin ... placed ... settle        (CREATING until it settles)
//!  watch stream     -> apply                              (dedup by node, attempt, revision)
//!  to be remembered <- take                               (with the events that led to it)
//!  whole inventory  -> begin_inventory ... end_inventory  (absent: forgotten or lost)
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
use super::kept::{Kept, Numbers, ended};
use crate::store::Event;

/// One sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Identity.
    pub id: SandboxId,
    /// Owner.
    pub team: Team,
    /// Where it is; `None` while it is being placed.
    pub node: Option<NodeName>,
    /// What was last said of it.
    pub sandbox: Sandbox,
    /// Its creation is not settled: whatever its node says, it is CREATING to the outside.
    pub creating: bool,
    /// Its node has given a whole inventory without it, although it lived. Kept, never called gone.
    pub lost: bool,
    /// While it is being created: a later attempt than ours that another node has or had, because our
    /// store is an old copy. Later on: the same attempt as another node has it, which took it over.
    pub later: Option<Box<Sandbox>>,
    /// When it was seen to end; 0 while it lives.
    pub ended_ms: u64,
    inventory: u64,
}

impl Entry {
    /// A sandbox that is gone.
    pub fn ended(&self) -> bool {
        !self.creating && ended(&self.sandbox)
    }
}

/// So many that are watched are no reason to look for those that are not any more.
const WATCHED_MIN: usize = 64;

/// What became of a message of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// It was news.
    Changed,
    /// It was news of a later attempt than the one that was known to live on this node, which has not
    /// heard that its own is off.
    Replaced(NodeName, u32),
    /// A node has not its container any more, and another has taken it over: it is to leave it.
    Moved {
        /// The one.
        left: NodeName,
        /// The other.
        to: NodeName,
    },
    /// It was known.
    Known,
    /// It is of an attempt that was given up: it is not shown.
    Stray,
    /// The same, and it lives: its node has not heard that it is off.
    Void,
    /// It names nobody: an identity in it is malformed.
    Malformed,
}

/// The cache.
#[derive(Debug, Default)]
pub struct Cache {
    inner: Mutex<Inner>,
    dirty: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    by_id: BTreeMap<SandboxId, Box<Kept>>,
    teams: Numbers<Team>,
    nodes: Numbers<NodeName>,
    /// By the numbers of the owner and of the node.
    by_team: BTreeMap<u32, BTreeSet<SandboxId>>,
    by_node: BTreeMap<u32, BTreeSet<SandboxId>>,
    /// In the order of their ids; mostly one.
    by_vmid: BTreeMap<u32, Box<[SandboxId]>>,
    /// Living sandboxes, by team and by node.
    counts: BTreeMap<Team, BTreeMap<NodeName, u32>>,
    /// Living sandboxes.
    on: BTreeMap<NodeName, u32>,
    /// Nodes that answer.
    up: BTreeSet<NodeName>,
    inventories: BTreeMap<NodeName, u64>,
    /// To be remembered in the store.
    dirty: BTreeSet<SandboxId>,
    watched: BTreeMap<SandboxId, watch::Sender<u64>>,
    /// With so many, those that nobody listens to any more are looked for.
    watched_max: usize,
}

impl Cache {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A creation that was accepted and is on no node yet.
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

    /// What the store remembers of a sandbox, until its node speaks for itself.
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

    /// The next attempt of a creation goes to this node, or to none yet.
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
        // Nothing of what the node before said of its attempt holds any more.
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

    /// The creation is over: this is the sandbox now. What its node has said since stands, and is
    /// given to `since` together with what it was. Returns a later attempt that another node holds,
    /// which was heard of while the creation's own task decided: our memory was behind.
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

    /// A node said something of a sandbox. What is news is given to `news`, with what was known
    /// before, in the order in which it is taken and before it can be remembered.
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
                // Where it is now tells of it.
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
        // It goes on elsewhere, and that node's word counts from now on.
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
        // Its node does not know it any more, and its tombstone there is older than what nodes keep.
        let was_lost = old.lost && !on_it && sandbox.attempt == old.attempt;
        let comes_back = !old.creating && !ended(&sandbox) && (old.let_go || was_lost);
        if !same && !comes_back {
            // Another attempt than the one we know. While the creation is under way its task decides
            // who stays; after that only a later one can be right (our memory was behind).
            let later = sandbox.attempt > old.attempt;
            let twin = sandbox.attempt == old.attempt && !old.creating && !old.ended();
            // That a node has left it says something of that node alone.
            let known_there = old.later.as_ref().is_some_and(|there| there.node == node.as_str());
            if twin && (!has_moved(&sandbox) || known_there) {
                let (known_gone, gone) = (is_gone(&old.sandbox(&id)), is_gone(&sandbox));
                let lives = !ended(&sandbox);
                // Of one whose container is not there either, nothing is to be expected.
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
                // Also one that has ended: what was deleted is not made again.
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
                // Of an attempt before ours; or it was deleted where it had gone from there.
                let off = sandbox.attempt < old.attempt || old.ended() && is_gone(&sandbox);
                let void = off && !ended(&sandbox);
                return if void { Applied::Void } else { Applied::Stray };
            }
        }
        old.inventory = inventory;
        // Gone is gone: a tombstone that the controller wrote is not replaced by the node's own. That
        // of an earlier attempt says nothing of a later one, which may be heard of after it.
        let over = same && old.ended() && !comes_back;
        if over || (same && !comes_back && sandbox.revision < old.revision) {
            return Applied::Known;
        }
        // Word for word what is known, and so is remembered already: most of an inventory after a
        // restart, of which each would be a write.
        if on_it && !old.lost && old.was_told(&mut sandbox) {
            old.revision = sandbox.revision;
            return Applied::Known;
        }
        let Some(before) = inner.get(&id) else { return Applied::Stray };
        let mut entry = before.clone();
        entry.ended_ms = if ended(&sandbox) && !entry.creating { now_ms } else { 0 };
        entry.node = Some(node.clone());
        (entry.sandbox, entry.lost) = (sandbox, false);
        // Of a creation its task tells.
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

    /// A node starts to give a whole inventory; revisions of another journal mean nothing.
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

    /// The inventory is whole: what was not in it is forgotten if it had ended, lost if it lived.
    /// Returns the lost ones.
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

    /// A node answers, or does not.
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

    /// A node is given up: what lives on it has ended. `news` as in `apply`.
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

    /// What lives on a node, or is being created there.
    pub fn living_on(&self, node: &NodeName) -> Vec<Entry> {
        self.inner().living_on(node)
    }

    /// Removes what has ended and is forgotten.
    pub fn forget(&self, ids: &[SandboxId]) {
        let mut inner = self.inner();
        for id in ids {
            if inner.by_id.get(id).is_some_and(|kept| kept.ended()) {
                inner.remove(id);
            }
        }
    }

    /// One entry, by any name.
    pub fn get(&self, name: &SandboxRef) -> Option<Entry> {
        let inner = self.inner();
        match name {
            SandboxRef::Id(id) => inner.get(id),
            SandboxRef::Vmid(vmid) => {
                let ids = inner.by_vmid.get(&vmid.get())?;
                let lives = |id: &&SandboxId| inner.by_id.get(id).is_some_and(|kept| !kept.ended());
                // A number is used again: the last that had it.
                inner.get(ids.iter().find(lives).or(ids.last())?)
            }
        }
    }

    /// As it is to the outside.
    pub fn view(&self, entry: &Entry) -> Sandbox {
        let mut sandbox = entry.sandbox.clone();
        let inner = self.inner();
        let up = entry.node.as_ref().is_some_and(|node| inner.up.contains(node));
        show(&mut sandbox, entry.creating, !entry.lost && up);
        sandbox
    }

    /// A page of a team's sandboxes after `after`, in the order of their ids, as they are to the
    /// outside, and whether there are more.
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

    /// Every entry, for the check.
    pub fn all(&self) -> Vec<Entry> {
        let inner = self.inner();
        inner.by_id.iter().map(|(id, kept)| inner.entry(*id, kept)).collect()
    }

    /// Hands `with` how many living sandboxes a team has on each node. Held for one decision about
    /// many nodes, so that they are counted at one moment and looked up at once.
    pub fn of_team<T>(&self, team: &Team, with: impl FnOnce(&dyn Fn(&NodeName) -> u32) -> T) -> T {
        let inner = self.inner();
        let counts = inner.counts.get(team);
        with(&|node| counts.and_then(|nodes| nodes.get(node)).copied().unwrap_or_default())
    }

    /// Living sandboxes on a node.
    pub fn on(&self, node: &NodeName) -> u32 {
        self.inner().on.get(node).copied().unwrap_or_default()
    }

    /// Counts up at every change of one sandbox.
    pub fn watch(&self, id: SandboxId) -> watch::Receiver<u64> {
        let mut inner = self.inner();
        // Those that nobody listens to any more go when they may be half of all.
        if inner.watched.len() >= inner.watched_max {
            inner.watched.retain(|_, version| version.receiver_count() > 0);
            inner.watched_max = WATCHED_MIN.max(2 * inner.watched.len());
        }
        inner.watched.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Waits until something must be remembered.
    pub async fn dirty(&self) {
        while self.inner().dirty.is_empty() {
            self.dirty.notified().await;
        }
    }

    /// Takes what must be remembered: all that `events` are about, and at most `limit` more. Both
    /// are of one moment, so that no state is taken without the events that led to it, and no event
    /// without the state that it led to.
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

    /// Puts entries back that could not be remembered.
    pub fn mark_dirty(&self, ids: impl IntoIterator<Item = SandboxId>) {
        self.inner().dirty.extend(ids);
        self.dirty.notify_one();
    }
}

/// Makes it what it is to the outside.
fn show(sandbox: &mut Sandbox, creating: bool, reachable: bool) {
    if creating {
        sandbox.set_phase(Phase::Creating);
        // A try that failed is the create task's business until it gives up.
        sandbox.failure = None;
    } else if !ended(sandbox) && !reachable {
        sandbox.set_phase(Phase::Unreachable);
    }
}

impl Inner {
    fn get(&self, id: &SandboxId) -> Option<Entry> {
        self.by_id.get(id).map(|kept| self.entry(*id, kept))
    }

    fn entry(&self, id: SandboxId, kept: &Kept) -> Entry {
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

    fn count(&mut self, kept: &Kept, add: bool) {
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
        let mut kept = Kept::new(team, node, &mut entry.sandbox);
        (kept.creating, kept.lost) = (entry.creating, entry.lost);
        (kept.ended_ms, kept.inventory) = (entry.ended_ms, entry.inventory);
        kept.later = entry.later;
        self.remove(&id);
        self.count(&kept, true);
        // One that is being placed has no number yet, which is 0.
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
