//! Task behind a creation. It alone decides where the creation goes next and when it is over; after
//! a restart it starts again from the store's row.
//!
//! ```text
//!            +--------------------------- refused, failed (attempt + 1) <----------+
//!            v                                                                     |
//!  choose a node (durable) -> send -> follow until it runs -> files -> done (durable) -> RUNNING
//!     |  no capacity: queue     |  ^
//!     v                         v  | unknown there: send again, found: follow
//!   FAILED                   UNKNOWN: ask that node, and only that node, by sandbox_id;
//!                            after `patience`: pending cancel (durable), attempt + 1
//! ```
//! A sandbox that was seen running is never moved.
//!
//! A creation whose request the store has lost sends nothing any more: what its node has made stays, what the
//! node is still making is cancelled, and the creation fails.

mod attempt;
mod ending;

use std::time::Duration;

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    name::{NodeName, Team},
    sandbox::v1::{EventKind, Failure, Sandbox},
    spec::Spec,
};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    events as log,
    node::{CreateOrder, registry::AttemptHistory},
    placement::{Decision, Obstacle},
    sandbox::{Error, RETRY, Sandboxes, read::explain},
    store::{self, Choice, Event},
};

/// Most attempts that may fail for other reasons than a lack of capacity.
const FAULTS_MAX: usize = 3;
/// Time after the controller's start in which it waits for nodes that have not reported yet.
const START_GRACE: Duration = Duration::from_secs(10);
/// Time after which a node that refused is asked again, unless it names another.
const REFUSAL: Duration = Duration::from_secs(1);
/// Pause between two placement tries of a queued creation; load reports arrive in between.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// A creation under way.
#[derive(Debug)]
pub(in crate::sandbox) struct Creation {
    pub(in crate::sandbox) order: CreateOrder,
    pub(super) team: Team,
    /// Checked request. `Err`: the store cannot give it any more, so nothing new is made of the creation, and
    /// this is how it fails.
    pub(super) spec: Result<Spec, Failure>,
    /// Node of the current attempt.
    node: Option<NodeName>,
    /// Whether the node may already have received the attempt (the controller was restarted).
    maybe_sent: bool,
    /// Whether an earlier controller began the creation.
    pub(super) resumed: bool,
    /// False when the store has no files for it. Unknown, and so true, for one that an earlier
    /// controller began.
    pub(super) may_have_files: bool,
    history: AttemptHistory,
    faults: Vec<Failure>,
    /// Attempt with unknown outcome that is abandoned; stored with the next choice of a node.
    abandoned: Option<(NodeName, u32)>,
    /// Later attempt that the current node reported.
    found: Option<Box<Sandbox>>,
    /// Failure of the previous attempt; logged with the next choice of a node.
    last_failure: Option<Failure>,
    /// Whether the deadline cancelled the creation, not its owner.
    expired: bool,
    pub(in crate::sandbox) cancel: CancellationToken,
    pub(super) begun: Instant,
}

impl Creation {
    pub(in crate::sandbox) fn new(
        order: CreateOrder,
        team: Team,
        spec: Result<Spec, Failure>,
        node: Option<NodeName>,
    ) -> Self {
        Self {
            order,
            team,
            spec,
            node,
            maybe_sent: false,
            resumed: false,
            may_have_files: true,
            history: AttemptHistory::default(),
            faults: Vec::new(),
            abandoned: None,
            found: None,
            last_failure: None,
            expired: false,
            cancel: CancellationToken::new(),
            begun: Instant::now(),
        }
    }

    pub(super) fn with_files(mut self, files: bool) -> Self {
        self.may_have_files = files;
        self
    }

    pub(in crate::sandbox) fn resumed(mut self, cancelled: bool) -> Self {
        (self.maybe_sent, self.resumed) = (self.node.is_some(), true);
        if cancelled {
            self.cancel.cancel();
        }
        self
    }
}

impl Creation {
    /// Returns true when the creation is cancelled because its request is lost, not by its owner.
    fn is_lost_and_wanted(&self) -> bool {
        self.spec.is_err() && !self.cancel.is_cancelled()
    }
}

/// Outcome of a creation.
enum Outcome {
    Up(Box<Sandbox>),
    Failed(Failure),
    Cancelled,
    /// The store says that the creation is already over.
    Gone,
    /// A later controller is in charge and continues the creation.
    Replaced,
}

/// Outcome of one attempt.
pub(super) enum AttemptResult {
    Running(Box<Sandbox>),
    /// Nothing was made; another node may make it, or this one later.
    Refused(String, Option<Duration>),
    /// Something was made, failed, and was rolled back.
    Fault(Failure),
    /// No other node can succeed.
    Permanent(Failure),
    /// The node has not answered for too long.
    Abandoned,
    Cancelled,
    /// The node holds a later attempt: our store is an old copy.
    Superseded(Box<Sandbox>),
    /// A later controller is in charge.
    Replaced,
}

