//! One attempt of a creation on one node: sends it, follows it, and cancels it when it must end.

use std::{ops::ControlFlow, time::Duration};

use proto::{
    Cause, Reason,
    name::NodeName,
    sandbox::v1::{self as wire, Failure, HttpService, NodeLoad, Phase, Sandbox},
    spec::Egress,
    visibility::Visibility,
};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, sleep, timeout},
};

use super::{AttemptResult, Creation, POLL};
use crate::{
    node::{self, Node, Origin},
    sandbox::{RETRY, Sandboxes, WAIT, quota::why_not_kept},
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
    pub(super) async fn attempt(&self, creation: &mut Creation, name: &NodeName) -> AttemptResult {
        let mut step = if creation.maybe_sent { Step::Ask } else { Step::Send };
        let mut silent_since = Instant::now();
        let mut news = self.nodes.news();
        loop {
            news.mark_unchanged();
            // Looked up in each round: a node that has joined again may have another address.
            let Some(node) = self.nodes.get(name) else {
                if creation.maybe_sent {
                    // Not configured any more; a pending cancel waits for the node to come back.
                    sleep(RETRY).await;
                    return AttemptResult::Abandoned;
                }
                let why = "it is not in the configuration any more";
                return AttemptResult::Refused(why.into(), None);
            };
            if creation.spec.is_err() && !matches!(step, Step::Ask) {
                return self.cancel_attempt(creation, name).await;
            }
            if creation.spec.is_ok()
                && !creation.cancel.is_cancelled()
                && Instant::now() > creation.begun + self.options.deadline
            {
                creation.expired = true;
                creation.cancel.cancel();
            }
            if !creation.cancel.is_cancelled()
                && matches!(step, Step::Send)
                && (egress_of(creation) != wire::Egress::Open || has_guarded_ports(creation))
            {
                let silent = silent_since.elapsed() > self.options.patience;
                match self.before_bounded(creation, &node, silent, &mut news).await {
                    ControlFlow::Continue(None) => {}
                    ControlFlow::Continue(Some(next)) => {
                        step = next;
                        continue;
                    }
                    ControlFlow::Break(result) => return result,
                }
            }
            let answer = tokio::select! {
                biased;
                () = creation.cancel.cancelled() => {
                    return self.cancel_attempt(creation, name).await;
                }
                answer = self.ask(creation, &node, &step) => answer,
            };
            let next = match answer {
                Ok((sandbox, load)) => {
                    if sandbox.attempt == creation.order.attempt {
                        silent_since = Instant::now();
                    }
                    self.by_record(creation, &node, &step, sandbox, load).await
                }
                Err(error) => {
                    let silent = silent_since.elapsed() > self.options.patience;
                    self.by_error(creation, &node, (&step, silent), error, &mut news).await
                }
            };
            match next {
                ControlFlow::Continue(next) => step = next,
                ControlFlow::Break(result) => return result,
            }
        }
    }

    /// Decides before a sandbox is sent that must not reach everything: a node that cannot keep it from that
    /// would make it open. The node may have come back with an older agent since it was chosen, or not have
    /// said yet what it can. Continues with another step; `None`: it can be sent.
    async fn before_bounded(
        &self,
        creation: &Creation,
        node: &Node,
        silent: bool,
        news: &mut Receiver<u64>,
    ) -> ControlFlow<AttemptResult, Option<Step>> {
        match keeps(creation, node) {
            Some(true) => ControlFlow::Continue(None),
            Some(false) if !creation.maybe_sent => {
                let why = cannot_keep(creation, node);
                ControlFlow::Break(AttemptResult::Refused(why, None))
            }
            Some(false) => ControlFlow::Break(self.leave(creation, node).await),
            None if !creation.maybe_sent => {
                let why = "it is not connected any more";
                ControlFlow::Break(AttemptResult::Refused(why.into(), Some(RETRY)))
            }
            None if silent => ControlFlow::Break(AttemptResult::Abandoned),
            None => {
                tokio::select! {
                    () = creation.cancel.cancelled() => {}
                    () = sleep(RETRY) => {}
                    _ = async { sleep(ASK).await; news.changed().await } => {}
                }
                ControlFlow::Continue(Some(Step::Ask))
            }
        }
    }

    /// Takes an attempt back from a node that cannot keep its sandbox to its egress, so that it goes to another: a
    /// request that is still on its way there is then refused.
    async fn leave(&self, creation: &Creation, node: &Node) -> AttemptResult {
        let cancelled = self.cancel_attempt(creation, &node.name);
        match timeout(self.options.patience, cancelled).await {
            Ok(AttemptResult::Cancelled) if creation.cancel.is_cancelled() => {
                AttemptResult::Cancelled
            }
            Ok(AttemptResult::Cancelled) => {
                AttemptResult::Refused(cannot_keep(creation, node), None)
            }
            Ok(other) => other,
            Err(_) => AttemptResult::Abandoned,
        }
    }

    /// Decides by the record that the node has sent.
    async fn by_record(
        &self,
        creation: &mut Creation,
        node: &Node,
        step: &Step,
        sandbox: Sandbox,
        load: Option<NodeLoad>,
    ) -> ControlFlow<AttemptResult, Step> {
        // The node carried out this request before, under an id that our store has lost.
        if sandbox.id != creation.order.id.to_string() {
            self.nodes.apply(&node.name, sandbox.clone());
            return ControlFlow::Break(AttemptResult::Permanent(Failure {
                reason: Reason::RequestIdReused.into(),
                message: format!("this request made {} before; use that", sandbox.id),
                rollback: String::new(),
            }));
        }
        // Our store is an old copy: the sandbox came up and has moved since.
        if sandbox.cause() == Cause::Moved || sandbox.attempt > creation.order.attempt {
            return ControlFlow::Break(AttemptResult::Superseded(Box::new(sandbox)));
        }
        // The tombstone of an earlier attempt: the node has not received this one.
        if sandbox.attempt < creation.order.attempt {
            sleep(ASK).await;
            return ControlFlow::Continue(Step::Send);
        }
        if !matches!(step, Step::Follow) {
            self.nodes.admitted(node, &creation.order.id, load);
        }
        creation.maybe_sent = true;
        self.nodes.apply(&node.name, sandbox.clone());
        if is_admitted_too_open(creation, &sandbox) {
            tracing::error!(sandbox_id = %creation.order.id, node = %node.name,
                "node makes a sandbox that reaches more than it may; the attempt is taken back");
            return ControlFlow::Break(self.leave(creation, node).await);
        }
        match sandbox.phase() {
            Phase::Creating | Phase::Unspecified => {
                // A node that cannot continue now (just back, or without quorum) answers at once,
                // however long it was asked to wait.
                if matches!(step, Step::Follow) {
                    sleep(ASK).await;
                }
                ControlFlow::Continue(Step::Follow)
            }
            Phase::Failed => {
                let failure = sandbox.failure.unwrap_or_default();
                ControlFlow::Break(by_failure(&node.name, failure, None))
            }
            // The creation may have been cancelled, with a later attempt up elsewhere.
            Phase::Deleted if creation.resumed && self.nodes_may_know_more(creation) => {
                sleep(POLL).await;
                ControlFlow::Continue(Step::Ask)
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
                let over = creation.resumed && sandbox.phase() == Phase::Deleted;
                let later = if over { self.later_attempt(creation) } else { None };
                let running = || AttemptResult::Running(Box::new(sandbox));
                ControlFlow::Break(later.map_or_else(running, AttemptResult::Superseded))
            }
        }
    }

    /// Decides by a refusal, or by the lack of an answer. `silent`: the node has not answered for
    /// longer than this is put up with.
    async fn by_error(
        &self,
        creation: &mut Creation,
        node: &Node,
        (step, silent): (&Step, bool),
        error: node::Error,
        news: &mut Receiver<u64>,
    ) -> ControlFlow<AttemptResult, Step> {
        self.nodes.fence_if_replaced(&error);
        if self.nodes.epoch.fenced() {
            return ControlFlow::Break(AttemptResult::Replaced);
        }
        match error {
            ref unknown if unknown.is_not_found() && !matches!(step, Step::Send) => {
                // The attempt never arrived. It may go to the same node again.
                sleep(ASK).await;
                ControlFlow::Continue(Step::Send)
            }
            node::Error::Refused { reason, message, retry_after, .. } => {
                if reason == Reason::SandboxBusy {
                    // An earlier, abandoned attempt is still there.
                    self.cancel_earlier(creation, node).await;
                }
                let failure = Failure { reason: reason.into(), message, rollback: String::new() };
                ControlFlow::Break(by_failure(&node.name, failure, retry_after))
            }
            // No earlier request has arrived anywhere.
            node::Error::Unreachable(why) if !creation.maybe_sent => {
                ControlFlow::Break(AttemptResult::Refused(why, Some(RETRY)))
            }
            node::Error::Unreachable(_)
            | node::Error::Unknown(_)
            | node::Error::Silent(_)
            | node::Error::Nonsense(_) => {
                if !creation.maybe_sent || matches!(step, Step::Send) {
                    tracing::warn!(sandbox_id = %creation.order.id, node = %node.name, %error,
                        "outcome of a creation is unknown, asking the node");
                    self.nodes.trip(node);
                }
                creation.maybe_sent = true;
                if silent && node.down().is_some() {
                    return ControlFlow::Break(AttemptResult::Abandoned);
                }
                tokio::select! {
                    () = creation.cancel.cancelled() => {}
                    () = sleep(RETRY) => {}
                    // The node may be back.
                    _ = async { sleep(ASK).await; news.changed().await } => {}
                }
                ControlFlow::Continue(Step::Ask)
            }
        }
    }

    async fn ask(
        &self,
        creation: &Creation,
        node: &Node,
        step: &Step,
    ) -> Result<(Sandbox, Option<NodeLoad>), node::Error> {
        let epoch = self.nodes.epoch.get();
        match step {
            // Answered as soon as the node has admitted it, which keeps the uncertain time short.
            Step::Send => node.client.create(epoch, &creation.order, Duration::ZERO).await,
            Step::Follow => {
                // It waits there as long as its team has places for that; without one it only asks how far it is,
                // and does so again and again.
                let place = node.client.calls(Origin::Creation, &creation.team).ok();
                let wait = place.as_ref().map_or(Duration::ZERO, |_| WAIT);
                let answer = node.client.create(epoch, &creation.order, wait).await;
                drop(place);
                answer
            }
            Step::Ask => node.client.get(&creation.order.id).await.map(|sandbox| (sandbox, None)),
        }
    }

    /// Cancels the earlier attempts. A failure here is repeated with the next try.
    async fn cancel_earlier(&self, creation: &Creation, node: &Node) {
        let before = creation.order.attempt - 1;
        if let Err(error) = self.cancel_on(creation, node, before).await {
            tracing::warn!(sandbox_id = %creation.order.id, node = %node.name, %error,
                "could not cancel an abandoned attempt");
        }
    }

    /// Cancels the attempts up to `attempt` on the node. Returns the sandbox that the node holds, if any.
    async fn cancel_on(
        &self,
        creation: &Creation,
        node: &Node,
        attempt: u32,
    ) -> node::Result<Option<Sandbox>> {
        // The node answers when the attempt is undone, which takes its time.
        let place = node.client.calls(Origin::Controller, &creation.team)?;
        let epoch = self.nodes.epoch.get();
        let held = node.client.cancel_create(epoch, &creation.order.id, attempt).await;
        drop(place);
        held
    }

    /// Ends a sandbox that had come up before its creation was cancelled.
    async fn delete_on(&self, creation: &Creation, node: &Node) -> node::Result<Sandbox> {
        let calls = node.client.calls(Origin::Controller, &creation.team)?;
        calls.delete(self.nodes.epoch.get(), &creation.order.id, WAIT).await
    }

    /// Removes the attempt from the node. Retries until the node is not known any more: a requested deletion stays
    /// wanted.
    pub(in crate::sandbox::create) async fn cancel_attempt(
        &self,
        creation: &Creation,
        name: &NodeName,
    ) -> AttemptResult {
        let id = &creation.order.id;
        loop {
            // As in `attempt`.
            let Some(node) = self.nodes.get(name) else { return AttemptResult::Abandoned };
            let held = match self.cancel_on(creation, &node, creation.order.attempt).await {
                Ok(held) => held,
                Err(error) if error.is_not_found() => None,
                Err(error) => {
                    self.nodes.fence_if_replaced(&error);
                    if self.nodes.epoch.fenced() {
                        return AttemptResult::Replaced;
                    }
                    tracing::warn!(sandbox_id = %id, node = %name, %error,
                        "could not cancel a creation, trying again");
                    sleep(RETRY).await;
                    continue;
                }
            };
            match held.as_ref().map(Sandbox::phase) {
                None | Some(Phase::Failed | Phase::Deleted) => return AttemptResult::Cancelled,
                // The sandbox had come up before.
                Some(Phase::Running | Phase::Paused | Phase::Stopped) => {
                    if let Err(error) = self.delete_on(creation, &node).await {
                        tracing::warn!(sandbox_id = %id, node = %name, %error,
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

/// Egress that the sandbox must have.
fn egress_of(creation: &Creation) -> wire::Egress {
    let asked = creation.spec.as_ref().ok().and_then(|spec| spec.egress.as_ref());
    match asked.map(wire::Egress::from) {
        None | Some(wire::Egress::Unspecified) => wire::Egress::Open,
        Some(egress) => egress,
    }
}

/// True when the sandbox has open ports that not everybody may reach.
fn has_guarded_ports(creation: &Creation) -> bool {
    let spec = creation.spec.as_ref().ok();
    spec.is_some_and(|spec| spec.visibility.values().any(|one| *one != Visibility::Public))
}

/// Returns whether the node can bound the sandbox as it must be; `None` while that is not known.
fn keeps(creation: &Creation, node: &Node) -> Option<bool> {
    let guards = if has_guarded_ports(creation) { node.guards_ports() } else { Some(true) };
    match (node.keeps_to(egress_of(creation)), guards) {
        (Some(false), _) | (_, Some(false)) => Some(false),
        (Some(true), Some(true)) => Some(true),
        (None, _) | (_, None) => None,
    }
}

/// Returns true when the node has admitted a sandbox that reaches, or lets itself be reached by, more than was asked
/// for: its agent was replaced by one that does not know of it, and this was not noticed before. Nobody has seen such
/// a sandbox yet. One that runs is never judged after a restart of the controller: over an old copy of the store its
/// creation seems to go on, and its user may have opened it since.
fn is_admitted_too_open(creation: &Creation, sandbox: &Sandbox) -> bool {
    let unseen = match sandbox.phase() {
        Phase::Creating => true,
        Phase::Running | Phase::Paused | Phase::Starting | Phase::Stopping | Phase::Stopped => {
            !creation.resumed
        }
        Phase::Unspecified
        | Phase::Failed
        | Phase::Deleting
        | Phase::Deleted
        | Phase::Unreachable => false,
    };
    unseen && !is_as_asked(creation, sandbox)
}

/// True when the node lets the sandbox reach, and be reached by, no more than was asked for.
fn is_as_asked(creation: &Creation, sandbox: &Sandbox) -> bool {
    let says_nothing =
        |service: &HttpService| service.visibility() == wire::Visibility::Unspecified;
    if has_guarded_ports(creation) && sandbox.services.iter().any(says_nothing) {
        return false;
    }
    let asked = creation.spec.as_ref().ok().and_then(|spec| spec.egress.as_ref());
    let has = Egress::read(sandbox.egress, &sandbox.egress_names, "egress");
    // Without a word it is open.
    let has = has.map(Option::unwrap_or_default);
    asked.is_none_or(|asked| has.is_ok_and(|has| asked.covers(&has)))
}

/// Explains why a node does not get the sandbox.
fn cannot_keep(creation: &Creation, node: &Node) -> String {
    if has_guarded_ports(creation) && node.guards_ports() == Some(false) {
        return "its agent is too old: every open port there is public".into();
    }
    format!("it {}", why_not_kept(egress_of(creation)))
}

/// Classifies a node's refusal, or the failure that it recorded.
fn by_failure(node: &NodeName, failure: Failure, retry_after: Option<Duration>) -> AttemptResult {
    let failure = Failure { message: format!("node {node}: {}", failure.message), ..failure };
    if failure.reason().is_node_refusal() {
        return AttemptResult::Refused(
            format!("{}: {}", failure.reason(), failure.message),
            retry_after,
        );
    }
    let reason_not_to_wait = matches!(
        failure.reason(),
        Reason::FieldInvalid | Reason::TooLarge | Reason::ScopeMissing | Reason::RequestIdReused
    );
    if reason_not_to_wait {
        AttemptResult::Permanent(failure)
    } else {
        AttemptResult::Fault(failure)
    }
}
