//! The nodes that the controller knows, their health and their load.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::{
    agent::v1::Member,
    id::{SandboxId, SandboxRef},
    name::{NodeName, Team},
    sandbox::v1::{EventKind, NodeLoad, Phase, Sandbox},
    spec::Spec,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Cache, Client, Connector, Entry, Error, epoch::Epoch, link};
use crate::{
    clock::{Clock, Random},
    events::{self, Log, Source},
    placement::{self, Ask, Decided, Decision, ExplainText, Fleet, Limits, Look, PriorOutcome},
    store::{self, Event, Store},
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

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Name of the node.
    pub name: NodeName,
    /// Address of the agent.
    pub address: String,
    /// Calls to the agent.
    pub client: Client,
    /// Index in the fleet.
    slot: u32,
    state: Mutex<State>,
    /// Cancelled when the watch on it ends.
    given_up: CancellationToken,
}

#[derive(Debug)]
struct State {
    /// Reason why it is down; `None` when it is connected and its inventory is whole.
    down: Option<String>,
    version: String,
    /// Journal of its revisions, from the last connection.
    journal_id: Arc<str>,
    /// Journal and revision from which a watch can resume.
    journal: Option<(String, u64)>,
    report: Option<(NodeLoad, Instant)>,
    /// No report has come over this connection yet.
    first_report: bool,
    /// Stale attempts that it holds because the store with their pending cancels was lost.
    void: BTreeMap<SandboxId, u32>,
    /// Sandboxes that moved to other nodes, with the target: it must drop its records of them.
    moved: BTreeMap<SandboxId, NodeName>,
    /// Whether its inventory was whole at least once.
    heard: bool,
    /// Whether it has answered us before; a higher epoch there then means that we were replaced.
    met: bool,
}

/// State of a node for operators.
#[derive(Debug, Clone)]
pub struct NodeStatus {
    /// Name of the node.
    pub name: NodeName,
    /// Address of the agent.
    pub address: String,
    /// Reason why it gets no new work; `None` when it does.
    pub not_ready: Option<String>,
    /// Version of its agent; empty before the first contact.
    pub version: String,
    /// Last report and its age.
    pub report: Option<(NodeLoad, Duration)>,
    /// Number of living sandboxes on it.
    pub sandboxes: u32,
}

impl Node {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns why it cannot be called now; `None` when it can.
    pub fn down(&self) -> Option<String> {
        self.state().down.clone()
    }

    pub(super) fn journal(&self) -> Option<(String, u64)> {
        self.state().journal.clone()
    }

    pub(super) fn set_journal(&self, journal: Option<(String, u64)>) {
        self.state().journal = journal;
    }

    fn connected(&self, version: &str, journal_id: &str) -> bool {
        let mut state = self.state();
        version.clone_into(&mut state.version);
        state.journal_id = journal_id.into();
        state.first_report = true;
        std::mem::replace(&mut state.met, true)
    }

    /// Takes one stale attempt that must be cancelled on it.
    pub(super) fn void(&self) -> Option<(SandboxId, u32)> {
        self.state().void.pop_first()
    }

    /// Returns the sandboxes that it must drop, with the nodes that have imported them.
    pub(super) fn moved(&self) -> BTreeMap<SandboxId, NodeName> {
        self.state().moved.clone()
    }

    /// Records that it has dropped a sandbox.
    pub(super) fn has_left(&self, id: &SandboxId) {
        self.state().moved.remove(id);
    }

