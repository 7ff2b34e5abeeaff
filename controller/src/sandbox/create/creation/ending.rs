//! The end of a creation: its outcome in the store, in the event log, and then in sight.

use prost::Message;
use proto::{
    Reason,
    id::SandboxRef,
    sandbox::v1::{EventKind, Failure, Phase},
};

use super::{Creation, Outcome};
use crate::{events as log, sandbox::Sandboxes, store::Event};

impl Sandboxes {
    /// Records the outcome, then shows it.
    pub(super) async fn finish(&self, creation: &Creation, end: Outcome) {
        let id = creation.order.id;
        let now_ms = self.clock.now_ms();
        let held = self.nodes.cache.get(&SandboxRef::Id(id)).map(|entry| entry.sandbox);
        let mut sandbox = held.unwrap_or_default();
        match end {
            Outcome::Up(up) => {
                sandbox = *up;
                let last = sandbox.encode_to_vec();
                let by = self.log().attributed_to(&id, EventKind::Created);
                let by = by.unwrap_or_else(|| log::CONTROLLER.to_owned());
                let mut events = vec![Event {
                    node: sandbox.node.parse().ok(),
                    node_revision: sandbox.revision,
                    ..self.once(creation, EventKind::Created, &by)
                }];
                events.extend(self.nodes.events_since_up(id, &creation.team, &sandbox));
                // Durable before it is visible: a sandbox seen running is never moved.
                let done = || self.store.done(&id, last.clone(), events.clone());
                let revision = self.persist(done).await;
                self.log().reached(revision);
                tracing::info!(sandbox_id = %id, node = sandbox.node, vmid = sandbox.vmid,
                    attempt = creation.order.attempt, "sandbox is up");
            }
            Outcome::Failed(failure) => {
                tracing::warn!(sandbox_id = %id, reason = %failure.reason(), message = failure.message,
                    rollback = failure.rollback, "creation failed");
                let released = failure.reason().is_node_refusal();
                self.ended(creation, EventKind::CreateFailed, &failure);
                sandbox.set_phase(Phase::Failed);
                sandbox.failure = Some(failure);
                let last = sandbox.encode_to_vec();
                self.persist(|| self.log().flushed()).await;
                self.persist(|| self.store.failed(&id, last.clone(), released, now_ms)).await;
                self.nodes.release(&id);
            }
            Outcome::Cancelled => {
                tracing::info!(sandbox_id = %id, "creation cancelled");
                sandbox.set_phase(Phase::Deleted);
                let failure = Failure {
                    reason: Reason::CreateCancelled.into(),
                    message: "the creation was cancelled".into(),
                    rollback: String::new(),
                };
                self.ended(creation, EventKind::Deleted, &failure);
                sandbox.failure = Some(failure);
                let last = sandbox.encode_to_vec();
                self.persist(|| self.log().flushed()).await;
                self.persist(|| self.store.failed(&id, last.clone(), false, now_ms)).await;
                self.nodes.release(&id);
            }
            Outcome::Gone => self.nodes.release(&id),
            // Our state of the sandbox may be outdated.
            Outcome::Replaced => {
                self.creations.lock().remove(&id);
                return;
            }
        }
        self.nodes.settle(&id, sandbox);
        self.creations.lock().remove(&id);
    }

    /// Builds an event of a creation.
    pub(super) fn event_of(&self, creation: &Creation, kind: EventKind, actor: &str) -> Event {
        Event {
            sandbox: Some(creation.order.id),
            team: Some(creation.team.clone()),
            ..self.log().event(kind, actor)
        }
    }

    /// As `event_of`, for a kind that occurs once per sandbox, even if a crash repeats the end.
    fn once(&self, creation: &Creation, kind: EventKind, actor: &str) -> Event {
        let once = Some(format!("{} {}", creation.order.id, kind.as_str_name()));
        Event { once, ..self.event_of(creation, kind, actor) }
    }

    /// Logs that a creation failed or was cancelled.
    fn ended(&self, creation: &Creation, kind: EventKind, failure: &Failure) {
        let by = self.log().attributed_to(&creation.order.id, kind);
        let by = by.unwrap_or_else(|| log::CONTROLLER.to_owned());
        self.log().append(Event {
            why: failure.reason().into(),
            detail: failure.message.clone(),
            ..self.once(creation, kind, &by)
        });
    }
}
