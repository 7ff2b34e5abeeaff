//! One attempt of a creation on one node: sends it, follows it, and calls it off when it must end.

use std::time::Duration;

use proto::{
    Cause, Reason,
    name::NodeName,
    sandbox::v1::{Failure, NodeLoad, Phase, Sandbox},
};
use tokio::time::{Instant, sleep};

use super::{AttemptResult, Creation, LOOK, RETRY, Sandboxes};
use crate::{
    node::{self, Node},
    sandbox::WAIT,
};

/// Pause between two requests to a node.
const ASK: Duration = Duration::from_millis(500);

/// Next request to the node of an attempt.
enum Step {
    Send,
    Ask,
    Follow,
}

impl Sandboxes {
    /// Carries out one attempt on one node.
    pub(super) async fn attempt(&self, job: &mut Creation, name: &NodeName) -> AttemptResult {
        let Some(node) = self.nodes.get(name) else {
            if job.maybe_sent {
                // Not configured any more; a pending cancel waits for the node to come back.
                sleep(RETRY).await;
                return AttemptResult::Abandoned;
            }
            return AttemptResult::Refused("it is not in the configuration any more".into(), None);
        };
        let mut step = if job.maybe_sent { Step::Ask } else { Step::Send };
        let mut silent_since = Instant::now();
        let mut news = self.nodes.news();
        loop {
            news.mark_unchanged();
            if Instant::now() > job.begun + self.options.deadline {
                job.expired = true;
                job.cancel.cancel();
            }
            let answer = tokio::select! {
                biased;
                () = job.cancel.cancelled() => return self.call_off(job, &node).await,
                answer = self.ask(job, &node, &step) => answer,
            };
            let error = match answer {
                // The node carried out this request before, under an id that our store has lost.
                Ok((sandbox, _)) if sandbox.id != job.order.id.to_string() => {
                    self.nodes.apply(name, sandbox.clone());
                    return AttemptResult::Hopeless(Failure {
                        reason: Reason::RequestIdReused.into(),
                        message: format!("this request made {} before; use that", sandbox.id),
                        rollback: String::new(),
                    });
                }
                // Our store is an old copy: the sandbox came up and has moved since.
                Ok((sandbox, _)) if sandbox.cause() == Cause::Moved => {
                    return AttemptResult::Superseded(Box::new(sandbox));
                }
                Ok((sandbox, load)) if sandbox.attempt == job.order.attempt => {
                    silent_since = Instant::now();
                    if !matches!(step, Step::Follow) {
                        self.nodes.admitted(&node, &job.order.id, load);
                    }
                    job.maybe_sent = true;
                    self.nodes.apply(name, sandbox.clone());
                    match sandbox.phase() {
                        Phase::Creating | Phase::Unspecified => {
                            // A node that cannot continue now (just back, or without quorum)
                            // answers at once, however long it was asked to wait.
                            if matches!(step, Step::Follow) {
                                sleep(ASK).await;
                            }
                            step = Step::Follow;
                        }
                        Phase::Failed => {
                            return by_failure(name, sandbox.failure.unwrap_or_default(), None);
                        }
                        // The creation may have been cancelled, with a later attempt up elsewhere.
                        Phase::Deleted if job.resumed && self.may_hear_more(job) => {
                            step = Step::Ask;
                            sleep(LOOK).await;
                        }
                        // Even if it has been deleted since: it is never made again.
                        Phase::Running
                        | Phase::Paused
                        | Phase::Starting
                        | Phase::Stopping
                        | Phase::Stopped
                        | Phase::Deleting
                        | Phase::Deleted
                        | Phase::Unreachable => {
                            let over = job.resumed && sandbox.phase() == Phase::Deleted;
                            let later = if over { self.later(job) } else { None };
                            return later.map_or(
                                AttemptResult::Running(Box::new(sandbox)),
                                AttemptResult::Superseded,
                            );
                        }
                    }
                    continue;
                }
                Ok((sandbox, _)) if sandbox.attempt > job.order.attempt => {
                    return AttemptResult::Superseded(Box::new(sandbox));
                }
                // The tombstone of an earlier attempt: the node has not received this one.
                Ok(_) => {
                    step = Step::Send;
                    sleep(ASK).await;
                    continue;
                }
                Err(error) => error,
            };
            self.nodes.noticed(&error);
            if self.nodes.epoch.fenced() {
                return AttemptResult::Replaced;
            }
            match error {
                ref unknown if unknown.is_not_found() && !matches!(step, Step::Send) => {
                    // The attempt never arrived. It may go to the same node again.
                    step = Step::Send;
                    sleep(ASK).await;
                }
                node::Error::Refused { reason, message, retry_after } => {
                    if reason == Reason::SandboxBusy {
                        // An earlier, abandoned attempt is still there.
                        self.clear(job, &node).await;
                    }
                    let failure =
                        Failure { reason: reason.into(), message, rollback: String::new() };
                    return by_failure(name, failure, retry_after);
                }
                // No earlier request has arrived anywhere.
                node::Error::Unreachable(why) if !job.maybe_sent => {
                    return AttemptResult::Refused(why, Some(RETRY));
                }
                node::Error::Unreachable(_)
                | node::Error::Unknown(_)
                | node::Error::Silent(_)
                | node::Error::Nonsense(_) => {
                    if !job.maybe_sent || matches!(step, Step::Send) {
                        tracing::warn!(sandbox_id = %job.order.id, node = %name, %error,
                            "outcome of a creation is unknown, asking the node");
                        self.nodes.trip(&node);
                    }
                    (job.maybe_sent, step) = (true, Step::Ask);
                    let silent = silent_since.elapsed() > self.options.patience;
                    if silent && node.down().is_some() {
                        return AttemptResult::Abandoned;
                    }
                    tokio::select! {
                        () = job.cancel.cancelled() => {}
                        () = sleep(RETRY) => {}
                        // The node may be back.
                        _ = async { sleep(ASK).await; news.changed().await } => {}
                    }
                }
            }
        }
    }

