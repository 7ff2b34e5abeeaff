//! Sandboxes of all nodes: the only entrance to the domain, one file per operation. Uses neither
//! tonic nor SQL: nodes are called through `node`, durable state goes to `store`.
//!
//! A node reports a sandbox as a message of the public API, which is kept without translation.

mod change;
mod create;
mod exec;
mod exposure;
mod files;
mod forward;
mod names;
mod operate;
mod quota;
mod read;
mod retention;
mod startup;

use std::{any::Any, borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use daemon::{keyed_lock::KeyedLock, sync::Mutex};
use proto::{
    Reason,
    id::{Invalid, SandboxId, SandboxRef},
    limits::TeamLimits,
    name::{NodeName, Preset, Team, UserLabel},
    sandbox::v1::{Failure, Sandbox},
    scope::Scopes,
    spec::{Egress, Size},
};
use tokio::time::{Instant, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{change::LostExposures, create::TeamSlots, quota::Quotas};
use crate::{
    clock::{Clock, Random},
    events::{self as log, Log},
    inventory::Entry,
    node::{self, Node, Nodes, Origin, SandboxCalls},
    store::{self, Store},
};

pub(crate) use exec::StdinMemory;
pub use exec::{Output, Responses};
pub use exposure::Exposure;
pub use files::Piece;
pub use forward::{Accepted, Forwarded};
pub use operate::{Outcome, Report, Witness};
pub use quota::{Exceeded, TeamView};
pub use read::{EventItem, EventQuery};

/// Longest call to a node, so that no call of ours is silent for more than 20 s.
const WAIT: Duration = Duration::from_secs(15);
/// Longest wait that a caller may ask for.
pub const WAIT_MAX: Duration = Duration::from_secs(20);
/// Longest time that an answer waits for the event log.
const FLUSH_WAIT: Duration = Duration::from_secs(2);
/// Retry hint while a node does not answer.
const RETRY: Duration = Duration::from_secs(2);
/// Pause after a message of a caller's stream that carries no bytes. Such messages fill nothing, so nothing else would
/// slow down a caller that sends them without an end.
const REST: Duration = Duration::from_millis(10);

/// Place of a call among the calls of its team that are under way, given back when the last clone is dropped.
pub(crate) type Permit = Arc<dyn Any + Send + Sync>;

/// Authenticated caller.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Team of the token, which decides what the caller sees.
    pub team: Team,
    /// Public id of the token, for the event log.
    pub token: String,
    /// Label of the person or program that the token was made for.
    pub user: Option<UserLabel>,
    /// Scopes of the token.
    pub scopes: Scopes,
    /// Permit of the call, which what goes on without its caller keeps; `None` where calls have none.
    pub(crate) permit: Option<Permit>,
}

/// Result of an operation, or of a part of one.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of an operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Machine-readable reason.
    pub reason: Reason,
    /// Message for people; says what to do where it can.
    pub message: String,
    /// Field of the request that is wrong.
    pub field: Option<Cow<'static, str>>,
    /// Time after which to try again.
    pub retry_after: Option<Duration>,
    /// Sandbox of the error, where the caller might not know it yet.
    pub sandbox_id: Option<String>,
    /// Files that were written before one failed.
    pub partial: Option<Box<PartialWrite>>,
    /// Limit of the team that would be exceeded.
    pub exceeded: Option<Box<Exceeded>>,
}

/// Part of several files that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartialWrite {
    /// Number of files that were written before one failed.
    pub files_written: u32,
    /// Path of the file that could not be written.
    pub failed_path: Option<String>,
}

