//! All nodes as decisions see them, updated by reports, calls that time out and the decisions
//! themselves. The time is passed in; the network is not used.

use std::{collections::BTreeMap, sync::Arc};

use proto::{
    id::SandboxId,
    name::{Label, NodeName, SnapshotId},
    sandbox::v1::NodeLoad,
    spec::{Labels, Size},
};

use super::{
    Affinity, Ask, BREAKER_MS, Choice, Growth, Holder, Ledger, Limits, Load, Look, NoRoom,
    NodeView, Now, REPORT_PERIOD_MS, SplitMix64, UsageModel, choose, growth,
};

/// Most labels, one bit each. Later ones count as missing.
const LABELS_MAX: usize = 64;

/// The nodes. An index is the position in the order in which they were added.
#[derive(Debug)]
pub struct Fleet {
    pub(super) limits: Limits,
    pub(super) nodes: Vec<NodeView>,
    pub(super) names: Arc<Vec<NodeName>>,
    by_name: BTreeMap<NodeName, u32>,
    /// Holders by snapshot, ordered by node.
    holders: BTreeMap<String, Vec<Holder>>,
    /// Snapshots by node, as reported.
    held: Vec<Vec<String>>,
    labels: Vec<String>,
    ledger: Ledger,
    usage_model: UsageModel,
    period_ms: u64,
    random: SplitMix64,
}

impl Fleet {
    /// Creates a fleet without nodes; samples are drawn with this seed.
    pub fn new(limits: Limits, seed: u64) -> Self {
        Self {
            limits,
            nodes: Vec::new(),
            names: Arc::default(),
            by_name: BTreeMap::new(),
            holders: BTreeMap::new(),
            held: Vec::new(),
            labels: Vec::new(),
            ledger: Ledger::default(),
            usage_model: UsageModel::new(limits.assumed_cpu_use, limits.assumed_memory_use),
            period_ms: REPORT_PERIOD_MS,
            random: SplitMix64::new(seed),
        }
    }

    /// Sets the period of the agents' reports, milliseconds, where that is not a second.
    pub const fn set_period(&mut self, period_ms: u64) {
        self.period_ms = period_ms;
    }

    /// Adds a node, which is down and has not reported yet.
    pub fn add(&mut self, name: NodeName) -> u32 {
        let node = u32::try_from(self.nodes.len()).expect("fewer nodes than 2^32");
        self.nodes.push(NodeView { down: true, ..NodeView::default() });
        Arc::make_mut(&mut self.names).push(name.clone());
        self.held.push(Vec::new());
        self.by_name.insert(name, node);
        for (rank, node) in (0..).zip(self.by_name.values()) {
            self.nodes[*node as usize].rank = rank;
        }
        node
    }

    /// Removes a forgotten node: it gets no work, and its index is not used again.
    pub fn remove(&mut self, node: u32) {
        self.nodes[node as usize].down = true;
        self.held[node as usize].clear();
        self.holders.values_mut().for_each(|holders| holders.retain(|held| held.node != node));
        self.by_name.retain(|_, at| *at != node);
    }

    /// Returns the index of a node.
    pub fn find(&self, name: &NodeName) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Returns the name of a node.
    pub fn name(&self, node: u32) -> &NodeName {
        &self.names[node as usize]
    }

    /// Returns the names of all nodes. Shared, for look-ups while the fleet is borrowed.
    pub fn names(&self) -> Arc<Vec<NodeName>> {
        self.names.clone()
    }

    /// Returns the nodes that are not forgotten, by name.
    pub(super) fn in_use(&self) -> impl Iterator<Item = u32> {
        self.by_name.values().copied()
    }

    /// Returns the state of a node.
    pub fn view(&self, node: u32) -> &NodeView {
        &self.nodes[node as usize]
    }

    /// Returns the state of all nodes.
    pub fn views(&self) -> &[NodeView] {
        &self.nodes
    }

