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
    id::{SandboxId, SandboxRef, Vmid},
    name::{NodeName, Team},
    sandbox::v1::{Phase, Sandbox},
};
use tokio::sync::{Notify, watch};

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
    /// While it is being created: a later attempt than ours that lives on another node, because our
    /// store is an old copy.
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

    fn vmid(&self) -> Option<Vmid> {
        self.sandbox.vmid.try_into().ok()
    }
}

fn ended(sandbox: &Sandbox) -> bool {
    matches!(sandbox.phase(), Phase::Deleted | Phase::Failed)
}

/// An operator ended it without its container: that may be recovered on another node, or be there
/// when a node comes back that was given up.
fn was_let_go(sandbox: &Sandbox) -> bool {
    ended(sandbox) && matches!(sandbox.cause.as_str(), "released" | NODE_LOST)
}

/// The cause of a sandbox whose node was given up.
const NODE_LOST: &str = "node_lost";

/// What became of a message of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It was news.
    Changed,
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
    by_id: BTreeMap<SandboxId, Entry>,
    by_vmid: BTreeMap<Vmid, BTreeSet<SandboxId>>,
    by_team: BTreeMap<Team, BTreeSet<SandboxId>>,
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
    pub fn placed(&self, id: &SandboxId, node: Option<&NodeName>, attempt: u32, step: &str) {
        let mut inner = self.inner();
        let Some(entry) = inner.by_id.get(id).filter(|entry| entry.creating) else { return };
        let mut entry = entry.clone();
        entry.node = node.cloned();
        entry.later = None;
        // Nothing of what the node before said of its attempt holds any more.
        entry.sandbox = Sandbox {
            node: node.map(ToString::to_string).unwrap_or_default(),
            attempt,
            step: step.to_owned(),
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
    /// given to `since` together with what it was.
    pub fn settle(
        &self,
        id: &SandboxId,
        sandbox: Sandbox,
        now_ms: u64,
        since: impl FnOnce(&Entry, &Sandbox),
    ) {
        let mut inner = self.inner();
        let Some(entry) = inner.by_id.get(id) else { return };
        let mut entry = entry.clone();
        entry.creating = false;
        let newer = entry.sandbox.attempt == sandbox.attempt
            && entry.sandbox.node == sandbox.node
            && entry.sandbox.revision > sandbox.revision;
        if !newer || ended(&sandbox) {
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
    }

    /// A node said something of a sandbox. What is news is given to `news`, with what was known
    /// before, in the order in which it is taken and before it can be remembered.
    pub fn apply(
        &self,
        node: &NodeName,
        sandbox: Sandbox,
        now_ms: u64,
        news: impl FnOnce(Option<&Entry>, &Entry),
    ) -> Applied {
        let (Ok(id), Ok(team)) = (sandbox.id.parse(), sandbox.team.parse()) else {
            return Applied::Malformed;
        };
        let mut inner = self.inner();
        let inventory = inner.inventories.get(node).copied().unwrap_or_default();
        let Some(old) = inner.by_id.get_mut(&id) else {
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
        let same = old.node.as_ref() == Some(node) && sandbox.attempt == old.sandbox.attempt;
        let comes_back = !old.creating && !ended(&sandbox) && was_let_go(&old.sandbox);
        if !same && !comes_back {
            // Another attempt than the one we know. While the creation is under way its task decides
            // who stays; after that only a later one can be right (our memory was behind).
            let later = sandbox.attempt > old.sandbox.attempt;
            if later && old.creating && old.node.as_ref() != Some(node) {
                if !ended(&sandbox) {
                    old.later = Some(Box::new(sandbox));
                }
                return Applied::Stray;
            }
            if !later {
                let void = sandbox.attempt < old.sandbox.attempt && !ended(&sandbox);
                return if void { Applied::Void } else { Applied::Stray };
            }
        }
        old.inventory = inventory;
        // Gone is gone: a tombstone that the controller wrote is not replaced by the node's own. That
        // of an earlier attempt says nothing of a later one, which may be heard of after it.
        let over = same && !old.creating && ended(&old.sandbox) && !comes_back;
        if over || (same && !comes_back && sandbox.revision < old.sandbox.revision) {
            return Applied::Known;
        }
        if old.sandbox == sandbox && !old.lost {
            return Applied::Known;
        }
        let mut entry = old.clone();
        entry.ended_ms = if ended(&sandbox) && !entry.creating { now_ms } else { 0 };
        entry.node = Some(node.clone());
        (entry.sandbox, entry.lost) = (sandbox, false);
        // Of a creation its task tells.
        if !entry.creating {
            news(inner.by_id.get(&id), &entry);
            inner.dirty.insert(id);
        }
        inner.put(entry);
        drop(inner);
        self.dirty.notify_one();
        Applied::Changed
    }

    /// A node starts to give a whole inventory; revisions of another journal mean nothing.
    pub fn begin_inventory(&self, node: &NodeName, same_journal: bool) {
        let mut inner = self.inner();
        *inner.inventories.entry(node.clone()).or_default() += 1;
        if !same_journal {
            let of_node =
                inner.by_id.values_mut().filter(|entry| entry.node.as_ref() == Some(node));
            for entry in of_node {
                entry.sandbox.revision = 0;
            }
        }
    }

    /// The inventory is whole: what was not in it is forgotten if it had ended, lost if it lived.
    /// Returns the lost ones.
    pub fn end_inventory(&self, node: &NodeName) -> Vec<Entry> {
        let mut inner = self.inner();
        let current = inner.inventories.get(node).copied().unwrap_or_default();
        let absent: Vec<Entry> = inner
            .by_id
            .values()
            .filter(|entry| entry.node.as_ref() == Some(node) && entry.inventory != current)
            .filter(|entry| !entry.creating && !entry.ended() && !entry.lost)
            .cloned()
            .collect();
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
        let Inner { watched, by_id, .. } = &mut *inner;
        for (id, version) in watched {
            if by_id.get(id).is_some_and(|entry| entry.node.as_ref() == Some(node)) {
                version.send_modify(|version| *version += 1);
            }
        }
    }

    /// A node is given up: what lives on it has ended. `news` as in `apply`.
    pub fn give_up(&self, node: &NodeName, now_ms: u64, news: impl Fn(&Entry, &Entry)) {
        let mut inner = self.inner();
        for old in inner.living_on(node) {
            let mut entry = old.clone();
            entry.sandbox.set_phase(Phase::Deleted);
            NODE_LOST.clone_into(&mut entry.sandbox.cause);
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
            if inner.by_id.get(id).is_some_and(Entry::ended) {
                inner.remove(id);
            }
        }
    }

    /// One entry, by any name.
    pub fn get(&self, name: &SandboxRef) -> Option<Entry> {
        let inner = self.inner();
        match name {
            SandboxRef::Id(id) => inner.by_id.get(id).cloned(),
            SandboxRef::Vmid(vmid) => {
                let ids = inner.by_vmid.get(vmid)?;
                let living = ids.iter().filter_map(|id| inner.by_id.get(id)).find(|e| !e.ended());
                // A number is used again: the last that had it.
                living.or_else(|| inner.by_id.get(ids.last()?)).cloned()
            }
        }
    }

    /// As it is to the outside.
    pub fn view(&self, entry: &Entry) -> Sandbox {
        self.inner().view(entry)
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
        let ids =
            inner.by_team.get(team).into_iter().flat_map(|ids| ids.range((from, Bound::Unbounded)));
        for entry in ids.filter_map(|id| inner.by_id.get(id)) {
            if entry.ended() && !include_ended {
                continue;
            }
            if page.len() == limit {
                return (page, true);
            }
            page.push(inner.view(entry));
        }
        (page, false)
    }

    /// Every entry, for the check.
    pub fn all(&self) -> Vec<Entry> {
        self.inner().by_id.values().cloned().collect()
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
        // Those that nobody listens to any more go when somebody new comes.
        inner.watched.retain(|_, version| version.receiver_count() > 0);
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
        let entries = ids.iter().filter_map(|id| inner.by_id.get(id).cloned()).collect();
        (entries, events)
    }

    /// Puts entries back that could not be remembered.
    pub fn mark_dirty(&self, ids: impl IntoIterator<Item = SandboxId>) {
        self.inner().dirty.extend(ids);
        self.dirty.notify_one();
    }
}

impl Inner {
    fn living_on(&self, node: &NodeName) -> Vec<Entry> {
        let on = self.by_id.values().filter(|entry| entry.node.as_ref() == Some(node));
        on.filter(|entry| !entry.ended()).cloned().collect()
    }

    fn view(&self, entry: &Entry) -> Sandbox {
        let mut sandbox = entry.sandbox.clone();
        if entry.creating {
            sandbox.set_phase(Phase::Creating);
            // A try that failed is the create task's business until it gives up.
            sandbox.failure = None;
        } else if !ended(&sandbox) {
            let up = entry.node.as_ref().is_some_and(|node| self.up.contains(node));
            if entry.lost || !up {
                sandbox.set_phase(Phase::Unreachable);
            }
        }
        sandbox
    }

    fn count(&mut self, entry: &Entry, add: bool) {
        let Some(node) = entry.node.clone().filter(|_| !entry.ended()) else { return };
        let change = |count: &mut u32| *count = if add { *count + 1 } else { *count - 1 };
        change(self.on.entry(node.clone()).or_default());
        let nodes = self.counts.entry(entry.team.clone()).or_default();
        let count = nodes.entry(node.clone()).or_default();
        change(count);
        if *count == 0 {
            nodes.remove(&node);
        }
        if nodes.is_empty() {
            self.counts.remove(&entry.team);
        }
    }

    fn remove(&mut self, id: &SandboxId) {
        let Some(old) = self.by_id.remove(id) else { return };
        self.count(&old, false);
        if let Some(vmid) = old.vmid()
            && let Some(ids) = self.by_vmid.get_mut(&vmid)
        {
            ids.remove(id);
            if ids.is_empty() {
                self.by_vmid.remove(&vmid);
            }
        }
        if let Some(ids) = self.by_team.get_mut(&old.team) {
            ids.remove(id);
        }
    }

    fn put(&mut self, entry: Entry) {
        let id = entry.id;
        self.remove(&id);
        self.count(&entry, true);
        if let Some(vmid) = entry.vmid() {
            self.by_vmid.entry(vmid).or_default().insert(id);
        }
        self.by_team.entry(entry.team.clone()).or_default().insert(id);
        self.by_id.insert(id, entry);
        if let Some(version) = self.watched.get(&id) {
            version.send_modify(|version| *version += 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> SandboxId {
        SandboxId::new(u64::from(n), &[n; 10])
    }

    fn node(name: &str) -> NodeName {
        name.parse().expect("name")
    }

    fn sandbox(n: u8, phase: Phase, revision: u64) -> Sandbox {
        let mut sandbox = Sandbox {
            id: id(n).to_string(),
            vmid: 100_000 + u32::from(n),
            node: "n1".into(),
            team: "red".into(),
            attempt: 1,
            revision,
            ..Sandbox::default()
        };
        sandbox.set_phase(phase);
        sandbox
    }

    fn apply(cache: &Cache, node: &NodeName, sandbox: Sandbox) -> Applied {
        cache.apply(node, sandbox, 1, |_, _| {})
    }

    fn phase(cache: &Cache, n: u8) -> Option<Phase> {
        cache.get(&SandboxRef::Id(id(n))).map(|entry| cache.view(&entry).phase())
    }

    #[test]
    fn older_news_change_nothing() {
        let cache = Cache::default();
        cache.set_up(&node("n1"), true);
        assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Running, 5)), Applied::Changed);
        assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Creating, 4)), Applied::Known);
        assert_eq!(phase(&cache, 1), Some(Phase::Running));
    }

    #[test]
    fn absence_counts_only_after_a_whole_inventory_and_never_deletes() {
        let cache = Cache::default();
        let n1 = node("n1");
        cache.set_up(&n1, true);
        apply(&cache, &n1, sandbox(1, Phase::Running, 1));
        apply(&cache, &n1, sandbox(2, Phase::Running, 2));
        cache.begin_inventory(&n1, false);
        apply(&cache, &n1, sandbox(1, Phase::Running, 1));
        assert_eq!(phase(&cache, 2), Some(Phase::Running), "not whole yet");
        let lost: Vec<_> = cache.end_inventory(&n1).into_iter().map(|entry| entry.id).collect();
        assert_eq!(lost, [id(2)]);
        assert_eq!(phase(&cache, 2), Some(Phase::Unreachable));
        // It turns up again.
        apply(&cache, &n1, sandbox(2, Phase::Running, 3));
        assert_eq!(phase(&cache, 2), Some(Phase::Running));
    }

    #[test]
    fn a_node_that_is_down_makes_nothing_disappear() {
        let cache = Cache::default();
        cache.set_up(&node("n1"), true);
        apply(&cache, &node("n1"), sandbox(1, Phase::Running, 1));
        cache.set_up(&node("n1"), false);
        assert_eq!(phase(&cache, 1), Some(Phase::Unreachable));
        assert_eq!(cache.page(&"red".parse().expect("team"), None, 10, false).0.len(), 1);
    }

    #[test]
    fn a_creation_is_creating_until_it_settles_and_its_strays_are_not_shown() {
        let cache = Cache::default();
        cache.set_up(&node("n2"), true);
        let red: Team = "red".parse().expect("team");
        cache.begin(id(1), red.clone(), Sandbox { attempt: 1, ..sandbox(1, Phase::Creating, 0) });
        apply(&cache, &node("n1"), sandbox(1, Phase::Failed, 3));
        assert_eq!(phase(&cache, 1), Some(Phase::Creating));
        cache.placed(&id(1), Some(&node("n2")), 2, "placing");
        let second = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
        assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Failed, 4)), Applied::Stray);
        assert_eq!(apply(&cache, &node("n1"), sandbox(1, Phase::Running, 4)), Applied::Void);
        assert_eq!(apply(&cache, &node("n2"), second.clone()), Applied::Changed);
        assert_eq!(phase(&cache, 1), Some(Phase::Creating));
        cache.settle(&id(1), second, 1, |_, _| {});
        assert_eq!(phase(&cache, 1), Some(Phase::Running));
        assert_eq!(cache.of_team(&red, |on| (on(&node("n1")), on(&node("n2")))), (0, 1));
    }

    #[test]
    fn what_was_let_go_can_live_again_elsewhere_and_what_was_deleted_cannot() {
        for (cause, lives) in [("released", true), (NODE_LOST, true), ("", false), ("ttl", false)] {
            let cache = Cache::default();
            let ended = Sandbox { cause: cause.into(), ..sandbox(1, Phase::Deleted, 9) };
            cache.set_up(&node("n2"), true);
            apply(&cache, &node("n1"), ended.clone());
            let there = Sandbox { node: "n2".into(), ..sandbox(1, Phase::Running, 1) };
            let applied = apply(&cache, &node("n2"), there);
            assert_eq!(applied, if lives { Applied::Changed } else { Applied::Stray }, "{cause}");
            let expected = if lives { Phase::Running } else { Phase::Deleted };
            assert_eq!(phase(&cache, 1), Some(expected));
            // The first node's tombstone is no news.
            apply(&cache, &node("n1"), Sandbox { revision: 10, ..ended });
            assert_eq!(phase(&cache, 1), Some(expected));
        }
    }

    #[test]
    fn the_tombstone_of_an_attempt_does_not_hide_the_one_that_came_up() {
        let tombstone = sandbox(1, Phase::Failed, 3);
        let up = Sandbox { node: "n2".into(), attempt: 2, ..sandbox(1, Phase::Running, 1) };
        for tombstone_first in [true, false] {
            let cache = Cache::default();
            let mut words = [(node("n1"), tombstone.clone()), (node("n2"), up.clone())];
            if !tombstone_first {
                words.reverse();
            }
            for (from, word) in words {
                cache.set_up(&from, true);
                apply(&cache, &from, word);
            }
            assert_eq!(phase(&cache, 1), Some(Phase::Running), "{tombstone_first}");
        }
    }

    #[test]
    fn what_was_on_a_node_that_is_given_up_has_ended_until_it_is_back() {
        let cache = Cache::default();
        let (n1, n2) = (node("n1"), node("n2"));
        cache.set_up(&n1, true);
        apply(&cache, &n1, sandbox(1, Phase::Running, 5));
        apply(&cache, &n1, sandbox(2, Phase::Deleted, 6));
        apply(&cache, &n2, Sandbox { node: "n2".into(), ..sandbox(3, Phase::Running, 5) });
        cache.set_up(&n1, false);
        cache.give_up(&n1, 7, |old, new| {
            assert_eq!((old.ended(), new.ended()), (false, true));
        });
        assert_eq!((phase(&cache, 1), cache.on(&n1), cache.on(&n2)), (Some(Phase::Deleted), 0, 1));
        cache.set_up(&n1, true);
        assert_eq!(apply(&cache, &n1, sandbox(1, Phase::Running, 5)), Applied::Changed);
        assert_eq!(phase(&cache, 1), Some(Phase::Running), "nothing was lost after all");
    }

    #[test]
    fn a_number_that_is_used_again_names_the_living_one() {
        let cache = Cache::default();
        let n1 = node("n1");
        apply(&cache, &n1, Sandbox { vmid: 100_001, ..sandbox(1, Phase::Deleted, 1) });
        apply(&cache, &n1, Sandbox { vmid: 100_001, ..sandbox(2, Phase::Running, 2) });
        let by_vmid = SandboxRef::Vmid(100_001.try_into().expect("vmid"));
        assert_eq!(cache.get(&by_vmid).map(|entry| entry.id), Some(id(2)));
        assert_eq!(cache.on(&n1), 1);
    }

    #[tokio::test]
    async fn who_watches_is_told() {
        let cache = Cache::default();
        let mut changes = cache.watch(id(1));
        apply(&cache, &node("n1"), sandbox(1, Phase::Running, 1));
        changes.changed().await.expect("told");
        changes.mark_unchanged();
        cache.set_up(&node("n1"), true);
        changes.changed().await.expect("told of the node too");
        cache.dirty().await;
        assert_eq!(cache.take(10, Vec::new).0.len(), 1);
        assert_eq!(cache.take(10, Vec::new).0.len(), 0);
    }
}