impl Sandboxes {
    /// Carries out a creation until it is over, and records the outcome. Dropped when the
    /// controller stops; the row stays.
    pub(in crate::sandbox) async fn make(&self, mut creation: Creation) {
        let end = loop {
            if let Some(node) = creation.node.clone() {
                let attempt = self.attempt(&mut creation, &node).await;
                let attempt = self.write_files_of(&creation, &node, attempt).await;
                if let Some(end) = judge(&mut creation, node, attempt) {
                    break end;
                }
                self.nodes.release(&creation.order.id);
            } else if let Err(end) = self.next_node(&mut creation).await {
                // Without another node the abandoned one is asked again: it may have the sandbox. One that was
                // forgotten meanwhile never answers.
                match (end, creation.abandoned.take()) {
                    (end @ (Outcome::Failed(_) | Outcome::Cancelled), Some((node, attempt)))
                        if self.nodes.is_forgotten(&node) =>
                    {
                        self.store_pending_cancel(&creation, node, attempt).await;
                        break end;
                    }
                    (Outcome::Failed(_) | Outcome::Cancelled, Some((node, attempt))) => {
                        // A node that is not configured any more is known by this alone, and can be forgotten.
                        let id = &creation.order.id;
                        self.nodes.cache.placed_again(id, &node, attempt);
                        (creation.node, creation.maybe_sent) = (Some(node), true);
                    }
                    (end, _) => break end,
                }
            }
        };
        let up_on = match &end {
            Outcome::Up(up) => up.node.parse::<NodeName>().ok(),
            Outcome::Failed(_) | Outcome::Cancelled | Outcome::Gone | Outcome::Replaced => None,
        };
        self.finish(&creation, end).await;
        // It came up while its owner asked for its end, who may not ask again.
        let is_unwanted = creation.cancel.is_cancelled() && !creation.expired;
        if let Some(node) = up_on.filter(|_| is_unwanted) {
            self.cancel_attempt(&creation, &node).await;
        }
    }

    /// Stores that a forgotten node must cancel an attempt before anything else, if it comes back.
    async fn store_pending_cancel(&self, creation: &Creation, node: NodeName, attempt: u32) {
        let (id, abandoned) = (creation.order.id, Some((node.clone(), attempt)));
        // It stays the decision that `explain` shows.
        let stored = self.persist(|| self.store.get(&id)).await;
        let decision = stored.map(|row| row.decision).unwrap_or_default();
        // False when the creation is over already.
        self.store_choice(&id, Choice { node, attempt, decision, abandoned }).await;
    }

    /// Stores a choice together with the pending cancel of the abandoned attempt. That node may be connected
    /// already, so it is sent the cancel, too. Returns false when the creation is over already.
    async fn store_choice(&self, id: &SandboxId, choice: Choice) -> bool {
        let chosen = self.persist(|| self.store.choose(id, choice.clone())).await;
        if let Some((node, attempt)) = choice.abandoned.filter(|_| chosen) {
            self.nodes.cancel_stale_attempt(&node, *id, attempt);
        }
        chosen
    }

    /// Chooses and records the next attempt's node; waits in the queue while all are full.
    async fn next_node(&self, creation: &mut Creation) -> Result<(), Outcome> {
        let id = creation.order.id;
        let until = creation.begun + self.options.queue;
        let mut queued = None;
        let mut news = self.nodes.news();
        loop {
            news.mark_unchanged();
            if creation.cancel.is_cancelled() {
                let late = creation.last_failure.take().filter(|_| creation.expired);
                return Err(late.map_or(Outcome::Cancelled, Outcome::Failed));
            }
            if creation.faults.len() >= FAULTS_MAX {
                return Err(Outcome::Failed(creation.faults[0].clone()));
            }
            if creation.resumed {
                if let Some(later) = self.later_attempt(creation) {
                    return self.continue_attempt(creation, &later).await;
                }
                if self.nodes_may_know_more(creation) {
                    sleep(POLL).await;
                    continue;
                }
            }
            let spec = match &creation.spec {
                Ok(spec) => spec,
                Err(lost) => return Err(Outcome::Failed(lost.clone())),
            };
            let next = creation.order.attempt + 1;
            let decision = self.place(id, &creation.team, spec, next, &creation.history).await;
            if let Some(node) = decision.node() {
                return self.choose(creation, node.clone(), &decision).await;
            }
            if let Some(error) = self.reason_not_to_wait(&decision, spec) {
                let own = Failure {
                    reason: error.reason.into(),
                    message: error.message,
                    ..Failure::default()
                };
                return Err(Outcome::Failed(creation.faults.first().cloned().unwrap_or(own)));
            }
            let full = |what: &str| {
                let message = format!("{what}: {}", decision.why());
                Failure { reason: Reason::NoCapacity.into(), message, rollback: String::new() }
            };
            if Instant::now() >= until {
                return Err(Outcome::Failed(full("no node had room in time")));
            }
            if queued.is_none() {
                let slot = self.queue.take(&creation.team);
                // One that was accepted before a restart is not refused for the share of its team.
                if slot.is_none() && !creation.resumed {
                    return Err(Outcome::Failed(full("the queue for room is full")));
                }
                queued = Some(slot);
                self.nodes.cache.placed(&id, None, creation.order.attempt, Progress::Queued);
            }
            let refusals = creation.history.refused.values().map(|(until, _)| *until);
            let wake = refusals.filter(|at| *at > Instant::now()).min().unwrap_or(until).min(until);
            tokio::select! {
                () = creation.cancel.cancelled() => {}
                () = sleep_until(wake) => {}
                _ = async { sleep(POLL).await; news.changed().await } => {}
            }
        }
    }