    /// Returns the learnt usage of sandboxes.
    pub const fn usage_model(&self) -> &UsageModel {
        &self.usage_model
    }

    /// Marks a node as up or down.
    pub fn set_down(&mut self, node: u32, down: bool) {
        self.nodes[node as usize].down = down;
    }

    /// Notes whether a node has vmids in common with another one that keeps them.
    pub fn set_vmids_overlap(&mut self, node: u32, overlap: bool) {
        self.nodes[node as usize].vmids_overlap = overlap;
    }

    /// Opens the breaker after a call without an answer: no new work, until one creation tries it.
    pub fn trip(&mut self, node: u32, now_ms: u64) {
        self.nodes[node as usize].breaker_until_ms = Some(now_ms + BREAKER_MS);
    }

    /// Closes the breaker: the node answered.
    pub fn answered(&mut self, node: u32) {
        self.nodes[node as usize].breaker_until_ms = None;
    }

    /// Applies a report. `first`: the first of a connection.
    pub fn reported(&mut self, node: u32, report: &NodeLoad, now_ms: u64, first: bool) {
        let mut load = Load::from(report);
        for label in &report.labels {
            load.labels |= self.new_label(label);
        }
        let gone: Vec<String> = {
            let held = &mut self.held[node as usize];
            if *held == report.snapshots {
                Vec::new()
            } else {
                let before = std::mem::replace(held, report.snapshots.clone());
                before.into_iter().filter(|old| !report.snapshots.contains(old)).collect()
            }
        };
        for snapshot in gone {
            if let Some(holders) = self.holders.get_mut(&snapshot) {
                holders.retain(|holder| holder.node != node);
            }
        }
        for (at, snapshot) in report.snapshots.iter().enumerate() {
            let size = report.snapshot_sizes.get(at).copied().unwrap_or_default();
            let holder = Holder {
                node,
                size: size.into(),
                queued: report.snapshot_queues.get(at).copied().unwrap_or_default(),
                queue_max: report.snapshot_queue_max,
                cached: false,
            };
            self.hold(snapshot, holder);
        }
        self.load(node, load, (report.seq, first), now_ms);
    }

    /// Applies a converted report. `first`: the first of a connection.
    pub fn load(&mut self, node: u32, load: Load, (seq, first): (u64, bool), now_ms: u64) {
        let view = &mut self.nodes[node as usize];
        view.load = load;
        view.reported_ms = Some(now_ms);
        self.ledger.reported(node, seq, first);
        self.nodes[node as usize].reserved = self.ledger.on(node);
        self.usage_model.learn(&self.nodes, now_ms);
    }

    /// Adds or updates a holder of a snapshot.
    pub fn hold(&mut self, snapshot: &str, holder: Holder) {
        if !self.holders.contains_key(snapshot) {
            self.holders.insert(snapshot.to_owned(), Vec::new());
        }
        let Some(holders) = self.holders.get_mut(snapshot) else { return };
        match holders.binary_search_by_key(&holder.node, |held| held.node) {
            Ok(at) => holders[at] = holder,
            Err(at) => holders.insert(at, holder),
        }
    }

    /// Returns the nodes that hold a snapshot.
    pub fn holders(&self, snapshot: &SnapshotId) -> &[Holder] {
        self.holders.get(snapshot.as_str()).map(Vec::as_slice).unwrap_or_default()
    }

    /// Returns the largest root disk that nodes report of a snapshot, GiB; 0 where none tells it.
    pub fn disk_gib(&self, snapshot: &str) -> u32 {
        let holders = self.holders.get(snapshot).into_iter().flatten();
        holders.map(|holder| holder.size.disk_gib).max().unwrap_or_default()
    }

    /// Returns the bit of a label; 0 when no node has it.
    pub fn label(&self, label: &str) -> u64 {
        self.labels.iter().position(|known| known == label).map_or(0, |at| 1 << at)
    }

