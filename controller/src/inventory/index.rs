//! Sandboxes in compact form, by id and by all that they are looked up by.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    id::SandboxId,
    name::{NodeName, Team},
    sandbox::v1::Sandbox,
    spec::Size,
};
use tokio::sync::{broadcast, watch};

use super::{
    Entry,
    compact::{CompactSandbox, Interner, is_before_clone, mask},
    merge::Known,
    usage::Usage,
};

/// Number of a team's sandboxes on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TeamCount {
    /// Living ones, those under creation included.
    pub living: u32,
    /// Those whose creations wait for the clone.
    pub queued: u32,
}

/// State behind the cache's lock. Changed by `put` and `remove`, which keep the indexes.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) by_id: BTreeMap<SandboxId, Box<CompactSandbox>>,
    pub(super) teams: Interner<Team>,
    pub(super) nodes: Interner<NodeName>,
    /// Index by the numbers of the team and of the node.
    pub(super) by_team: BTreeMap<u32, BTreeSet<SandboxId>>,
    pub(super) by_node: BTreeMap<u32, BTreeSet<SandboxId>>,
    /// Index by vmid, in the order of the ids; mostly one id each.
    pub(super) by_vmid: BTreeMap<u32, Box<[SandboxId]>>,
    /// Index of living sandboxes by the number of the team and by name; mostly one id each.
    pub(super) by_name: BTreeMap<(u32, Box<str>), Vec<SandboxId>>,
    /// Number of changes of what host names by name depend on.
    pub(super) names_version: u64,
    /// Number of living sandboxes, by team and by node.
    pub(super) counts: BTreeMap<Team, BTreeMap<NodeName, TeamCount>>,
    /// Sums of what the living sandboxes of each team have, by the number of the team.
    pub(super) usage: BTreeMap<u32, Usage>,
    pub(super) snapshots: Interner<String>,
    /// Number of living sandboxes that asked for no disk, by the numbers of the team and of the snapshot.
    pub(super) disks_of: BTreeMap<(u32, u32), u64>,
    /// Size of the root disk by the number of the snapshot, GiB, where a node has told it.
    pub(super) snapshot_disks: BTreeMap<u32, u32>,
    /// Number of living sandboxes by node.
    pub(super) on: BTreeMap<NodeName, u32>,
    /// Nodes that are up.
    pub(super) up: BTreeSet<NodeName>,
    pub(super) inventories: BTreeMap<NodeName, u64>,
    /// Sandboxes whose state must be written to the store.
    pub(super) dirty: BTreeSet<SandboxId>,
    /// Tells of each change: the number of the team, and the sandbox.
    pub(super) changes: Changes,
    pub(super) watched: BTreeMap<SandboxId, watch::Sender<u64>>,
    /// Number of watch channels at which unused ones are removed.
    pub(super) watched_max: usize,
}

/// Most changes that a reader may be behind. A reader that is further behind looks at everything.
const BEHIND_MAX: usize = 1024;

/// Changes of all sandboxes, for those who watch many.
#[derive(Debug)]
pub(super) struct Changes(broadcast::Sender<(u32, SandboxId)>);

impl Default for Changes {
    fn default() -> Self {
        Self(broadcast::Sender::new(BEHIND_MAX))
    }
}

impl Changes {
    pub(super) fn tell(&self, team: u32, id: SandboxId) {
        // Nobody may be watching.
        drop(self.0.send((team, id)));
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<(u32, SandboxId)> {
        self.0.subscribe()
    }
}

/// Returns what the host name of a living sandbox depends on, beside its id: team, name, and whether a port is open.
/// A sandbox without an open port counts, too: it may share its name with another one.
fn host_name(sandbox: &CompactSandbox) -> Option<(u32, &str, bool)> {
    let name = sandbox.name.as_deref().filter(|_| !sandbox.ended())?;
    Some((sandbox.team, name, sandbox.open))
}

impl Index {
    pub(super) fn known(&self, id: &SandboxId) -> Option<Known<'_>> {
        let sandbox = self.by_id.get(id)?;
        Some(Known { node: sandbox.node.map(|node| self.nodes.name(node)), sandbox })
    }

    pub(super) fn get(&self, id: &SandboxId) -> Option<Entry> {
        self.by_id.get(id).map(|known| self.entry(*id, known))
    }

    pub(super) fn entry(&self, id: SandboxId, known: &CompactSandbox) -> Entry {
        Entry {
            id,
            team: self.teams.name(known.team).clone(),
            node: known.node.map(|node| self.nodes.name(node).clone()),
            sandbox: known.sandbox(&id),
            creating: known.creating,
            lost: known.lost,
            elsewhere: known.elsewhere.clone(),
            ended_ms: known.ended_ms,
            inventory: known.inventory,
        }
    }

    /// Returns a sandbox as callers see it; `None` for an ended one unless `ended` counts too.
    pub(super) fn shown(
        &self,
        id: &SandboxId,
        known: &CompactSandbox,
        ended: bool,
    ) -> Option<Sandbox> {
        if known.ended() && !ended {
            return None;
        }
        let mut sandbox = known.sandbox(id);
        let up = known.node.is_some_and(|node| self.up.contains(self.nodes.name(node)));
        mask(&mut sandbox, known.creating, !known.lost && up);
        Some(sandbox)
    }

    pub(super) fn on_node(&self, node: &NodeName) -> Vec<SandboxId> {
        let ids = self.nodes.find(node).and_then(|node| self.by_node.get(&node));
        ids.into_iter().flatten().copied().collect()
    }