    fn set_down(&self, down: Option<String>) -> bool {
        let mut state = self.state();
        let changed = state.down.is_some() != down.is_some();
        state.heard |= down.is_none();
        state.down = down;
        changed
    }
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
    /// Fencing number.
    pub epoch: Epoch,
    /// Event log.
    pub log: Log,
    pub(super) store: Arc<dyn Store>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Arc<dyn Random>,
    options: Options,
    connector: Arc<dyn Connector>,
    nodes: Mutex<BTreeMap<NodeName, Arc<Node>>>,
    /// Forgotten nodes. They are used again when they are online again.
    forgotten: Mutex<BTreeSet<NodeName>>,
    /// Nodes as placement sees them. Locked before `nodes`, and that before a node's state.
    fleet: Mutex<Fleet>,
    /// Zero of the time stamps of reports.
    born: Instant,
    news: watch::Sender<u64>,
    /// Cancelled once the cache is loaded. Node watches wait for it; otherwise every reported
    /// sandbox would look new.
    recalled: CancellationToken,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Nodes {
    /// Starts a watch on every node that is configured or stored. The watches wait for `recalled`.
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
            epoch: Epoch::start(store.clone()).await?,
            log: Log::new(clock.clone()),
            store: store.clone(),
            clock,
            random,
            options,
            connector,
            nodes: Mutex::default(),
            forgotten: Mutex::new(store.forgotten_nodes().await?.into_iter().collect()),
            fleet: Mutex::new(fleet),
            born: Instant::now(),
            news: watch::channel(0).0,
            recalled: CancellationToken::new(),
            tasks,
            stop,
        });
        for (name, address) in nodes.options.seeds.clone() {
            nodes.add(&name, &address);
        }
        if nodes.options.discover {
            for (name, address) in nodes.store.nodes().await? {
                nodes.add(&name, &address);
            }
        }
        Ok(nodes)
    }

    fn add(self: &Arc<Self>, name: &NodeName, address: &str) {
        let mut fleet = self.fleet();
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.contains_key(name) {
            return;
        }
        let client = match Client::new(self.connector.clone(), name, address) {
            Ok(client) => client,
            Err(error) => {
                tracing::error!(node = %name, address, %error, "address of a node can never work");
                return;
            }
        };
        let node = Arc::new(Node {
            name: name.clone(),
            address: address.to_owned(),
            client,
            slot: fleet.add(name.clone()),
            state: Mutex::new(State {
                down: Some("not connected yet".into()),
                version: String::new(),
                journal_id: "".into(),
                journal: None,
                report: None,
                first_report: true,
                void: BTreeMap::new(),
                moved: BTreeMap::new(),
                heard: false,
                met: false,
            }),
            given_up: self.stop.child_token(),
        });
        nodes.insert(name.clone(), node.clone());
        let (this, stop) = (self.clone(), node.given_up.clone());
        self.tasks.spawn(async move {
            let listen = Box::pin(async move {
                this.recalled.cancelled().await;
                link::keep(this, node).await;
            });
            stop.run_until_cancelled_owned(listen).await;
        });
    }

    /// Adds the members of an agent's cluster when discovery is on.
    pub(super) async fn discovered(self: &Arc<Self>, members: &[Member]) {
        if !self.options.discover {
            return;
        }
        for member in members.iter().filter(|member| !member.ip.is_empty()) {
            let Ok(name) = member.node.parse::<NodeName>() else { continue };
            let given_up = self.forgotten().contains(&name) && !member.online;
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

    fn forgotten(&self) -> MutexGuard<'_, BTreeSet<NodeName>> {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true when no node is known.
    pub fn is_empty(&self) -> bool {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Returns a node whose inventory or load this controller has not received since its start. A
    /// report alone, which comes with the answer to any creation, does not include the inventory.
    pub fn unheard(&self) -> Option<NodeName> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let unheard = |node: &&Arc<Node>| {
            let state = node.state();
            !state.heard || state.report.is_none()
        };
        nodes.values().find(unheard).map(|node| node.name.clone())
    }

    /// Returns true for a node in the configuration.
    pub fn is_configured(&self, name: &NodeName) -> bool {
        self.options.seeds.iter().any(|(seed, _)| seed == name)
    }

    /// Forgets a node and ends the sandboxes on it. The store is written first: after a crash in
    /// between, a repeated call ends the rest.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn forget(&self, name: &NodeName) -> Result<(), store::Error> {
        self.store.forget_node(name).await?;
        self.forgotten().insert(name.clone());
        let node = self.nodes.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        if let Some(node) = node {
            self.fleet().remove(node.slot);
            node.given_up.cancel();
        }
        self.cache.set_up(name, false);
        let news = |old: &Entry, new: &Entry| {
            let told = Source { id: new.id, team: &new.team, node: name, journal: "" };
            self.log.observe(&told, Some(&old.sandbox), &new.sandbox);
        };
        self.cache.give_up(name, self.clock.now_ms(), news);
        self.announce();
        Ok(())
    }

    /// Starts the watches: the cache holds what the store knows.
    pub fn recalled(&self) {
        self.recalled.cancel();
    }

    /// Returns one node.
    pub fn get(&self, name: &NodeName) -> Option<Arc<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Returns all nodes, by name.
    pub fn all(&self) -> Vec<Arc<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Returns a counter that increases when a node reports, comes or goes.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    pub(super) fn announce(&self) {
        self.news.send_modify(|news| *news += 1);
    }

    fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since `born`, which reports are stamped with.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
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
        tried: &AttemptHistory,
        among: Option<&[NodeName]>,
    ) -> Decision {
        let (now, now_ms) = (Instant::now(), self.now_ms());
        let decided_ms = self.clock.now_ms();
        let look = if id.is_some() { Look::default() } else { Look::All };
        let mut fleet = self.fleet();
        if let Some(id) = &id {
            fleet.release(id);
        }
        let met = met(&fleet, tried, now);
        // An unknown name matches no node.
        let wish = spec.node.as_ref().map(|name| fleet.find(name).unwrap_or(u32::MAX));
        let among: Option<Vec<u32>> =
            among.map(|nodes| nodes.iter().filter_map(|name| fleet.find(name)).collect());
        let among = among.as_deref();
        let names = fleet.names();
        let (choice, size, holders, verdicts) = self.cache.of_team(team, |count| {
            let team = |node: u32| names.get(node as usize).map_or(0, count);
            let ask = Ask {
                size: spec.size,
                network: spec.network,
                wish,
                affinity: fleet.affinity(&spec.labels),
                met: &met,
                team: &team,
            };
            let snapshot = &spec.snapshot;
            let choice = match among {
                None => fleet.choose(snapshot, &ask, look, now_ms),
                Some(nodes) => fleet.choose_among(snapshot, &ask, nodes, now_ms),
            };
            let decided = Decided { snapshot, ask: &ask, choice: &choice, look, among };
            let words = |node: u32| self.words(fleet.name(node), tried);
            let verdicts = fleet.explain(&decided, now_ms, &words);
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

    /// Returns what is known about a node that refused, failed or is down, for the explanation.
    fn words(&self, name: &NodeName, tried: &AttemptHistory) -> ExplainText {
        ExplainText {
            down: self.get(name).and_then(|node| node.down()),
            refused: tried.refused.get(name).map(|(_, why)| why.clone()),
            failed: tried.failed.get(name).cloned(),
        }
    }

    /// Drops the reservation of a creation that is on no node any more.
    pub fn release(&self, id: &SandboxId) {
        self.fleet().release(id);
    }

    /// Records that a node took a creation; `load` was measured after that.
    pub fn admitted(&self, node: &Node, id: &SandboxId, load: Option<NodeLoad>) {
        let seq = load.as_ref().map_or(0, |load| load.seq);
        let mut fleet = self.fleet();
        fleet.answered(node.slot);
        fleet.admitted(id, seq);
        drop(fleet);
        if let Some(load) = load {
            self.reported(node, load, false);
        }
    }

    /// Records the load that came with an answer.
    pub fn heard(&self, node: &Node, load: Option<NodeLoad>) {
        if let Some(load) = load {
            self.reported(node, load, false);
        }
    }

    /// Records a new connection; returns true when it is not this controller's first.
    pub(super) fn connected(&self, node: &Node, version: &str, journal_id: &str) -> bool {
        // The agent has just answered, so the earlier problem was the connection.
        self.fleet().answered(node.slot);
        node.connected(version, journal_id)
    }

    /// Marks a node as up or down; returns true when that is a change.
    pub(super) fn set_down(&self, node: &Node, down: Option<String>) -> bool {
        self.fleet().set_down(node.slot, down.is_some());
        node.set_down(down)
    }

    /// Records a report. `streamed`: it came over the watch, in order.
    pub(super) fn reported(&self, node: &Node, load: NodeLoad, streamed: bool) {
        {
            // Both under one lock, so that the later of two reports ends in both places.
            let mut fleet = self.fleet();
            let mut state = node.state();
            let newer = state.report.as_ref().is_none_or(|(last, _)| load.seq > last.seq);
            if !(newer || streamed && state.first_report) {
                return;
            }
            let first = streamed && std::mem::replace(&mut state.first_report, false);
            fleet.reported(node.slot, &load, self.now_ms(), first);
            state.report = Some((load, Instant::now()));
        }
        self.announce();
    }

    /// Opens the circuit breaker of a node: a call that only needs its agent got no answer, so the
    /// node gets no new work for a while.
    pub fn trip(&self, node: &Node) {
        self.fleet().trip(node.slot, self.now_ms());
    }

    /// Fences this controller when a node refused its epoch: a later controller is in charge.
    pub fn noticed(&self, error: &Error) {
        if error.reason() == Some(proto::Reason::StaleEpoch) {
            self.epoch.fence();
        }
    }

    /// Applies a node's report of a sandbox, from the watch or from an answer.
    pub fn apply(&self, node: &NodeName, sandbox: Sandbox) {
        let (id, attempt) = (sandbox.id.clone(), sandbox.attempt);
        let known = self.get(node);
        let journal =
            known.as_ref().map(|known| known.state().journal_id.clone()).unwrap_or_default();
        let news = |old: Option<&Entry>, new: &Entry| {
            let told = Source { id: new.id, team: &new.team, node, journal: &journal };
            // A lost sandbox that reappears alive counts as found; one that has ended has ended.
            // The end of another attempt is not a former state of this one.
            let old = old.filter(|old| !old.lost || new.ended());
            let old = old.filter(|old| !old.ended() || old.sandbox.attempt == new.sandbox.attempt);
            self.log.observe(&told, old.map(|old| &old.sandbox), &new.sandbox);
        };
        match self.cache.apply(node, sandbox, self.clock.now_ms(), news) {
            super::cache::Applied::Changed | super::cache::Applied::Known => {}
            super::cache::Applied::Replaced(left, attempt) => {
                tracing::warn!(node = %left, sandbox_id = id, attempt,
                    "later attempt of a sandbox came up elsewhere");
                if let (Some(left), Ok(id)) = (self.get(&left), id.parse()) {
                    left.state().void.insert(id, attempt);
                }
            }
            super::cache::Applied::Moved { left, to } => {
                tracing::warn!(node = %left, sandbox_id = id, %to, "sandbox moved to another node");
                if let (Some(left), Ok(id)) = (self.get(&left), id.parse()) {
                    left.state().moved.insert(id, to);
                }
            }
            super::cache::Applied::Stray => {
                tracing::debug!(%node, sandbox_id = id, "ignored a stale attempt");
            }
            super::cache::Applied::Void => {
                tracing::warn!(%node, sandbox_id = id, attempt, "node holds a stale attempt");
                if let (Some(known), Ok(id)) = (known, id.parse()) {
                    known.state().void.insert(id, attempt);
                }
            }
            super::cache::Applied::Malformed => {
                tracing::warn!(%node, sandbox_id = id, "ignored a sandbox with a malformed identity");
            }
        }
    }

    /// Ends a creation on this node and logs what the node has reported since.
    pub fn settle(&self, id: &SandboxId, sandbox: Sandbox) {
        let since = |entry: &Entry, sandbox: &Sandbox| {
            let Some(node) = entry.node.as_ref().and_then(|name| self.get(name)) else { return };
            let journal = node.state().journal_id.clone();
            let told =
                Source { id: entry.id, team: &entry.team, node: &node.name, journal: &journal };
            self.log.observe(&told, Some(sandbox), &entry.sandbox);
        };
        let later = self.cache.settle(id, sandbox, self.clock.now_ms(), since);
        if let Some(later) = later
            && let Ok(node) = later.node.parse()
        {
            self.apply(&node, *later);
        }
    }

    /// Returns the events of what the node did after a creation came up.
    pub fn came_up(&self, id: SandboxId, team: &Team, sandbox: &Sandbox) -> Vec<Event> {
        let node = sandbox.node.parse().ok().and_then(|name| self.get(&name));
        let Some(node) = node else { return Vec::new() };
        let journal = node.state().journal_id.clone();
        let told = Source { id, team, node: &node.name, journal: &journal };
        let mut up = Sandbox { failure: None, ..sandbox.clone() };
        up.set_phase(Phase::Running);
        self.log.meaning(&told, Some(&up), sandbox)
    }

    /// Ends a node's inventory and logs the sandboxes that are missing in it as lost.
    pub(super) fn end_inventory(&self, node: &Node) {
        let journal = node.state().journal_id.clone();
        for entry in self.cache.end_inventory(&node.name) {
            tracing::error!(node = %node.name, sandbox_id = %entry.id,
                "sandbox lost: its node does not know it any more");
            let told =
                Source { id: entry.id, team: &entry.team, node: &node.name, journal: &journal };
            self.log.lost(&told);
        }
    }

    /// Logs that a node went down or came up.
    pub(super) fn turned(&self, node: &Node, up: bool, detail: String) {
        let kind = if up { EventKind::NodeUp } else { EventKind::NodeDown };
        let node = Some(node.name.clone());
        self.log.append(Event { node, detail, ..self.log.event(kind, events::CONTROLLER) });
    }

    /// Logs that a node has cancelled an attempt, before the pending cancel is removed.
    pub(super) async fn called_off(
        &self,
        node: &Node,
        id: &SandboxId,
        attempt: u32,
        held: Option<&Sandbox>,
    ) -> Result<(), store::Error> {
        let kind = EventKind::AttemptCalledOff;
        let team = self.cache.get(&SandboxRef::Id(*id)).map(|entry| entry.team);
        let left = if held.is_some() { "it is undone" } else { "the node had not heard of it" };
        self.log.append(Event {
            sandbox: Some(*id),
            team: team.or_else(|| held.and_then(|held| held.team.parse().ok())),
            node: Some(node.name.clone()),
            detail: format!("attempt {attempt} was cancelled; {left}"),
            node_revision: held.map_or(0, |held| held.revision),
            once: Some(format!("{id} {attempt} {}", kind.as_str_name())),
            ..self.log.event(kind, events::CONTROLLER)
        });
        self.log.flushed().await
    }

    /// Returns the state of all nodes for operators.
    pub fn statuses(&self) -> Vec<NodeStatus> {
        let (now, now_ms) = (Instant::now(), self.now_ms());
        let status = |node: Arc<Node>| {
            let view = *self.fleet().view(node.slot);
            let state = node.state();
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
                (None, Some(_)) => None,
            };
            NodeStatus {
                name: node.name.clone(),
                address: node.address.clone(),
                not_ready,
                version,
                report,
                sandboxes: self.cache.on(&node.name),
            }
        };
        self.all().into_iter().map(status).collect()
    }
}

/// Returns the nodes that have refused or failed a creation, as far as that still counts.
fn met(fleet: &Fleet, tried: &AttemptHistory, now: Instant) -> Vec<(u32, PriorOutcome)> {
    let failed = tried.failed.keys().map(|name| (name, PriorOutcome::Failed));
    let refused = tried.refused.iter().filter(|(_, (until, _))| now < *until);
    let all = failed.chain(refused.map(|(name, _)| (name, PriorOutcome::Refused)));
    all.filter_map(|(name, before)| Some((fleet.find(name)?, before))).collect()
}
