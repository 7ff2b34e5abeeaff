//! Task behind a creation. It alone decides where the creation goes next and when it is over; after
//! a restart it starts again from the store's row.
//!
//! ```text
//!            +--------------------------- refused, failed (attempt + 1) <----------+
//!            v                                                                     |
//!  choose a node (durable) -> send -> follow until it runs -> done (durable) -> RUNNING
//!     |  no capacity: queue     |  ^
//!     v                         v  | unknown there: send again, found: follow
//!   FAILED                   UNKNOWN: ask that node, and only that node, by sandbox_id;
//!                            after `patience`: pending cancel (durable), attempt + 1
//! ```
//! A sandbox that was seen running is never moved.

mod attempt;

use std::time::Duration;

use prost::Message;
use proto::{
    Cause, Progress, Reason,
    id::SandboxRef,
    name::{NodeName, Team},
    sandbox::v1::{EventKind, Failure, Phase, Sandbox},
    spec::Spec,
};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Error, RETRY, Sandboxes};
use crate::{
    events as log,
    node::{Order, registry::AttemptHistory},
    placement::{Decision, Obstacle},
    store::{self, Choice, Event},
};

/// Most attempts that may fail for other reasons than a lack of capacity.
const FAULTS_MAX: usize = 3;
/// Time after the controller's start in which it waits for nodes that have not reported yet.
const START_GRACE: Duration = Duration::from_secs(10);
/// Time after which a node that refused is asked again, unless it names another.
const REFUSAL: Duration = Duration::from_secs(1);
/// Pause between two placement tries of a queued creation; load reports arrive in between.
const LOOK: Duration = Duration::from_millis(100);

/// A creation under way.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) order: Order,
    team: Team,
    spec: Spec,
    /// Node of the current attempt.
    node: Option<NodeName>,
    /// Whether the node may already have received the attempt (the controller was restarted).
    maybe_sent: bool,
    /// Whether an earlier controller began the creation.
    resumed: bool,
    tried: AttemptHistory,
    faults: Vec<Failure>,
    /// AttemptResult with unknown outcome that is abandoned; stored with the next choice of a node.
    leave: Option<(NodeName, u32)>,
    /// Later attempt that the current node reported.
    found: Option<Box<Sandbox>>,
    /// Failure of the previous attempt; logged with the next choice of a node.
    broke: Option<Failure>,
    /// Whether the deadline cancelled the creation, not its owner.
    expired: bool,
    pub(super) cancel: CancellationToken,
    begun: Instant,
}

impl Creation {
    pub(super) fn new(order: Order, team: Team, spec: Spec, node: Option<NodeName>) -> Self {
        Self {
            order,
            team,
            spec,
            node,
            maybe_sent: false,
            resumed: false,
            tried: AttemptHistory::default(),
            faults: Vec::new(),
            leave: None,
            found: None,
            broke: None,
            expired: false,
            cancel: CancellationToken::new(),
            begun: Instant::now(),
        }
    }

    pub(super) fn resumed(mut self, cancelled: bool) -> Self {
        (self.maybe_sent, self.resumed) = (self.node.is_some(), true);
        if cancelled {
            self.cancel.cancel();
        }
        self
    }
}

/// Outcome of a creation.
enum Outcome {
    Up(Box<Sandbox>),
    Failed(Failure),
    CalledOff,
    /// The store says that the creation is already over.
    Gone,
    /// A later controller is in charge and continues the creation.
    Replaced,
}

/// Outcome of one attempt.
enum AttemptResult {
    Running(Box<Sandbox>),
    /// Nothing was made; another node may make it, or this one later.
    Refused(String, Option<Duration>),
    /// Something was made, failed, and was rolled back.
    Fault(Failure),
    /// No other node can succeed.
    Hopeless(Failure),
    /// The node has not answered for too long.
    Abandoned,
    CalledOff,
    /// The node holds a later attempt: our store is an old copy.
    Superseded(Box<Sandbox>),
    /// A later controller is in charge.
    Replaced,
}