    /// Converts labels to bits. An unknown label is ignored when preferred or to be avoided; when
    /// required, no node matches: none has all bits.
    pub fn affinity(&self, labels: &Labels) -> Affinity {
        let bits = |labels: &[Label]| {
            labels.iter().fold(0, |bits, label| bits | self.label(label.as_str()))
        };
        let known = |label: &Label| self.label(label.as_str()) != 0;
        let possible = labels.require.iter().all(known);
        Affinity {
            required: if possible { bits(&labels.require) } else { u64::MAX },
            forbidden: bits(&labels.forbid),
            preferred: bits(&labels.prefer),
            avoided: bits(&labels.avoid),
        }
    }

    fn new_label(&mut self, label: &str) -> u64 {
        if self.label(label) == 0 && self.labels.len() < LABELS_MAX {
            self.labels.push(label.to_owned());
        }
        self.label(label)
    }

    /// Returns the values that all nodes share in a decision.
    pub const fn now(&self, ms: u64) -> Now {
        Now { ms, period_ms: self.period_ms, usage_model: self.usage_model }
    }

    /// Chooses a node. Nothing is reserved.
    pub fn choose(
        &mut self,
        snapshot: &SnapshotId,
        ask: &Ask<'_>,
        look: Look,
        now_ms: u64,
    ) -> Choice {
        let now = self.now(now_ms);
        let holders = self.holders.get(snapshot.as_str()).map(Vec::as_slice).unwrap_or_default();
        choose(&self.nodes, holders, ask, &self.limits, &now, look, &mut self.random)
    }

    /// Chooses among these nodes only.
    pub fn choose_among(
        &mut self,
        snapshot: &SnapshotId,
        ask: &Ask<'_>,
        nodes: &[u32],
        now_ms: u64,
    ) -> Choice {
        let now = self.now(now_ms);
        let holders: Vec<Holder> = self
            .holders(snapshot)
            .iter()
            .filter(|held| nodes.contains(&held.node))
            .copied()
            .collect();
        choose(&self.nodes, &holders, ask, &self.limits, &now, Look::All, &mut self.random)
    }

    /// Reserves on the chosen node. After a call that timed out there, this creation alone tries
    /// the node: the breaker opens again until it has answered.
    pub fn reserve(&mut self, id: SandboxId, node: u32, size: Size, now_ms: u64) {
        self.release(&id);
        self.ledger.reserve(id, node, size);
        let view = &mut self.nodes[node as usize];
        view.reserved = self.ledger.on(node);
        if view.breaker_until_ms.is_some() {
            view.breaker_until_ms = Some(now_ms + BREAKER_MS);
        }
    }

    /// Records that the node took a creation; its report with this number was made after that.
    pub fn admitted(&mut self, id: &SandboxId, seq: u64) {
        self.ledger.admitted(id, seq);
    }

    /// Reserves what a sandbox of a node takes more; returns the number of that growth. A start that is asked for
    /// again while it waits has its room already.
    ///
    /// # Errors
    /// When the node has no room for it.
    pub fn grow(&mut self, node: u32, growth: &Growth) -> Result<u64, NoRoom> {
        let more = growth.more();
        let again = growth.starts().and_then(|id| self.ledger.share_start(node, &id, more));
        if let Some(number) = again {
            return Ok(number);
        }
        growth::check(self.view(node), growth, &self.limits)?;
        let number = self.ledger.grow(node, more, growth.starts());
        self.nodes[node as usize].reserved = self.ledger.on(node);
        Ok(number)
    }

    /// Records that a call of a growth has ended. After the last one the node's report with this number, and each
    /// later one, includes the growth.
    pub fn grown(&mut self, number: u64, seq: u64) {
        self.ledger.grown(number, seq);
    }

    /// Drops the reservation of a creation that is on no node any more.
    pub fn release(&mut self, id: &SandboxId) {
        let Some(node) = self.ledger.node(id) else { return };
        self.ledger.release(id);
        self.nodes[node as usize].reserved = self.ledger.on(node);
    }
}