    async fn ask(
        &self,
        job: &Creation,
        node: &Node,
        step: &Step,
    ) -> Result<(Sandbox, Option<NodeLoad>), node::Error> {
        let epoch = self.nodes.epoch.get();
        match step {
            // Answered as soon as the node has admitted it, which keeps the uncertain time short.
            Step::Send => node.client.create(epoch, &job.order, Duration::ZERO).await,
            Step::Follow => node.client.create(epoch, &job.order, WAIT).await,
            Step::Ask => node.client.get(&job.order.id).await.map(|sandbox| (sandbox, None)),
        }
    }

    /// Cancels the earlier attempts. A failure here is repeated with the next try.
    async fn clear(&self, job: &Creation, node: &Node) {
        let (epoch, before) = (self.nodes.epoch.get(), job.order.attempt - 1);
        if let Err(error) = node.client.cancel_create(epoch, &job.order.id, before).await {
            tracing::warn!(sandbox_id = %job.order.id, node = %node.name, %error,
                "could not cancel an abandoned attempt");
        }
    }

    /// Removes the attempt from the node. Retries for ever: a requested deletion stays wanted.
    async fn call_off(&self, job: &Creation, node: &Node) -> AttemptResult {
        let id = &job.order.id;
        loop {
            let epoch = self.nodes.epoch.get();
            let held = match node.client.cancel_create(epoch, id, job.order.attempt).await {
                Ok(held) => held,
                Err(error) if error.is_not_found() => None,
                Err(error) => {
                    self.nodes.noticed(&error);
                    if self.nodes.epoch.fenced() {
                        return AttemptResult::Replaced;
                    }
                    tracing::warn!(sandbox_id = %id, node = %node.name, %error,
                        "could not cancel a creation, trying again");
                    sleep(RETRY).await;
                    continue;
                }
            };
            match held.as_ref().map(Sandbox::phase) {
                None | Some(Phase::Failed | Phase::Deleted) => return AttemptResult::CalledOff,
                // The sandbox had come up before.
                Some(Phase::Running | Phase::Paused | Phase::Stopped) => {
                    if let Err(error) = node.client.delete(epoch, id, WAIT).await {
                        tracing::warn!(sandbox_id = %id, node = %node.name, %error,
                            "could not delete a cancelled creation, trying again");
                    }
                }
                Some(
                    Phase::Unspecified
                    | Phase::Creating
                    | Phase::Starting
                    | Phase::Stopping
                    | Phase::Deleting
                    | Phase::Unreachable,
                ) => {}
            }
            sleep(ASK).await;
        }
    }
}

/// Classifies a node's refusal, or the failure that it recorded.
fn by_failure(node: &NodeName, failure: Failure, retry_after: Option<Duration>) -> AttemptResult {
    let told = Failure { message: format!("node {node}: {}", failure.message), ..failure };
    if told.reason().is_not_here_not_now() {
        return AttemptResult::Refused(format!("{}: {}", told.reason(), told.message), retry_after);
    }
    let hopeless = matches!(
        told.reason(),
        Reason::FieldInvalid | Reason::TooLarge | Reason::ScopeMissing | Reason::RequestIdReused
    );
    if hopeless { AttemptResult::Hopeless(told) } else { AttemptResult::Fault(told) }
}
