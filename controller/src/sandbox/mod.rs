//! Sandboxes of all nodes: the only entrance to the domain, one file per operation. Uses neither
//! tonic nor SQL: nodes are called through `node`, durable state goes to `store`.
//!
//! A node reports a sandbox as a message of the public API, which is kept without translation.

mod adopt;
mod control_exec;
mod cordon;
mod create;
mod creation;
mod delete;
mod drain;
mod events;
mod exec;
mod exec_command;
mod explain;
mod expose;
mod files;
mod forget_node;
mod fsck;
mod garbage;
mod lifetime;
mod list;
mod pause;
mod place;
mod prune;
mod recover;
mod release;
mod session;
mod snapshots;
mod start;
mod startup;
mod stop;
mod usage;
mod wake_on;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::{
    Reason,
    id::{Invalid, SandboxId, SandboxRef},
    name::{NodeName, Preset, Team},
    sandbox::v1::{EventKind, Failure, Phase, Sandbox},
    spec::Size,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clock::{Clock, Random},
    events::{self as log, Log},
    node::{self, Entry, Node, Nodes},
    store::{self, Event, Store},
};

pub use events::{EventItem, EventQuery};
pub use exec::Responses;
pub use exec_command::Output;
pub use files::Piece;
pub use fsck::Report;
pub use list::Page;

/// Longest call to a node, so that no call of ours is silent for more than 20 s.
const WAIT: Duration = Duration::from_secs(15);
/// Longest wait that a caller may ask for.
pub const WAIT_MAX: Duration = Duration::from_secs(20);
/// Longest time that an answer waits for the event log.
const LOGGED: Duration = Duration::from_secs(2);
/// Retry hint while a node does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// Authenticated caller.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Team of the token, which decides what the caller sees.
    pub team: Team,
    /// Public id of the token, for the event log.
    pub token: String,
}

/// Failure of an operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Machine-readable reason.
    pub reason: Reason,
    /// Message for people; says what to do where it can.
    pub message: String,
    /// Field of the request that is wrong.
    pub field: Option<&'static str>,
    /// Time after which to try again.
    pub retry_after: Option<Duration>,
    /// Sandbox of the error, where the caller might not know it yet.
    pub sandbox_id: Option<String>,
}

impl Error {
    /// Creates an error with a reason and a message.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), field: None, retry_after: None, sandbox_id: None }
    }

    /// Adds a retry hint.
    #[must_use]
    pub fn retry(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    fn not_found(id: &SandboxRef) -> Self {
        Self::new(Reason::SandboxNotFound, format!("there is no sandbox {id} in this team"))
    }

    fn unreachable(node: &NodeName, why: &str) -> Self {
        Self::new(Reason::NodeUnreachable, format!("node {node} does not answer: {why}"))
            .retry(RETRY)
    }

    fn of_failure(sandbox: &Sandbox, failure: &Failure) -> Self {
        let mut message = failure.message.clone();
        if !failure.rollback.is_empty() {
            message = format!("{message} (rollback: {})", failure.rollback);
        }
        Self { sandbox_id: Some(sandbox.id.clone()), ..Self::new(failure.reason(), message) }
    }
}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        let mut error = Self::new(Reason::FieldInvalid, invalid.to_string());
        error.field = Some(invalid.what);
        error
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Failed(_) => {
                tracing::error!(%error, "the store failed");
                let message = "the controller's store failed; see its log";
                Self::new(Reason::StoreFailed, message).retry(RETRY)
            }
            store::Error::Replaced => replaced(),
        }
    }
}

fn replaced() -> Error {
    Error::new(Reason::StaleEpoch, "a later controller is in charge; ask that one")
}

/// Bounds of creations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Most creations under way at once.
    pub creates_max: usize,
    /// Most of those that may wait for capacity.
    pub queue_max: usize,
    /// Longest wait of a creation for capacity.
    pub queue: Duration,
    /// Time for which a node that stopped answering is asked before another is tried.
    pub patience: Duration,
    /// Time after which a creation that is not up yet is cancelled.
    pub deadline: Duration,
    /// Number of the best nodes that are asked for a reservation before one is chosen; 1 asks none.
    pub bids: usize,
    /// Sizes by name.
    pub sizes: BTreeMap<Preset, Size>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            creates_max: 2048,
            queue_max: 512,
            queue: Duration::from_secs(120),
            patience: Duration::from_secs(60),
            deadline: Duration::from_secs(600),
            bids: 1,
            sizes: BTreeMap::new(),
        }
    }
}

/// Domain service: every operation on sandboxes and nodes.
#[derive(Debug)]
pub struct Sandboxes {
    nodes: Arc<Nodes>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    options: Options,
    /// Retention of the event log.
    kept: log::Options,
    /// Lock of the log writer.
    writing: tokio::sync::Mutex<()>,
    /// Creations under way; cancelling the token cancels the creation.
    jobs: Mutex<BTreeMap<SandboxId, CancellationToken>>,
    creates: Arc<Semaphore>,
    queue: Semaphore,
    started: Instant,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Sandboxes {
    /// Loads the store's sandboxes and continues the creations that were under way.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn start_up(
        nodes: Arc<Nodes>,
        store: Arc<dyn Store>,
        (options, kept): (Options, log::Options),
        (clock, random): (Arc<dyn Clock>, Arc<dyn Random>),
        (tasks, stop): (TaskTracker, CancellationToken),
    ) -> Result<Arc<Self>, store::Error> {
        let sandboxes = Arc::new(Self {
            nodes,
            store,
            clock,
            random,
            jobs: Mutex::default(),
            creates: Arc::new(Semaphore::new(options.creates_max)),
            queue: Semaphore::new(options.queue_max),
            options,
            kept,
            writing: tokio::sync::Mutex::default(),
            started: Instant::now(),
            tasks,
            stop,
        });
        sandboxes.resume().await?;
        Ok(sandboxes)
    }

