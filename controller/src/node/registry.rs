//! The nodes that the controller knows, their health and their load.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use daemon::{peer::Validity, sync::Mutex};
use proto::{
    agent::v1::{HelloResponse, Member},
    id::SandboxId,
    name::{NodeName, SnapshotId, Team},
    sandbox::v1::{ConfigEdit, NodeLoad},
    spec::{Size, Spec},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Client, Connector, Error, Node, NodeCertificates, NodeStatus,
    epoch::Epoch,
    link,
    vmids::{VmidRange, VmidRanges},
};
use crate::{
    clock::{Clock, Random},
    events::{Log, Source},
    inventory::{Cache, Entry, commands::Commands},
    placement::{self, Ask, Decided, Decision, ExplainText, Fleet, Limits, Look, PriorOutcome},
    store::{self, Store},
};

/// Sources of nodes, and their limits.
#[derive(Debug, Clone)]
pub struct Options {
    /// Configured nodes with the addresses of their agents.
    pub seeds: Vec<(NodeName, String)>,
    /// Whether the members of an agent's cluster are used too.
    pub discover: bool,
    /// Port of the agents of discovered nodes.
    pub agent_port: u16,
    /// Limits of how full nodes get.
    pub limits: Limits,
}

/// Nodes that have refused or failed a creation so far.
#[derive(Debug, Default, Clone)]
pub struct AttemptHistory {
    /// Nodes that refused it, with the end of that refusal and its message.
    pub refused: BTreeMap<NodeName, (Instant, String)>,
    /// Nodes that failed it, with the reason.
    pub failed: BTreeMap<NodeName, String>,
}

/// Registry of all nodes.
#[derive(Debug)]
pub struct Nodes {
    /// Sandboxes of all nodes.
    pub cache: Cache,
    /// Commands of all nodes.
    pub commands: Arc<Commands>,
    /// Fencing number.
    pub epoch: Epoch,
    /// Event log.
    pub log: Log,
    pub(super) store: Arc<dyn Store>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Arc<dyn Random>,
    options: Options,
    connector: Arc<dyn Connector>,
    /// Certificates of the nodes; empty where connections have none.
    certificates: Arc<NodeCertificates>,
    /// Certificate that the controller serves with, and whether its overdue renewal was told; `None` before the
    /// first look.
    pub(super) own_certificate: Mutex<Option<(Validity, bool)>>,
    nodes: Mutex<BTreeMap<NodeName, Arc<Node>>>,
    /// Forgotten nodes. They are used again when they are online again.
    forgotten: Mutex<BTreeSet<NodeName>>,
    /// Nodes as placement sees them. Locked before `nodes`, and that before a node's state.
    pub(super) fleet: Mutex<Fleet>,
    /// Ranges of the nodes' vmids. Nothing is locked while it is.
    vmids: Mutex<VmidRanges>,
    /// Zero of the time stamps of reports.
    born: Instant,
    news: watch::Sender<u64>,
    /// Cancelled once the cache is loaded. Node watches wait for it; otherwise every reported
    /// sandbox would look new.
    loaded: CancellationToken,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Nodes {
    /// Starts a watch on every node that is configured or stored. The watches wait for `loaded`.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn start(
        options: Options,
        connector: Arc<dyn Connector>,
        store: Arc<dyn Store>,
        (clock, random): (Arc<dyn Clock>, Arc<dyn Random>),
        (tasks, stop): (TaskTracker, CancellationToken),
    ) -> Result<Arc<Self>, store::Error> {
        let mut seed = [0; 8];
        random.fill(&mut seed);
        let fleet = Fleet::new(options.limits, u64::from_le_bytes(seed));
        let nodes = Arc::new(Self {
            cache: Cache::default(),
            commands: Arc::default(),
            epoch: Epoch::start(store.clone()).await?,
            log: Log::new(clock.clone()),
            store: store.clone(),
            clock,
            random,
            options,
            certificates: connector.certificates().unwrap_or_default(),
            own_certificate: Mutex::default(),
            connector,
            nodes: Mutex::default(),
            forgotten: Mutex::new(store.forgotten_nodes().await?.into_iter().collect()),
            fleet: Mutex::new(fleet),
            vmids: Mutex::default(),
            born: Instant::now(),
            news: watch::channel(0).0,
            loaded: CancellationToken::new(),
            tasks,
            stop,
        });
        for (name, address) in nodes.options.seeds.clone() {
            // One that was forgotten and is configured again: its pending cancels must be kept.
            let was_forgotten = nodes.forgotten.lock().remove(&name);
            if was_forgotten {
                nodes.store.put_node(&name, &address).await?;
            }
            nodes.add(&name, &address);
        }
        let mut enrolments = nodes.store.enrolments().await?;
        nodes.certificates.load(&enrolments);
        // Of two nodes with the same vmids the one that joined later is held back.
        enrolments.sort_by_key(|enrolment| enrolment.joined_ms);
        // A forgotten one has no address.
        for joined in enrolments.iter().filter(|enrolment| !enrolment.address.is_empty()) {
            nodes.add(&joined.node, &joined.address);
        }
        if nodes.options.discover {
            for (name, address) in nodes.store.nodes().await? {
                nodes.add(&name, &address);
            }
        }
        Ok(nodes)
    }

