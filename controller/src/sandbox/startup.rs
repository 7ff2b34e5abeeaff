//! Start-up: loads the stored sandboxes and continues creations that were under way with the code
//! that began them. Also begins the two background tasks of the store: write-behind, which is here, and retention.

use std::sync::Arc;

use prost::Message;
use proto::{
    Reason,
    id::Invalid,
    sandbox::v1::{CreateSandboxRequest, Failure, Phase, Sandbox},
};

use super::{
    Sandboxes,
    create::{self, Creation},
    quota::Creator,
};
use crate::{
    inventory::Entry,
    node::CreateOrder,
    store::{self, KnownState, Row, State},
};

/// Most rows in one write.
const BATCH: usize = 256;

impl Sandboxes {
    pub(super) async fn load(self: &Arc<Self>) -> Result<(), store::Error> {
        let last = self.store.before_last(store::Filter::default(), 0).await?;
        self.log().reached(last);
        let mut last = None;
        loop {
            let rows = self.store.after(last, store::ROWS).await?;
            let Some(row) = rows.last() else { break };
            last = Some(row.id);
            rows.into_iter().for_each(|row| self.recall(row));
        }
        for (team, limits) in self.store.team_limits().await? {
            self.quotas.set_own(&team, limits);
        }
        self.nodes.loaded();
        let (this, stop) = (self.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            // A write under way always ends: without its result it would be repeated.
            tokio::join!(this.write_behind_loop(), stop.run_until_cancelled(this.retention_loop()));
        });
        Ok(())
    }

    fn recall(self: &Arc<Self>, row: Row) {
        let request = CreateSandboxRequest::decode(row.request.as_slice()).unwrap_or_default();
        let last = Sandbox::decode(row.last.as_slice()).ok().filter(|last| !last.id.is_empty());
        let size = last.as_ref().and_then(|last| last.size);
        let mut sandbox = match last {
            Some(last) if row.state != State::Placing => last,
            // The row knows where the creation is now, and the placeholder what was asked for.
            Some(last) if row.request.is_empty() => create::placeholder(&row, &create::shown(last)),
            _ => create::placeholder(&row, &request),
        };
        sandbox.size = size.or(sandbox.size);
        // A row without a digest was rebuilt from a node: nobody asked for it here.
        if !row.digest.is_empty() {
            let (team, user, at_ms) = (&row.team, row.user.as_ref(), row.created_ms);
            self.quotas.recall(Creator { team, user, at_ms }, self.clock.now_ms());
        }
        match row.state {
            State::Placing => self.resume_creation(row, request, sandbox),
            State::Done => {
                // Without a report of its node only the intent is known: it may not run.
                if sandbox.phase() == Phase::Creating {
                    sandbox.set_phase(Phase::Unreachable);
                }
                // Made there, and not moved, adopted or recovered: the number is from the node's own range.
                let made_there = row.node.filter(|node| {
                    !row.digest.is_empty() && row.ended_ms == 0 && node.as_str() == sandbox.node
                });
                if let (Some(node), 1..) = (made_there, sandbox.vmid) {
                    self.nodes.gave_vmid(&node, sandbox.vmid);
                }
                self.nodes.cache.restore(row.id, row.team, sandbox, row.ended_ms);
            }
            State::Failed => self.nodes.cache.restore(row.id, row.team, sandbox, row.ended_ms),
        }
    }

    /// Continues a creation that was under way. One whose request cannot be read is brought to its end.
    fn resume_creation(
        self: &Arc<Self>,
        row: Row,
        request: CreateSandboxRequest,
        sandbox: Sandbox,
    ) {
        let spec = create::check(&request).map_err(|error| lost(&row, &error));
        match &spec {
            Ok(_) => tracing::info!(sandbox_id = %row.id, "creation resumed"),
            Err(lost) => tracing::error!(sandbox_id = %row.id, why = lost.message,
                "creation under way cannot go on and is cancelled"),
        }
        self.nodes.cache.begin(row.id, row.team.clone(), sandbox);
        let (id, team, digest) = (row.id, row.team.to_string(), row.digest);
        let port_rules = self.options.exposure.port_rules();
        let order = CreateOrder { id, team, attempt: row.attempt, digest, request, port_rules };
        let creation = Creation::new(order, row.team, spec, row.node).resumed(row.cancelled);
        self.creations.lock().insert(row.id, creation.cancel.clone());
        let (this, stop) = (self.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            stop.run_until_cancelled_owned(Box::pin(this.make(creation))).await;
        });
    }

    /// Writes states and events behind, so that a sandbox whose node is down is known after a
    /// restart. Many changes share a write; the node reports again what a lost write contained.
    async fn write_behind_loop(&self) {
        loop {
            tokio::select! {
                () = self.nodes.cache.dirty() => {}
                () = self.log().waits() => {}
                () = self.stop.cancelled() => return,
            }
            if !self.write_behind_once().await {
                // The controller in charge gets it from the nodes.
                if self.nodes.epoch.fenced() {
                    return;
                }
                let pause = tokio::time::sleep(super::RETRY);
                self.stop.run_until_cancelled(pause).await;
            }
        }
    }

    /// Writes the rest of the event log, at the end.
    pub(crate) async fn write_behind(&self) {
        while !self.log().pending().is_empty() && self.write_behind_once().await {}
    }

    /// Writes once, one writer at a time: what it wrote must be the front of the queue.
    async fn write_behind_once(&self) -> bool {
        let _alone = self.writing.lock().await;
        let (entries, events) = self.nodes.cache.take_dirty(BATCH, || self.log().pending());
        let states = entries.iter().filter_map(known_state).collect();
        let count = events.len();
        match self.store.put_states(states, events).await {
            Ok(last) => {
                self.log().wrote(count, last);
                true
            }
            Err(error) => {
                if error == store::Error::Replaced {
                    self.nodes.epoch.fence();
                }
                tracing::error!(%error, "could not write states and events, trying again");
                self.nodes.cache.mark_dirty(entries.iter().map(|entry| entry.id));
                false
            }
        }
    }
}

/// Says why a stored creation cannot go on.
fn lost(row: &Row, error: &Invalid) -> Failure {
    let (reason, message) = if row.request.is_empty() {
        let message = "the controller has lost the key that sealed its request, so it cannot go on: \
                       create another, with a new request_id";
        (Reason::EnvLost, message.to_owned())
    } else {
        (Reason::StoreFailed, format!("its request in the store is damaged: {error}"))
    };
    Failure { reason: reason.into(), message, rollback: String::new() }
}

fn known_state(entry: &Entry) -> Option<KnownState> {
    let sandbox = &entry.sandbox;
    let created = sandbox.created_at.as_ref().map_or(0, |at| {
        u64::try_from(at.seconds).unwrap_or_default() * 1000
            + u64::try_from(at.nanos).unwrap_or_default() / 1_000_000
    });
    Some(KnownState {
        id: entry.id,
        team: entry.team.clone(),
        request_id: sandbox.request_id.parse().ok()?,
        node: entry.node.clone()?,
        attempt: sandbox.attempt,
        created_ms: created,
        ended_ms: entry.ended_ms,
        last: sandbox.encode_to_vec(),
    })
}