impl Sandboxes {
    /// Carries out a creation until it is over, and records the outcome. Dropped when the
    /// controller stops; the row stays.
    pub(super) async fn make(&self, mut job: Creation) {
        let end = loop {
            if let Some(node) = job.node.clone() {
                let attempt = self.attempt(&mut job, &node).await;
                if let Some(end) = judge(&mut job, node, attempt) {
                    break end;
                }
                self.nodes.release(&job.order.id);
            } else if let Err(end) = self.next_node(&mut job).await {
                // Without another node the abandoned one is asked again: it may have the sandbox.
                match (end, job.leave.take()) {
                    (Outcome::Failed(_) | Outcome::CalledOff, Some((node, _))) => {
                        (job.node, job.maybe_sent) = (Some(node), true);
                    }
                    (end, _) => break end,
                }
            }
        };
        self.finish(&job, end).await;
    }

    /// Chooses and records the next attempt's node; waits in the queue while all are full.
    async fn next_node(&self, job: &mut Creation) -> Result<(), Outcome> {
        let id = job.order.id;
        let until = job.begun + self.options.queue;
        let mut ticket = None;
        let mut news = self.nodes.news();
        loop {
            news.mark_unchanged();
            if job.cancel.is_cancelled() {
                return Err(Outcome::CalledOff);
            }
            if job.faults.len() >= FAULTS_MAX {
                return Err(Outcome::Failed(job.faults[0].clone()));
            }
            if job.resumed {
                if let Some(later) = self.later(job) {
                    return self.go_on_with(job, &later).await;
                }
                if self.may_hear_more(job) {
                    sleep(LOOK).await;
                    continue;
                }
            }
            let next = job.order.attempt + 1;
            let decision = self.place(id, &job.team, &job.spec, next, &job.tried).await;
            if let Some(node) = decision.node() {
                return self.choose(job, node.clone(), &decision).await;
            }
            if let Some(error) = self.hopeless(&decision, &job.spec) {
                let own = Failure {
                    reason: error.reason.into(),
                    message: error.message,
                    ..Failure::default()
                };
                return Err(Outcome::Failed(job.faults.first().cloned().unwrap_or(own)));
            }
            let full = |what: &str| {
                let message = format!("{what}: {}", decision.why());
                Failure { reason: Reason::NoCapacity.into(), message, rollback: String::new() }
            };
            if Instant::now() >= until {
                return Err(Outcome::Failed(full("no node had room in time")));
            }
            if ticket.is_none() {
                let Ok(permit) = self.queue.try_acquire() else {
                    return Err(Outcome::Failed(full("the queue for room is full")));
                };
                ticket = Some(permit);
                self.nodes.cache.placed(&id, None, job.order.attempt, Progress::Queued);
            }
            let refusals = job.tried.refused.values().map(|(until, _)| *until);
            let wake = refusals.filter(|at| *at > Instant::now()).min().unwrap_or(until).min(until);
            tokio::select! {
                () = job.cancel.cancelled() => {}
                () = sleep_until(wake) => {}
                _ = async { sleep(LOOK).await; news.changed().await } => {}
            }
        }
    }

    /// Returns true when nodes that have not reported yet may know more of the creation than the
    /// store, which may be an old copy.
    fn may_hear_more(&self, job: &Creation) -> bool {
        let behind = self.nodes.epoch.behind() && Instant::now() < job.begun + self.options.queue;
        (behind || self.started.elapsed() < START_GRACE) && self.unheard()
    }

    /// Returns the latest of the nodes' attempts that are later than ours.
    fn later(&self, job: &mut Creation) -> Option<Box<Sandbox>> {
        let told = self.nodes.cache.get(&SandboxRef::Id(job.order.id)).and_then(|e| e.later);
        let later = job.found.take().into_iter().chain(told).max_by_key(|later| later.attempt)?;
        let goes_on = later.attempt > job.order.attempt || later.cause() == Cause::Moved;
        goes_on.then_some(later)
    }

    /// Continues an attempt that a controller with a newer store began.
    async fn go_on_with(&self, job: &mut Creation, later: &Sandbox) -> Result<(), Outcome> {
        let (id, attempt) = (job.order.id, later.attempt);
        let Ok(node) = later.node.parse::<NodeName>() else { return Err(Outcome::Gone) };
        tracing::warn!(sandbox_id = %id, %node, attempt, "node has a later attempt of a creation");
        let (name, leave) = (node.clone(), job.leave.take());
        let choice = Choice { node: name, attempt, decision: String::new(), leave };
        if !self.persist(|| self.store.choose(&id, choice.clone())).await {
            return Err(Outcome::Gone);
        }
        job.order.attempt = attempt;
        self.nodes.cache.placed(&id, Some(&node), attempt, Progress::Placing);
        (job.node, job.maybe_sent) = (Some(node), true);
        Ok(())
    }