    fn add(self: &Arc<Self>, name: &NodeName, address: &str) {
        self.add_or_move(name, address, false);
    }

    /// Adds a node. With `moves`, a known node with another address is replaced in one step, so that nobody sees
    /// the registry without it; it stays when the new address can never work.
    fn add_or_move(self: &Arc<Self>, name: &NodeName, address: &str, moves: bool) {
        let mut fleet = self.fleet.lock();
        let mut nodes = self.nodes.lock();
        let known = nodes.get(name);
        if known.is_some_and(|known| !moves || known.address == address) {
            return;
        }
        let client = match Client::new(self.connector.clone(), name, address) {
            Ok(client) => client,
            Err(error) => {
                tracing::error!(node = %name, address, %error, "address of a node can never work");
                return;
            }
        };
        if let Some(old) = known {
            old.watch_stop.cancel();
            fleet.remove(old.slot);
        }
        let slot = fleet.add(name.clone());
        let mut vmids = self.vmids.lock();
        vmids.add(name);
        fleet.set_vmids_overlap(slot, vmids.overlap(name).is_some());
        drop(vmids);
        let stop = self.stop.child_token();
        let node = Arc::new(Node::new(name.clone(), address, (client, slot), stop));
        nodes.insert(name.clone(), node.clone());
        let (this, stop) = (self.clone(), node.watch_stop.clone());
        self.tasks.spawn(async move {
            let listen = Box::pin(async move {
                this.loaded.cancelled().await;
                link::keep(this, node).await;
            });
            stop.run_until_cancelled_owned(listen).await;
        });
    }

    /// Adds a node that has joined, or follows it to its new address. A configured address counts
    /// more.
    pub fn joined(self: &Arc<Self>, name: &NodeName, address: &str) {
        self.forgotten.lock().remove(name);
        if self.is_configured(name) {
            return;
        }
        self.add_or_move(name, address, true);
        self.announce();
    }

    /// Returns what is known of the nodes' certificates.
    pub fn certificates(&self) -> &NodeCertificates {
        &self.certificates
    }

    /// Returns the nodes whose certificate should have been renewed by now.
    pub fn overdue_certificates(&self) -> Vec<(NodeName, Validity)> {
        let late = self.certificates.overdue(self.clock.now_ms());
        late.into_iter().filter(|(node, _)| self.get(node).is_some()).collect()
    }

    /// Drops a node that was removed from the registry from placement, too.
    fn drop_slot(&self, node: &Node) {
        self.fleet.lock().remove(node.slot);
    }

    /// Adds the members of an agent's cluster when discovery is on.
    pub(super) async fn discovered(self: &Arc<Self>, members: &[Member]) {
        if !self.options.discover {
            return;
        }
        for member in members.iter().filter(|member| !member.ip.is_empty()) {
            let Ok(name) = member.node.parse::<NodeName>() else { continue };
            let given_up = self.forgotten.lock().contains(&name) && !member.online;
            if given_up || self.get(&name).is_some() {
                continue;
            }
            let bare = member.ip.parse::<std::net::IpAddr>();
            let Ok(ip) = bare else { continue };
            let address = std::net::SocketAddr::new(ip, self.options.agent_port).to_string();
            tracing::info!(node = %name, address, "node discovered");
            if let Err(error) = self.store.put_node(&name, &address).await {
                tracing::warn!(%error, "could not store a discovered node");
            }
            self.add(&name, &address);
        }
    }

    /// Returns true when no node is known.
    pub fn is_empty(&self) -> bool {
        self.nodes.lock().is_empty()
    }

