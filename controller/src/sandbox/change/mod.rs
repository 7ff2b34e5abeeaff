//! Changes that callers ask for of a sandbox that exists. Its node carries them out.

mod delete;
mod expose;
mod links;
mod pause;
mod start;
mod stop;
mod update;

pub(super) use expose::LostExposures;

use std::{sync::Arc, time::Duration};

use futures_util::TryFutureExt as _;
use proto::{
    Progress, Reason,
    id::SandboxId,
    sandbox::v1::{EventKind, Sandbox},
};

use crate::{
    inventory::Entry,
    node::{self, GrowthGuard, Node, SandboxCalls},
    placement::{Growth, NoRoom},
    sandbox::{Caller, Error, Result, Sandboxes},
    store::Event,
};

/// Time after which a full node may have room again.
const ROOM_RETRY: Duration = Duration::from_secs(2);

/// Events of a change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    /// Event that records the request, if there is one.
    pub(super) asked: Option<EventKind>,
    /// Events of the node that are attributed to the caller.
    pub(super) effects: &'static [EventKind],
    /// Whether the rate of changes refuses it. What only ends or closes something counts, and is not refused:
    /// a team must be able to stop what runs away.
    pub(super) is_bounded: bool,
}

impl Sandboxes {
    /// Carries out a change of a sandbox of the caller's team that is neither being created nor
    /// deleted, to its end. `call` is made with the epoch of this controller; its place on the node is held until it
    /// ends.
    async fn change<F>(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        change: Change,
        call: impl FnOnce(SandboxCalls, u64, SandboxId) -> F + Send + 'static,
    ) -> Result<Sandbox>
    where
        F: Future<Output = Result<Sandbox, node::Error>> + Send + 'static,
    {
        let call = move |calls: SandboxCalls, epoch: u64, id: SandboxId| {
            call(calls, epoch, id).map_ok(|sandbox| (sandbox, ()))
        };
        self.change_with(caller, id, change, call).await.map(|(sandbox, ())| sandbox)
    }

    /// As `change`, for a call whose answer has more than the sandbox.
    async fn change_with<T, F>(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        change: Change,
        call: impl FnOnce(SandboxCalls, u64, SandboxId) -> F + Send + 'static,
    ) -> Result<(Sandbox, T)>
    where
        T: Send + 'static,
        F: Future<Output = Result<(Sandbox, T), node::Error>> + Send + 'static,
    {
        let (this, caller, id) = (Arc::clone(self), caller.clone(), id.to_owned());
        let changed = self.to_its_end(caller.permit.clone(), async move {
            this.may_change()?;
            let (entry, node) = this.on_node(&caller.team, &id)?;
            let calls = this.calls(&node, &entry.team)?;
            let at_ms = this.clock.now_ms();
            this.quotas.admit_change(&caller.team, at_ms, change.is_bounded)?;
            this.log_request(&caller, &entry, change);
            let answer = call(calls, this.nodes.epoch.get(), entry.id).await;
            if matches!(answer, Err(node::Error::Refused { .. } | node::Error::Unreachable(_))) {
                // It was not carried out.
                this.quotas.take_back_change(&caller.team, at_ms);
            }
            this.finish_change(&entry, &node, change, answer).await
        });
        changed.await
    }

    /// Reserves what a sandbox takes more of its node, by the bounds that a creation has.
    fn admit_growth(&self, node: &Arc<Node>, growth: &Growth) -> Result<GrowthGuard> {
        self.nodes.grow(node, growth).map_err(|NoRoom { reason, message }| {
            let error = Error::new(reason, format!("node {} {message}", node.name));
            if reason == Reason::NeverFits { error } else { error.retry(ROOM_RETRY) }
        })
    }

    /// Records a requested change before its node receives it.
    pub(super) fn log_request(&self, caller: &Caller, entry: &Entry, change: Change) {
        self.log().ask(entry.id, change.effects, &caller.token);
        if let Some(kind) = change.asked {
            self.log().append(Event {
                sandbox: Some(entry.id),
                team: Some(entry.team.clone()),
                node: entry.node.clone(),
                ..self.log().event(kind, &caller.token)
            });
        }
    }

    /// Finishes a change: returns the known state, which is at least as new as the node's answer, with the rest of
    /// that. The change is logged before the caller gets the answer.
    pub(super) async fn finish_change<T>(
        &self,
        entry: &Entry,
        node: &Node,
        change: Change,
        answer: Result<(Sandbox, T), node::Error>,
    ) -> Result<(Sandbox, T)> {
        let may_follow = match &answer {
            Ok((sandbox, _)) => {
                self.nodes.apply(&node.name, sandbox.clone());
                sandbox.phase().is_changing() || sandbox.progress() == Progress::Resize
            }
            Err(node::Error::Refused { .. } | node::Error::Unreachable(_)) => false,
            Err(node::Error::Unknown(_) | node::Error::Silent(_) | node::Error::Nonsense(_)) => {
                true
            }
        };
        if !may_follow {
            self.log().unask(&entry.id, change.effects);
        }
        self.log_flushed().await;
        match answer {
            Ok((sandbox, more)) => Ok((self.view(&entry.id).unwrap_or(sandbox), more)),
            Err(error) => Err(self.node_error(node, error)),
        }
    }
}