    async fn choose(
        &self,
        job: &mut Creation,
        node: NodeName,
        decision: &Decision,
    ) -> Result<(), Outcome> {
        let id = job.order.id;
        let attempt = job.order.attempt + 1;
        let choice = Choice {
            node: node.clone(),
            attempt,
            decision: super::explain::encode(decision),
            leave: job.leave.clone(),
        };
        if let Some(broke) = job.broke.take() {
            let (reason, message) = (broke.reason(), broke.message);
            let kind = EventKind::AttemptMoved;
            self.log().append(Event {
                node: Some(node.clone()),
                why: reason.into(),
                detail: format!("attempt {attempt} goes there: {message}"),
                once: Some(format!("{id} {attempt} {}", kind.as_str_name())),
                ..self.of_job(job, kind, log::CONTROLLER)
            });
        }
        // The node must not receive the attempt before this is durable.
        self.persist(|| self.log().flushed()).await;
        let chosen = self.persist(|| self.store.choose(&id, choice.clone())).await;
        if !chosen {
            return Err(Outcome::Gone);
        }
        tracing::info!(sandbox_id = %id, %node, attempt, "node chosen");
        job.leave = None;
        job.order.attempt = attempt;
        self.nodes.cache.placed(&id, Some(&node), attempt, Progress::Placing);
        (job.node, job.maybe_sent) = (Some(node), false);
        Ok(())
    }

    /// Records the outcome, then shows it.
    async fn finish(&self, job: &Creation, end: Outcome) {
        let id = job.order.id;
        let now_ms = self.clock.now_ms();
        let held = self.nodes.cache.get(&SandboxRef::Id(id)).map(|entry| entry.sandbox);
        let mut sandbox = held.unwrap_or_default();
        match end {
            Outcome::Up(up) => {
                sandbox = *up;
                let last = sandbox.encode_to_vec();
                let by = self.log().attributed_to(&id, EventKind::Created);
                let by = by.unwrap_or_else(|| log::CONTROLLER.to_owned());
                let mut told = vec![Event {
                    node: sandbox.node.parse().ok(),
                    node_revision: sandbox.revision,
                    ..self.once(job, EventKind::Created, &by)
                }];
                told.extend(self.nodes.came_up(id, &job.team, &sandbox));
                // Durable before it is visible: a sandbox seen running is never moved.
                let done = || self.store.done(&id, last.clone(), told.clone());
                let revision = self.persist(done).await;
                self.log().reached(revision);
                tracing::info!(sandbox_id = %id, node = sandbox.node, vmid = sandbox.vmid,
                    attempt = job.order.attempt, "sandbox is up");
            }
            Outcome::Failed(failure) => {
                tracing::warn!(sandbox_id = %id, reason = %failure.reason(), message = failure.message,
                    rollback = failure.rollback, "creation failed");
                let released = failure.reason().is_not_here_not_now();
                self.ended(job, EventKind::CreateFailed, &failure);
                sandbox.set_phase(Phase::Failed);
                sandbox.failure = Some(failure);
                let last = sandbox.encode_to_vec();
                self.persist(|| self.log().flushed()).await;
                self.persist(|| self.store.failed(&id, last.clone(), released, now_ms)).await;
                self.nodes.release(&id);
            }
            Outcome::CalledOff => {
                tracing::info!(sandbox_id = %id, "creation cancelled");
                sandbox.set_phase(Phase::Deleted);
                let failure = Failure {
                    reason: Reason::CreateCancelled.into(),
                    message: "the creation was called off".into(),
                    rollback: String::new(),
                };
                self.ended(job, EventKind::Deleted, &failure);
                sandbox.failure = Some(failure);
                let last = sandbox.encode_to_vec();
                self.persist(|| self.log().flushed()).await;
                self.persist(|| self.store.failed(&id, last.clone(), false, now_ms)).await;
                self.nodes.release(&id);
            }
            Outcome::Gone => self.nodes.release(&id),
            // Our state of the sandbox may be outdated.
            Outcome::Replaced => {
                self.jobs().remove(&id);
                return;
            }
        }
        self.nodes.settle(&id, sandbox);
        self.jobs().remove(&id);
    }