    /// Returns a node whose inventory or load this controller has not received since its start. A
    /// report alone, which comes with the answer to any creation, does not include the inventory.
    pub fn unsynced(&self) -> Option<NodeName> {
        let nodes = self.nodes.lock();
        let unsynced = |node: &&Arc<Node>| {
            let state = node.state.lock();
            !state.synced || state.report.is_none()
        };
        nodes.values().find(unsynced).map(|node| node.name.clone())
    }

    /// Returns true for a node in the configuration.
    pub fn is_configured(&self, name: &NodeName) -> bool {
        self.options.seeds.iter().any(|(seed, _)| seed == name)
    }

    /// Returns true for a node that was forgotten and has not come back.
    pub fn is_forgotten(&self, name: &NodeName) -> bool {
        let forgotten = self.forgotten.lock().contains(name);
        forgotten && self.get(name).is_none()
    }

    /// Forgets a node and ends the sandboxes on it. The store is written first: after a crash in
    /// between, a repeated call ends the rest. Creations under way there go on elsewhere, or end.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn forget(&self, name: &NodeName) -> Result<(), store::Error> {
        self.store.forget_node(name).await?;
        self.forgotten.lock().insert(name.clone());
        let node = self.nodes.lock().remove(name);
        if let Some(node) = node {
            self.drop_slot(&node);
            node.watch_stop.cancel();
        }
        let touched = self.vmids.lock().forget(name);
        self.note_overlaps(touched);
        self.cache.set_up(name, false);
        self.end_on(name);
        self.commands.forget(name);
        self.announce();
        Ok(())
    }

    /// Ends the sandboxes on a node that is forgotten.
    pub(super) fn end_on(&self, name: &NodeName) {
        let news = |old: &Entry, new: &Entry| {
            let source = Source { id: new.id, team: &new.team, node: name, journal: "" };
            self.log.observe(&source, Some(&old.sandbox), &new.sandbox);
        };
        self.cache.end_on(name, self.clock.now_ms(), news);
    }

    /// Cancels a stale attempt over the session that a node has now, if it has one. A pending cancel in the store
    /// is sent at the start of a session only.
    pub fn cancel_stale_attempt(&self, name: &NodeName, id: SandboxId, attempt: u32) {
        if let Some(node) = self.get(name) {
            node.add_stale_attempt(id, attempt);
        }
    }

    /// Records, before the watches start, a number that a node has given to a sandbox.
    pub fn gave_vmid(&self, node: &NodeName, vmid: u32) {
        self.vmids.lock().gave(node, vmid);
    }

    /// Starts the watches: the cache holds what the store knows.
    pub fn loaded(&self) {
        self.loaded.cancel();
    }

    /// Returns one node.
    pub fn get(&self, name: &NodeName) -> Option<Arc<Node>> {
        self.nodes.lock().get(name).cloned()
    }

    /// Returns all nodes, by name.
    pub fn all(&self) -> Vec<Arc<Node>> {
        self.nodes.lock().values().cloned().collect()
    }

    /// Returns a counter that increases when a node reports, comes or goes.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    pub(super) fn announce(&self) {
        self.news.send_modify(|news| *news += 1);
    }

    /// Milliseconds since `born`, which reports are stamped with.
    fn now_ms(&self) -> u64 {
        daemon::clock::millis(self.born.elapsed())
    }

    /// Places a creation and reserves its resources in the same step, so that concurrent decisions
    /// see each other. Without an id nothing is reserved and all nodes are judged. `among`
    /// restricts the candidates.
    pub fn place(
        &self,
        id: Option<SandboxId>,
        team: &Team,
        spec: &Spec,
        attempt: u32,
        history: &AttemptHistory,
        among: Option<&[NodeName]>,
    ) -> Decision {
        let (now, now_ms) = (Instant::now(), self.now_ms());
        let decided_ms = self.clock.now_ms();
        let look = if id.is_some() { Look::default() } else { Look::All };
        let mut fleet = self.fleet.lock();
        if let Some(id) = &id {
            fleet.release(id);
        }
        let prior = prior_outcomes(&fleet, history, now);
        // An unknown name matches no node.
        let required = spec.node.as_ref().map(|name| fleet.find(name).unwrap_or(u32::MAX));
        let among: Option<Vec<u32>> =
            among.map(|nodes| nodes.iter().filter_map(|name| fleet.find(name)).collect());
        let among = among.as_deref();
        let names = fleet.names();
        let (choice, size, holders, verdicts) = self.cache.with_team_counts(team, |count| {
            let on = |node: u32| names.get(node as usize).map(count).unwrap_or_default();
            let (team, queued) = (|node| on(node).living, |node| on(node).queued);
            let ask = Ask {
                size: spec.size,
                network: spec.network,
                required,
                affinity: fleet.affinity(&spec.labels),
                prior: &prior,
                team: &team,
                queued: &queued,
            };
            let snapshot = &spec.snapshot;
            let choice = match among {
                None => fleet.choose(snapshot, &ask, look, now_ms),
                Some(nodes) => fleet.choose_among(snapshot, &ask, nodes, now_ms),
            };
            let decided = Decided { snapshot, ask: &ask, choice: &choice, look, among };
            let texts = |node: u32| self.explain_text(fleet.name(node), history);
            let verdicts = fleet.explain(&decided, now_ms, &texts);
            let holders = fleet.holders(&spec.snapshot);
            let chosen = choice.best.first();
            let holder = chosen.and_then(|best| holders.iter().find(|h| h.node == best.node));
            let size = holder.map(|holder| spec.size.or(holder.size)).unwrap_or_default();
            (choice, size, holders.len(), verdicts)
        });
        if let (Some(id), Some(best)) = (id, choice.best.first()) {
            fleet.reserve(id, best.node, size, now_ms);
        }
        let holders = u32::try_from(holders).unwrap_or(u32::MAX);
        Decision { attempt, decided_ms, holders, verdicts }
    }

    /// Returns the default size of a snapshot, as a node that holds it reports it; nothing, if none does. The disk
    /// is the largest that nodes report.
    pub fn default_size(&self, snapshot: &SnapshotId) -> Size {
        let first = {
            let fleet = self.fleet.lock();
            fleet.holders(snapshot).first().map(|holder| holder.size).unwrap_or_default()
        };
        Size { disk_gib: self.cache.snapshot_disk_gib(snapshot.as_str()), ..first }
    }

    /// Returns what is known about a node that refused, failed or is down, for the explanation.
    fn explain_text(&self, name: &NodeName, history: &AttemptHistory) -> ExplainText {
        ExplainText {
            down: self.get(name).and_then(|node| node.down()),
            vmids: self.vmids.lock().overlap(name).map(|overlap| overlap.to_string()),
            refused: history.refused.get(name).map(|(_, why)| why.clone()),
            failed: history.failed.get(name).cloned(),
        }
    }

    /// Drops the reservation of a creation that is on no node any more.
    pub fn release(&self, id: &SandboxId) {
        self.fleet.lock().release(id);
    }

    /// Records that a node took a creation; `load` was measured after that.
    pub fn admitted(&self, node: &Node, id: &SandboxId, load: Option<NodeLoad>) {
        let seq = load.as_ref().map_or(0, |load| load.seq);
        let mut fleet = self.fleet.lock();
        fleet.answered(node.slot);
        fleet.admitted(id, seq);
        drop(fleet);
        if let Some(load) = load {
            self.reported(node, load, false);
        }
    }

    /// Records the load that came with an answer.
    pub fn load_answered(&self, node: &Node, load: Option<NodeLoad>) {
        if let Some(load) = load {
            self.reported(node, load, false);
        }
    }

    /// Records a new connection; returns true when it is not this controller's first.
    pub(super) fn connected(&self, node: &Node, hello: &HelloResponse) -> bool {
        // The agent has just answered, so the earlier problem was the connection.
        self.fleet.lock().answered(node.slot);
        self.vmids_told(&node.name, VmidRange::told(hello));
        node.connected(hello)
    }

    /// Records the range of a node's vmids.
    fn vmids_told(&self, name: &NodeName, range: Option<VmidRange>) {
        let is_new = self.vmids.lock().of(name) != range;
        let has_from = |range: VmidRange| {
            self.cache.living_on(name).iter().any(|entry| range.has(entry.sandbox.vmid))
        };
        let is_used = is_new && range.is_some_and(has_from);
        let touched = self.vmids.lock().told(name, range, is_used);
        self.note_overlaps(touched);
    }

    /// Has placement know which of these nodes share vmids with an earlier one.
    fn note_overlaps(&self, touched: BTreeSet<NodeName>) {
        for name in touched {
            let mut fleet = self.fleet.lock();
            let Some(slot) = fleet.find(&name) else { continue };
            let overlap = self.vmids.lock().overlap(&name);
            let was_held_back = fleet.view(slot).vmids_overlap;
            fleet.set_vmids_overlap(slot, overlap.is_some());
            drop(fleet);
            match overlap {
                Some(overlap) if !was_held_back => tracing::error!(
                    node = %name, %overlap, "node shares vmids with another one and gets no new sandboxes"
                ),
                None if was_held_back => {
                    tracing::info!(node = %name, "no other node has the node's vmids any more");
                }
                Some(_) | None => {}
            }
        }
    }

    /// Marks a node as up or down; returns true when that is a change.
    pub(super) fn set_down(&self, node: &Node, down: Option<String>) -> bool {
        self.fleet.lock().set_down(node.slot, down.is_some());
        node.set_down(down)
    }

    /// Records a report. `streamed`: it came over the watch, in order.
    pub(super) fn reported(&self, node: &Node, load: NodeLoad, streamed: bool) {
        let (disks, edits): (Vec<(String, u32)>, Vec<ConfigEdit>) = {
            // Both under one lock, so that the later of two reports ends in both places.
            let mut fleet = self.fleet.lock();
            let mut state = node.state.lock();
            let newer = state.report.as_ref().is_none_or(|(last, _)| load.seq > last.seq);
            if !(newer || streamed && state.first_report) {
                return;
            }
            let first = streamed && std::mem::replace(&mut state.first_report, false);
            fleet.reported(node.slot, &load, self.now_ms(), first);
            let snapshots = load.snapshots.iter();
            let disks = snapshots.map(|snapshot| (snapshot.clone(), fleet.disk_gib(snapshot)));
            let disks = disks.collect();
            let (state, now) = (&mut *state, Instant::now());
            let before = state.report.as_ref().map(|(before, _)| before);
            let edits = Self::new_edits(&mut state.edits_logged, before, &load, now);
            state.report = Some((load, now));
            (disks, edits)
        };
        self.log_put_back(node, edits);
        self.cache.note_snapshot_disks(disks.into_iter());
        self.announce();
    }

    /// Opens the circuit breaker of a node: a call that only needs its agent got no answer, so the
    /// node gets no new work for a while.
    pub fn trip(&self, node: &Node) {
        self.fleet.lock().trip(node.slot, self.now_ms());
    }

    /// Fences this controller when a node refused its epoch: a later controller is in charge.
    pub fn fence_if_replaced(&self, error: &Error) {
        if error.reason() == Some(proto::Reason::StaleEpoch) {
            self.epoch.fence();
        }
    }

    /// Returns the state of all nodes for operators.
    pub fn statuses(&self) -> Vec<NodeStatus> {
        let (now, now_ms) = (Instant::now(), self.now_ms());
        let status = |node: Arc<Node>| {
            let view = *self.fleet.lock().view(node.slot);
            let state = node.state.lock();
            let report = state.report.as_ref().map(|(load, at)| (load.clone(), now - *at));
            let (down, version) = (state.down.clone(), state.version.clone());
            drop(state);
            let age = report.as_ref().map(|(_, age)| *age);
            let not_ready = match (down, age) {
                (Some(why), _) => Some(why),
                (None, None) => Some("it has not reported yet".into()),
                (None, Some(age)) if age.as_millis() > u128::from(placement::STALE_MS) => {
                    Some(format!("last reported {} s ago", age.as_secs()))
                }
                (None, Some(_)) if view.breaker_open(now_ms) => {
                    Some("it let a call time out a moment ago".into())
                }
                (None, Some(_)) => {
                    self.vmids.lock().overlap(&node.name).map(|overlap| overlap.to_string())
                }
            };
            NodeStatus {
                name: node.name.clone(),
                address: node.address.clone(),
                not_ready,
                version,
                report,
                sandboxes: self.cache.count_on(&node.name),
                certificate: self.certificates.shown(&node.name),
            }
        };
        self.all().into_iter().map(status).collect()
    }
}

/// Returns the nodes that have refused or failed a creation, as far as that still counts.
fn prior_outcomes(
    fleet: &Fleet,
    history: &AttemptHistory,
    now: Instant,
) -> Vec<(u32, PriorOutcome)> {
    let failed = history.failed.keys().map(|name| (name, PriorOutcome::Failed));
    let refused = history.refused.iter().filter(|(_, (until, _))| now < *until);
    let all = failed.chain(refused.map(|(name, _)| (name, PriorOutcome::Refused)));
    all.filter_map(|(name, before)| Some((fleet.find(name)?, before))).collect()
}