    /// Returns true when nodes that have not reported yet may know more of the creation than the
    /// store, which may be an old copy.
    fn nodes_may_know_more(&self, creation: &Creation) -> bool {
        let behind =
            self.nodes.epoch.behind() && Instant::now() < creation.begun + self.options.queue;
        (behind || self.started.elapsed() < START_GRACE) && self.has_unsynced()
    }

    /// Returns the latest of the nodes' attempts that are later than ours.
    fn later_attempt(&self, creation: &mut Creation) -> Option<Box<Sandbox>> {
        let reported =
            self.nodes.cache.get(&SandboxRef::Id(creation.order.id)).and_then(|e| e.elsewhere);
        let later =
            creation.found.take().into_iter().chain(reported).max_by_key(|later| later.attempt)?;
        let goes_on = later.attempt > creation.order.attempt || later.cause() == Cause::Moved;
        goes_on.then_some(later)
    }

    /// Continues an attempt that a controller with a newer store began.
    async fn continue_attempt(
        &self,
        creation: &mut Creation,
        later: &Sandbox,
    ) -> Result<(), Outcome> {
        let (id, attempt) = (creation.order.id, later.attempt);
        let Ok(node) = later.node.parse::<NodeName>() else { return Err(Outcome::Gone) };
        tracing::warn!(sandbox_id = %id, %node, attempt, "node has a later attempt of a creation");
        let (name, abandoned) = (node.clone(), creation.abandoned.take());
        let choice = Choice { node: name, attempt, decision: String::new(), abandoned };
        if !self.store_choice(&id, choice).await {
            return Err(Outcome::Gone);
        }
        creation.order.attempt = attempt;
        self.nodes.cache.placed(&id, Some(&node), attempt, Progress::Placing);
        (creation.node, creation.maybe_sent) = (Some(node), true);
        Ok(())
    }

    async fn choose(
        &self,
        creation: &mut Creation,
        node: NodeName,
        decision: &Decision,
    ) -> Result<(), Outcome> {
        let id = creation.order.id;
        let attempt = creation.order.attempt + 1;
        let choice = Choice {
            node: node.clone(),
            attempt,
            decision: explain::encode(decision),
            abandoned: creation.abandoned.clone(),
        };
        if let Some(last_failure) = creation.last_failure.take() {
            let (reason, message) = (last_failure.reason(), last_failure.message);
            let kind = EventKind::AttemptMoved;
            self.log().append(Event {
                node: Some(node.clone()),
                why: reason.into(),
                detail: format!("attempt {attempt} goes there: {message}"),
                once: Some(format!("{id} {attempt} {}", kind.as_str_name())),
                ..self.event_of(creation, kind, log::CONTROLLER)
            });
        }
        // The node must not receive the attempt before this is durable.
        self.persist(|| self.log().flushed()).await;
        if !self.store_choice(&id, choice).await {
            return Err(Outcome::Gone);
        }
        tracing::info!(sandbox_id = %id, %node, attempt, "node chosen");
        creation.abandoned = None;
        creation.order.attempt = attempt;
        self.nodes.cache.placed(&id, Some(&node), attempt, Progress::Placing);
        (creation.node, creation.maybe_sent) = (Some(node), false);
        Ok(())
    }