    /// Builds an event of a creation.
    fn of_job(&self, job: &Creation, kind: EventKind, actor: &str) -> Event {
        Event {
            sandbox: Some(job.order.id),
            team: Some(job.team.clone()),
            ..self.log().event(kind, actor)
        }
    }

    /// As `of_job`, for a kind that occurs once per sandbox, even if a crash repeats the end.
    fn once(&self, job: &Creation, kind: EventKind, actor: &str) -> Event {
        let once = Some(format!("{} {}", job.order.id, kind.as_str_name()));
        Event { once, ..self.of_job(job, kind, actor) }
    }

    /// Logs that a creation failed or was cancelled.
    fn ended(&self, job: &Creation, kind: EventKind, failure: &Failure) {
        let by = self.log().attributed_to(&job.order.id, kind);
        let by = by.unwrap_or_else(|| log::CONTROLLER.to_owned());
        self.log().append(Event {
            why: failure.reason().into(),
            detail: failure.message.clone(),
            ..self.once(job, kind, &by)
        });
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
    pub(super) fn hopeless(&self, decision: &Decision, spec: &Spec) -> Option<Error> {
        let why = decision.why();
        match decision.obstacle(spec.node.as_ref()) {
            Obstacle::Full => None,
            Obstacle::Unreachable | Obstacle::UnknownNode | Obstacle::UnknownSnapshot
                if self.started.elapsed() < START_GRACE && self.unheard() =>
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
                let wish = spec.node.as_ref().map(ToString::to_string).unwrap_or_default();
                Some(Error::new(Reason::NodeNotFound, format!("there is no node {wish}")))
            }
            Obstacle::UnknownSnapshot => {
                let message = format!("no node that may be chosen holds {}: {why}", spec.snapshot);
                Some(Error::new(Reason::SnapshotNotFound, message))
            }
            Obstacle::Unfit | Obstacle::Failed => {
                Some(Error::new(Reason::NoCapacity, format!("no node can take it: {why}")))
            }
        }
    }

    fn unheard(&self) -> bool {
        self.nodes.is_empty() || self.nodes.unheard().is_some()
    }
}

/// Records the outcome of an attempt in the job; `Some` when the creation is over with it.
fn judge(job: &mut Creation, node: NodeName, attempt: AttemptResult) -> Option<Outcome> {
    (job.node, job.maybe_sent) = (None, false);
    let id = job.order.id;
    match attempt {
        AttemptResult::Running(sandbox) => return Some(Outcome::Up(sandbox)),
        AttemptResult::Hopeless(failure) => return Some(Outcome::Failed(failure)),
        AttemptResult::CalledOff if job.expired => {
            return Some(Outcome::Failed(Failure {
                reason: Reason::ProbeTimeout.into(),
                message: format!("node {node}: it did not come up in time and was called off"),
                rollback: "the node says that nothing of it is left".into(),
            }));
        }
        AttemptResult::CalledOff => return Some(Outcome::CalledOff),
        AttemptResult::Replaced => return Some(Outcome::Replaced),
        AttemptResult::Superseded(later) => job.found = Some(later),
        AttemptResult::Refused(why, retry_after) => {
            tracing::info!(sandbox_id = %id, %node, why, "node refused a creation");
            let until = Instant::now() + retry_after.unwrap_or(REFUSAL);
            job.tried.refused.insert(node, (until, why));
        }
        AttemptResult::Fault(failure) => {
            tracing::warn!(sandbox_id = %id, %node, reason = %failure.reason(),
                message = failure.message, rollback = failure.rollback, "node failed a creation");
            job.tried.failed.insert(node, failure.reason().name().to_owned());
            job.broke = Some(failure.clone());
            job.faults.push(failure);
        }
        AttemptResult::Abandoned => {
            tracing::warn!(sandbox_id = %id, %node, attempt = job.order.attempt,
                "node does not answer, its attempt is abandoned and cancelled when it is back");
            let until = Instant::now() + RETRY;
            job.tried.refused.insert(node.clone(), (until, "it does not answer".into()));
            job.broke = Some(Failure {
                reason: Reason::NodeUnreachable.into(),
                message: format!("node {node} does not answer"),
                rollback: String::new(),
            });
            job.leave = Some((node, job.order.attempt));
        }
    }
    None
}