    /// Returns all nodes, for operators.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Finds a sandbox of the team, by any form of its name. Those of other teams do not exist.
    fn find(&self, team: &Team, id: &str) -> Result<Entry, Error> {
        let name: SandboxRef = id.parse()?;
        self.nodes
            .cache
            .get(&name)
            .filter(|entry| entry.team == *team)
            .ok_or_else(|| Error::not_found(&name))
    }

    /// Finds a sandbox that is neither being created nor deleted, with its node.
    fn on_node(&self, team: &Team, id: &str) -> Result<(Entry, Arc<Node>), Error> {
        let entry = self.find(team, id)?;
        if entry.creating {
            return Err(Error::new(
                Reason::SandboxNotRunning,
                format!("{} is still being created; watch it and try again", entry.id),
            )
            .retry(RETRY));
        }
        if entry.ended() {
            return Err(Error::new(Reason::SandboxDeleted, format!("{} is deleted", entry.id)));
        }
        let node = self.reachable(&entry)?;
        Ok((entry, node))
    }

    fn reachable(&self, entry: &Entry) -> Result<Arc<Node>, Error> {
        let name = entry
            .node
            .as_ref()
            .ok_or_else(|| Error::new(Reason::Invariant, format!("{} is on no node", entry.id)))?;
        let node = self
            .nodes
            .get(name)
            .ok_or_else(|| Error::unreachable(name, "it is not in the configuration any more"))?;
        match node.down() {
            Some(why) => Err(Error::unreachable(name, &why)),
            None => Ok(node),
        }
    }

    /// Turns an agent's refusal or missing answer into an error for the caller.
    fn of_node(&self, node: &Node, error: node::Error) -> Error {
        self.nodes.noticed(&error);
        match error {
            node::Error::Refused { reason, message, retry_after } => {
                let known = (reason != Reason::Unspecified).then_some(reason);
                let reason = known.unwrap_or(Reason::Invariant);
                let message = format!("node {}: {message}", node.name);
                Error { retry_after, ..Error::new(reason, message) }
            }
            node::Error::Unreachable(why) => Error::unreachable(&node.name, &why),
            node::Error::Unknown(ref why) | node::Error::Silent(ref why) => {
                if matches!(error, node::Error::Silent(_)) {
                    self.nodes.trip(node);
                }
                let message = format!(
                    "node {} did not answer in time, it may have done it or not; try again: {why}",
                    node.name
                );
                Error::new(Reason::OutcomeUnknown, message).retry(RETRY)
            }
            node::Error::Nonsense(why) => {
                tracing::error!(node = %node.name, why, "agent sent an invalid answer");
                Error::new(Reason::Invariant, format!("node {} answered nonsense", node.name))
            }
        }
    }

    fn log(&self) -> &Log {
        &self.nodes.log
    }

    /// Records a requested change before its node receives it. `asked` is the event for that, if
    /// there is one; `effects` are the kinds of events that will be attributed to the caller.
    fn wanted(
        &self,
        caller: &Caller,
        entry: &Entry,
        asked: Option<EventKind>,
        effects: &[EventKind],
    ) {
        self.log().ask(entry.id, effects, &caller.token);
        if let Some(kind) = asked {
            self.log().append(Event {
                sandbox: Some(entry.id),
                team: Some(entry.team.clone()),
                node: entry.node.clone(),
                ..self.log().event(kind, &caller.token)
            });
        }
    }

    /// Finishes a successful change: returns the known state, which is at least as new as the
    /// node's answer. The change is logged before the caller gets the answer.
    async fn changed(
        &self,
        entry: &Entry,
        node: &Node,
        effects: &[EventKind],
        answer: Sandbox,
    ) -> Sandbox {
        self.nodes.apply(&node.name, answer.clone());
        let under_way = [Phase::Creating, Phase::Starting, Phase::Stopping, Phase::Deleting];
        if !under_way.contains(&answer.phase()) {
            self.log().unask(&entry.id, effects);
        }
        self.written().await;
        self.view(&entry.id).unwrap_or(answer)
    }

    /// Waits for the event log, but a slow log does not hold back an answer.
    async fn written(&self) {
        if !matches!(timeout(LOGGED, self.log().flushed()).await, Ok(Ok(()))) {
            tracing::error!("call answered before its events were stored");
        }
    }

    /// Finishes a change that failed.
    async fn unchanged(
        &self,
        entry: &Entry,
        node: &Node,
        effects: &[EventKind],
        error: node::Error,
    ) -> Error {
        if matches!(error, node::Error::Refused { .. } | node::Error::Unreachable(_)) {
            self.log().unask(&entry.id, effects);
        }
        self.written().await;
        self.of_node(node, error)
    }

    fn view(&self, id: &SandboxId) -> Option<Sandbox> {
        let cache = &self.nodes.cache;
        cache.get(&SandboxRef::Id(*id)).map(|entry| cache.view(&entry))
    }

    /// Checks that this controller may make changes.
    fn may_change(&self) -> Result<(), Error> {
        if self.nodes.epoch.fenced() {
            return Err(replaced());
        }
        if self.stop.is_cancelled() {
            return Err(Error::new(Reason::ShuttingDown, "the controller is stopping").retry(RETRY));
        }
        Ok(())
    }
}