    /// Repeats a write until the store accepts it: the next step must not be taken without it.
    /// Never returns once a later controller is in charge, which finishes the work under way.
    async fn persist<T, F>(&self, write: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, store::Error>>,
    {
        loop {
            match write().await {
                Ok(value) => return value,
                Err(store::Error::Replaced) => {
                    self.nodes.epoch.fence();
                    std::future::pending().await
                }
                Err(store::Error::Failed(_)) if self.nodes.epoch.fenced() => {
                    std::future::pending().await
                }
                Err(error @ store::Error::Failed(_)) => {
                    tracing::error!(%error, "could not write to the store, trying again");
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Returns why waiting for capacity is useless; `None` when it is not.
    pub(in crate::sandbox::create) fn reason_not_to_wait(
        &self,
        decision: &Decision,
        spec: &Spec,
    ) -> Option<Error> {
        let why = decision.why();
        match decision.obstacle(spec.node.as_ref()) {
            Obstacle::Full => None,
            // Another node may come back, but this one is asked for by name.
            Obstacle::Withdrawn => spec.node.as_ref().map(|node| {
                let message = format!("{node} takes no new sandboxes: {why}");
                Error::new(Reason::NodeCordoned, message)
            }),
            Obstacle::Unreachable | Obstacle::UnknownNode | Obstacle::UnknownSnapshot
                if self.started.elapsed() < START_GRACE && self.has_unsynced() =>
            {
                None
            }
            Obstacle::Unreachable => Some(
                Error::new(Reason::NodeUnreachable, format!("no node can be asked: {why}"))
                    .retry(RETRY),
            ),
            Obstacle::NoQuorum => Some(
                Error::new(Reason::NoQuorum, format!("no node may create now: {why}")).retry(RETRY),
            ),
            Obstacle::UnknownNode => {
                let asked = spec.node.as_ref().map(ToString::to_string).unwrap_or_default();
                Some(Error::new(Reason::NodeNotFound, format!("there is no node {asked}")))
            }
            Obstacle::UnknownSnapshot => {
                let message = format!("no node that may be chosen holds {}: {why}", spec.snapshot);
                Some(Error::new(Reason::SnapshotNotFound, message))
            }
            Obstacle::Unfit => {
                Some(Error::new(Reason::NeverFits, format!("no node can ever take it: {why}")))
            }
            Obstacle::Failed => {
                Some(Error::new(Reason::NoCapacity, format!("no node can take it: {why}")))
            }
        }
    }

    fn has_unsynced(&self) -> bool {
        self.nodes.is_empty() || self.nodes.unsynced().is_some()
    }
}

/// Records the outcome of an attempt; `Some` when the creation is over with it.
fn judge(creation: &mut Creation, node: NodeName, attempt: AttemptResult) -> Option<Outcome> {
    (creation.node, creation.maybe_sent) = (None, false);
    let id = creation.order.id;
    match attempt {
        AttemptResult::Running(sandbox) => return Some(Outcome::Up(sandbox)),
        AttemptResult::Permanent(failure) => return Some(Outcome::Failed(failure)),
        AttemptResult::Cancelled if creation.is_lost_and_wanted() => {
            return creation.spec.clone().err().map(Outcome::Failed);
        }
        AttemptResult::Cancelled if creation.expired => {
            return Some(Outcome::Failed(Failure {
                reason: Reason::ProbeTimeout.into(),
                message: format!("node {node}: it did not come up in time and was cancelled"),
                rollback: "the node says that nothing of it is left".into(),
            }));
        }
        AttemptResult::Cancelled => return Some(Outcome::Cancelled),
        AttemptResult::Replaced => return Some(Outcome::Replaced),
        AttemptResult::Superseded(later) => creation.found = Some(later),
        AttemptResult::Refused(why, retry_after) => {
            tracing::info!(sandbox_id = %id, %node, why, "node refused a creation");
            let until = Instant::now() + retry_after.unwrap_or(REFUSAL);
            creation.history.refused.insert(node, (until, why));
        }
        AttemptResult::Fault(failure) => {
            tracing::warn!(sandbox_id = %id, %node, reason = %failure.reason(),
                message = failure.message, rollback = failure.rollback, "node failed a creation");
            creation.history.failed.insert(node, failure.reason().name().to_owned());
            creation.last_failure = Some(failure.clone());
            creation.faults.push(failure);
        }
        AttemptResult::Abandoned => {
            tracing::warn!(sandbox_id = %id, %node, attempt = creation.order.attempt,
                "node does not answer, its attempt is abandoned and cancelled when it is back");
            let until = Instant::now() + RETRY;
            creation.history.refused.insert(node.clone(), (until, "it does not answer".into()));
            creation.last_failure = Some(Failure {
                reason: Reason::NodeUnreachable.into(),
                message: format!("node {node} does not answer"),
                rollback: String::new(),
            });
            creation.abandoned = Some((node, creation.order.attempt));
        }
    }
    None
}