impl Error {
    /// Creates an error with a reason and a message.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            field: None,
            retry_after: None,
            sandbox_id: None,
            partial: None,
            exceeded: None,
        }
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

    /// Builds the error for a call to a revoked node. It has no retry hint: time does not bring the node back.
    fn revoked(node: &NodeName) -> Self {
        let message = format!(
            "node {node} is revoked: it comes back only when it joins again (`sandboxctl node token {node}`); \
             `sandboxctl node forget {node} --lost` gives up its sandboxes"
        );
        Self::new(Reason::NodeRevoked, message)
    }

    fn from_failure(sandbox: &Sandbox, failure: &Failure) -> Self {
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

fn stopping() -> Error {
    Error::new(Reason::ShuttingDown, "the controller is stopping").retry(RETRY)
}

fn replaced() -> Error {
    Error::new(Reason::StaleEpoch, "a later controller is in charge; ask that one")
}

/// Bounds of creations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Most creations under way at once. A team gets a share of them: half, if there is no other.
    pub creates_max: usize,
    /// Most of those that may wait for capacity, shared in the same way.
    pub queue_max: usize,
    /// Longest wait of a creation for capacity.
    pub queue: Duration,
    /// Time for which a node that stopped answering is asked before another is tried.
    pub patience: Duration,
    /// Time after which a creation that is not up yet is cancelled.
    pub deadline: Duration,
    /// Number of the best nodes that are asked for a reservation before one is chosen; 1 asks none.
    pub candidate_probes: usize,
    /// Sizes by name.
    pub sizes: BTreeMap<Preset, Size>,
    /// Reach of a sandbox outside of itself that asks for nothing, as far as its team may.
    pub egress: Egress,
    /// Ports that may be exposed, and who reaches them.
    pub exposure: Exposure,
    /// Limits of each team that has none of its own.
    pub limits: TeamLimits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            creates_max: 4096,
            queue_max: 1024,
            queue: Duration::from_secs(120),
            patience: Duration::from_secs(60),
            deadline: Duration::from_secs(600),
            candidate_probes: 1,
            sizes: BTreeMap::new(),
            egress: Egress::default(),
            exposure: Exposure::default(),
            limits: TeamLimits::default(),
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
    retention: log::Options,
    /// Lock of the log writer.
    writing: tokio::sync::Mutex<()>,
    /// Creations under way; cancelling the token cancels the creation.
    creations: Mutex<BTreeMap<SandboxId, CancellationToken>>,
    /// Slots of creations under way.
    creates: TeamSlots,
    /// Slots of those that wait for capacity.
    queue: TeamSlots,
    /// Slots for writing files of creations.
    writers: TeamSlots,
    /// Locks of names, by hash, held from the look at who has one until it is given.
    names: KeyedLock<u64>,
    /// Locks of request_ids, by hash, held while a creation is admitted and recorded.
    requests: KeyedLock<u64>,
    /// Locks of creations under way, each held by the deletion that cancels it.
    cancelling: KeyedLock<SandboxId>,
    quotas: Arc<Quotas>,
    /// Memory for the stdin that is kept of commands.
    stdin: StdinMemory,
    lost_exposures: LostExposures,
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
        (options, retention): (Options, log::Options),
        (clock, random): (Arc<dyn Clock>, Arc<dyn Random>),
        (tasks, stop): (TaskTracker, CancellationToken),
    ) -> Result<Arc<Self>, store::Error> {
        let sandboxes = Arc::new(Self {
            nodes,
            store,
            clock,
            random,
            creations: Mutex::default(),
            creates: TeamSlots::new(options.creates_max),
            queue: TeamSlots::new(options.queue_max),
            writers: TeamSlots::new(create::WRITERS),
            names: KeyedLock::default(),
            requests: KeyedLock::default(),
            cancelling: KeyedLock::default(),
            quotas: Arc::new(Quotas::new(options.limits.clone())),
            stdin: StdinMemory::default(),
            lost_exposures: LostExposures::default(),
            options,
            retention,
            writing: tokio::sync::Mutex::default(),
            started: Instant::now(),
            tasks,
            stop,
        });
        sandboxes.load().await?;
        Ok(sandboxes)
    }

    /// Returns the registry of nodes, to share it.
    pub fn registry(&self) -> Arc<Nodes> {
        Arc::clone(&self.nodes)
    }

    /// Returns all nodes, for operators.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Finds a sandbox of the team, by any form of its name. Those of other teams do not exist.
    fn find(&self, team: &Team, id: &str) -> Result<Entry> {
        let name = self.reference(team, id)?;
        self.nodes.cache.get_of(team, &name).ok_or_else(|| Error::not_found(&name))
    }

    /// Finds a sandbox that is neither being created nor deleted, with its node.
    fn on_node(&self, team: &Team, id: &str) -> Result<(Entry, Arc<Node>)> {
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

    fn reachable(&self, entry: &Entry) -> Result<Arc<Node>> {
        let name = entry
            .node
            .as_ref()
            .ok_or_else(|| Error::new(Reason::Invariant, format!("{} is on no node", entry.id)))?;
        let node = self
            .nodes
            .get(name)
            .ok_or_else(|| Error::unreachable(name, "it is not in the configuration any more"))?;
        self.if_reachable(node)
    }

    /// Returns a node that can be called now. A revoked one cannot, even before its connections have ended.
    fn if_reachable(&self, node: Arc<Node>) -> Result<Arc<Node>> {
        if self.nodes.certificates().is_revoked(&node.name) {
            return Err(Error::revoked(&node.name));
        }
        match node.down() {
            Some(why) => Err(Error::unreachable(&node.name, &why)),
            None => Ok(node),
        }
    }

    /// Builds the error for a node that could not be called, or did not answer in time.
    fn unreachable(&self, node: &NodeName, why: &str) -> Error {
        if self.nodes.certificates().is_revoked(node) {
            return Error::revoked(node);
        }
        Error::unreachable(node, why)
    }

    /// Returns the calls about the sandboxes of a team that its callers ask for, with a place for one at a time.
    fn calls(&self, node: &Node, team: &Team) -> Result<SandboxCalls> {
        let calls = node.client.calls(Origin::Caller, team);
        calls.map_err(|error| self.node_error(node, error))
    }

    /// Turns an agent's refusal or missing answer into an error for the caller.
    fn node_error(&self, node: &Node, error: node::Error) -> Error {
        self.nodes.fence_if_replaced(&error);
        match error {
            node::Error::Refused { reason, message, retry_after, files_written } => {
                let known = (reason != Reason::Unspecified).then_some(reason);
                let reason = known.unwrap_or(Reason::Invariant);
                let message = format!("node {}: {message}", node.name);
                let partial = files_written.map(|files_written| {
                    Box::new(PartialWrite { files_written, failed_path: None })
                });
                Error { retry_after, partial, ..Error::new(reason, message) }
            }
            node::Error::Unreachable(why) => self.unreachable(&node.name, &why),
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
                let message = format!("node {} sent an answer of the wrong kind", node.name);
                Error::new(Reason::Invariant, message)
            }
        }
    }

    /// Returns the memory for the stdin that is kept of commands.
    #[cfg(test)]
    pub(crate) fn stdin_memory(&self) -> &StdinMemory {
        &self.stdin
    }

    /// Runs a change on a task of its own, so that it goes on to its end when its caller hangs up: nothing is left
    /// between two steps that must both happen. The change keeps the permit of its call until then: whoever hangs up
    /// and calls again has no more changes under way than a caller who waits.
    fn to_its_end<T: Send + 'static>(
        &self,
        permit: Option<Permit>,
        change: impl Future<Output = Result<T>> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send {
        let task = self.tasks.spawn(async move {
            let _permit = permit;
            change.await
        });
        async move { task.await.unwrap_or_else(|_| Err(stopping())) }
    }

    fn log(&self) -> &Log {
        &self.nodes.log
    }

    /// Waits for the event log, but a slow log does not hold back an answer.
    async fn log_flushed(&self) {
        if !matches!(timeout(FLUSH_WAIT, self.log().flushed()).await, Ok(Ok(()))) {
            tracing::error!("call answered before its events were stored");
        }
    }

    fn view(&self, id: &SandboxId) -> Option<Sandbox> {
        let cache = &self.nodes.cache;
        cache.get(&SandboxRef::Id(*id)).map(|entry| cache.view(&entry))
    }

    /// Checks that this controller may make changes.
    fn may_change(&self) -> Result<()> {
        if self.nodes.epoch.fenced() {
            return Err(replaced());
        }
        if self.stop.is_cancelled() {
            return Err(stopping());
        }
        Ok(())
    }
}