    pub(super) fn living_on(&self, node: &NodeName) -> Vec<Entry> {
        let on = self.on_node(node);
        on.iter().filter_map(|id| self.get(id)).filter(|entry| !entry.ended()).collect()
    }

    fn count(&mut self, known: &CompactSandbox, add: bool) {
        if !known.ended() {
            let sum = self.usage.entry(known.team).or_default();
            let one = Usage::of(known.size);
            *sum = if add { sum.plus(one) } else { sum.minus(one) };
            if *sum == Usage::default() {
                self.usage.remove(&known.team);
            }
            if let Some(snapshot) = known.disk_of {
                let key = (known.team, snapshot);
                let count = self.disks_of.entry(key).or_default();
                *count = if add { *count + 1 } else { *count - 1 };
                if *count == 0 {
                    self.disks_of.remove(&key);
                }
            }
        }
        let Some(node) = known.node.filter(|_| !known.ended()) else { return };
        let (node, team) = (self.nodes.name(node), self.teams.name(known.team));
        let change = |count: &mut u32| *count = if add { *count + 1 } else { *count - 1 };
        change(self.on.entry(node.clone()).or_default());
        let nodes = self.counts.entry(team.clone()).or_default();
        let count = nodes.entry(node.clone()).or_default();
        change(&mut count.living);
        if known.queued {
            change(&mut count.queued);
        }
        if *count == TeamCount::default() {
            nodes.remove(node);
        }
        if nodes.is_empty() {
            self.counts.remove(team);
        }
    }

    /// Returns the size of a sandbox that counts for its team: with the disk of the snapshot, if it asked for none.
    pub(super) fn counted(&self, known: &CompactSandbox) -> Size {
        let disk = known.disk_of.and_then(|snapshot| self.snapshot_disks.get(&snapshot));
        let disk_gib = disk.copied().unwrap_or_default();
        known.size.or(Size { cpu_cores: 0, memory_mib: 0, disk_gib })
    }

    /// Returns what the living sandboxes of a team have.
    pub(super) fn usage_of(&self, team: u32) -> Usage {
        let asked = self.usage.get(&team).copied().unwrap_or_default();
        let of_team = self.disks_of.range((team, 0)..=(team, u32::MAX));
        let disks = of_team.map(|((_, snapshot), count)| {
            u64::from(self.snapshot_disks.get(snapshot).copied().unwrap_or_default()) * count
        });
        Usage { disk_gib: asked.disk_gib + disks.sum::<u64>(), ..asked }
    }

    pub(super) fn remove(&mut self, id: &SandboxId) {
        if self.take(id).is_some_and(|old| host_name(&old).is_some()) {
            self.names_version += 1;
        }
    }

    /// Takes a sandbox out of all indexes.
    fn take(&mut self, id: &SandboxId) -> Option<Box<CompactSandbox>> {
        let old = self.by_id.remove(id)?;
        self.count(&old, false);
        for (index, number) in [(&mut self.by_team, Some(old.team)), (&mut self.by_node, old.node)]
        {
            if let Some(ids) = number.and_then(|number| index.get_mut(&number)) {
                ids.remove(id);
            }
        }
        if let Some(name) = old.name.clone().filter(|_| !old.ended()) {
            let key = (old.team, name);
            let ids = self.by_name.entry(key.clone()).or_default();
            ids.retain(|other| other != id);
            if ids.is_empty() {
                self.by_name.remove(&key);
            }
        }
        if let Some(ids) = self.by_vmid.remove(&old.vmid) {
            let rest: Box<[_]> = ids.iter().filter(|other| *other != id).copied().collect();
            if !rest.is_empty() {
                self.by_vmid.insert(old.vmid, rest);
            }
        }
        Some(old)
    }

    pub(super) fn put(&mut self, mut entry: Entry) {
        let id = entry.id;
        let (team, node) = (self.teams.intern(&entry.team), entry.node.as_ref());
        let node = node.map(|node| self.nodes.intern(node));
        let mut known = CompactSandbox::new(team, node, &mut entry.sandbox);
        let snapshot = &entry.sandbox.snapshot_id;
        if known.size.disk_gib == 0 && !snapshot.is_empty() {
            known.disk_of = Some(self.snapshots.intern(snapshot));
        }
        (known.creating, known.lost) = (entry.creating, entry.lost);
        known.queued = entry.creating && is_before_clone(&entry.sandbox);
        (known.ended_ms, known.inventory) = (entry.ended_ms, entry.inventory);
        known.elsewhere = entry.elsewhere;
        let old = self.take(&id);
        // Most changes leave the host names alone: whoever reads all of them must not do so again for nothing.
        if old.as_deref().and_then(host_name) != host_name(&known) {
            self.names_version += 1;
        }
        self.count(&known, true);
        // vmid 0: not on a node yet.
        if known.vmid != 0 {
            let before = self.by_vmid.remove(&known.vmid).unwrap_or_default();
            let mut ids = [before.into_vec(), vec![id]].concat();
            ids.sort_unstable();
            self.by_vmid.insert(known.vmid, ids.into());
        }
        if let Some(name) = known.name.clone().filter(|_| !known.ended()) {
            self.by_name.entry((known.team, name)).or_default().push(id);
        }
        self.by_team.entry(known.team).or_default().insert(id);
        if let Some(node) = known.node {
            self.by_node.entry(node).or_default().insert(id);
        }
        self.by_id.insert(id, Box::new(known));
        self.changes.tell(team, id);
        if let Some(version) = self.watched.get(&id) {
            version.send_modify(|version| *version += 1);
        }
    }
}
