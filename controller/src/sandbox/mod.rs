//! The sandboxes of all nodes: the one door of the domain, one file an operation. It knows neither
//! tonic nor SQL; nodes are reached through `node`, what must outlive a restart goes to `store`.
//!
//! What a node says of a sandbox is the message of the public API, kept as data: there is nothing
//! in between to translate.

mod adopt;
mod control_exec;
mod cordon;
mod create;
mod delete;
mod events;
mod exec;
mod exec_command;
mod explain;
mod expose;
mod files;
mod forget_node;
mod fsck;
mod garbage;
mod job;
mod lifetime;
mod list;
mod move_away;
mod pause;
mod place;
mod prune;
mod recover;
mod release;
mod resume;
mod session;
mod snapshots;
mod start;
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

pub use events::{Said, Wanted};
pub use exec::Responses;
pub use exec_command::Output;
pub use files::Piece;
pub use fsck::Report;
pub use list::Page;

/// How long a call to a node may take, so that no call of ours is silent for more than 20 s.
const WAIT: Duration = Duration::from_secs(15);
/// Longest wait that a caller may ask for.
pub const WAIT_MAX: Duration = Duration::from_secs(20);
/// How long an answer waits for the log.
const LOGGED: Duration = Duration::from_secs(2);
/// When to try a node again that does not answer.
const RETRY: Duration = Duration::from_secs(2);

/// Who calls.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The token's team: what it may see.
    pub team: Team,
    /// The token's public id: who did it.
    pub token: String,
}

/// Why an operation did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What a caller branches on.
    pub reason: Reason,
    /// A sentence that says what to do, where it can.
    pub message: String,
    /// Field of the request that is wrong.
    pub field: Option<&'static str>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// Sandbox that it is about, where the caller might not know it yet.
    pub sandbox_id: Option<String>,
}

impl Error {
    /// With a reason and a sentence.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), field: None, retry_after: None, sandbox_id: None }
    }

    /// With a hint when to try again.
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
    /// Under way at once.
    pub creates_max: usize,
    /// Of those, waiting for room.
    pub queue_max: usize,
    /// How long one waits for room.
    pub queue: Duration,
    /// How long a node that stopped answering in mid-create is asked before another is tried.
    pub patience: Duration,
    /// After this a creation that has not come up is called off.
    pub deadline: Duration,
    /// So many of the best nodes are asked for a seat before one of them is chosen; 1 asks none.
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

/// The door.
#[derive(Debug)]
pub struct Sandboxes {
    nodes: Arc<Nodes>,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    options: Options,
    /// How much is kept of the log.
    kept: log::Options,
    /// Held by who writes the log.
    writing: tokio::sync::Mutex<()>,
    /// Creations under way; cancelling one calls it off.
    jobs: Mutex<BTreeMap<SandboxId, CancellationToken>>,
    creates: Arc<Semaphore>,
    queue: Semaphore,
    started: Instant,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Sandboxes {
    /// Recalls what the store remembers and goes on with the creations that were under way.
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

    /// All nodes, for operators.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// A sandbox of the team, by any form of its name. Another team's does not exist.
    fn find(&self, team: &Team, id: &str) -> Result<Entry, Error> {
        let name: SandboxRef = id.parse()?;
        self.nodes
            .cache
            .get(&name)
            .filter(|entry| entry.team == *team)
            .ok_or_else(|| Error::not_found(&name))
    }

    /// A sandbox that exists, with the node that it is on.
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

    /// An agent's refusal, or its silence, in our words.
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
                tracing::error!(node = %node.name, why, "an agent answered nonsense");
                Error::new(Reason::Invariant, format!("node {} answered nonsense", node.name))
            }
        }
    }

    fn log(&self) -> &Log {
        &self.nodes.log
    }

    /// A caller wants a change; said before its node hears of it. `asked` is the event for that,
    /// where there is one; `effects` are the kinds of events that will be the caller's doing.
    fn wanted(
        &self,
        caller: &Caller,
        entry: &Entry,
        asked: Option<EventKind>,
        effects: &[EventKind],
    ) {
        self.log().ask(entry.id, effects, &caller.token);
        if let Some(kind) = asked {
            self.log().say(Event {
                sandbox: Some(entry.id),
                team: Some(entry.team.clone()),
                node: entry.node.clone(),
                ..self.log().event(kind, &caller.token)
            });
        }
    }

    /// After a change: what is known now, which is at least what the node answered. When the caller
    /// hears of it, it is in the log.
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

    /// Waits for the log, but an answer is not held back because the log of it is late.
    async fn written(&self) {
        if !matches!(timeout(LOGGED, self.log().flushed()).await, Ok(Ok(()))) {
            tracing::error!("a call is answered that is not in the log yet");
        }
    }

    /// A change did not come about.
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

    /// A change may be made by this controller.
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
