//! Moves sandboxes from phase to phase.

use std::sync::Arc;

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
};

use super::{
    Error, Event, Sandboxes,
    migrate::on_its_way,
    next,
    operations::{
        Entry, OperationContext, OperationGuard, OperationHandle, OperationKind, OperationState,
        lost,
    },
    reads,
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Changes the record of a live sandbox, and nothing else.
    ///
    /// Runs on its own task: otherwise a caller that hangs up could leave the index behind the
    /// journal.
    pub(super) async fn amend_living(
        self: &Arc<Self>,
        id: &SandboxId,
        change: impl Fn(&mut Record) -> Result<(), Error> + Send + 'static,
    ) -> Result<Arc<Record>, Error> {
        self.living(&SandboxRef::Id(*id))?;
        let (sandboxes, id) = (Arc::clone(self), *id);
        let change = move |record: &mut Record| {
            if matches!(record.phase, Phase::Undoing | Phase::Deleting) || record.phase.ended() {
                return Err(reads::deleted(&SandboxRef::Id(record.id)));
            }
            on_its_way(record)?;
            change(record)
        };
        let changed = self.tasks.run(async move { sandboxes.records.amend(&id, change).await });
        changed.await.unwrap_or_else(|| Err(lost()))
    }

    /// Moves a sandbox to its next phase because of a request, with `more` in the same write.
    pub(super) async fn advance(
        &self,
        id: &SandboxId,
        event: Event,
        more: impl Fn(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        self.advance_because(id, event, Cause::ASKED, more).await
    }

    /// Moves a sandbox to its next phase, with the cause in the same write.
    pub(super) async fn advance_because(
        &self,
        id: &SandboxId,
        event: Event,
        cause: Cause,
        more: impl Fn(&mut Record),
    ) -> Result<Arc<Record>, Error> {
        let now = self.clock.moment();
        let record = self
            .records
            .amend(id, |record| {
                let from = record.phase;
                record.phase = next(from, event).ok_or_else(|| refused(record, event))?;
                if record.phase != from {
                    record.since = now.clone();
                    if let Some(cause) = told(event, cause) {
                        record.cause = cause;
                    }
                }
                if record.phase.ended() && !from.ended() {
                    record.ended_ms = self.now_ms().max(1);
                }
                more(record);
                Ok(())
            })
            .await?;
        if record.phase == Phase::Running {
            self.activity.used(id);
        }
        tracing::info!(
            sandbox_id = %record.id, vmid = %record.vmid, phase = ?record.phase,
            cause = record.cause.name(), "phase changed"
        );
        Ok(record)
    }

    /// Records how far an operation is. Runs in parallel to the step, so it takes no
    /// time; if the write is lost, the record only shows an older step.
    pub(super) async fn note(&self, id: &SandboxId, progress: Progress) {
        let noted = self
            .records
            .amend(id, |record| {
                record.progress = progress;
                Ok(())
            })
            .await;
        if let Err(error) = noted {
            tracing::warn!(sandbox_id = %id, %error, "step was not recorded");
        }
    }

    /// Enters an operation and runs `work` on its own task, or joins the one that is under way.
    pub(super) fn launch<F>(
        self: &Arc<Self>,
        id: SandboxId,
        kind: OperationKind,
        work: impl FnOnce(Arc<Self>, OperationContext) -> F,
    ) -> OperationHandle
    where
        F: Future<Output = Result<Arc<Record>, Error>> + Send + 'static,
    {
        match self.operations.enter(id, kind) {
            Entry::Joined(operation) => operation,
            Entry::New(guard, operation) => {
                self.run(guard, work);
                operation
            }
        }
    }

    /// Runs an operation that was entered before.
    pub(super) fn run<F>(
        self: &Arc<Self>,
        guard: OperationGuard,
        work: impl FnOnce(Arc<Self>, OperationContext) -> F,
    ) where
        F: Future<Output = Result<Arc<Record>, Error>> + Send + 'static,
    {
        let work = work(Arc::clone(self), guard.context());
        self.tasks.spawn(async move {
            let result = work.await;
            guard.done(result);
        });
    }

    /// Waits for an operation, at most `wait`; then returns the record as it is.
    pub(super) async fn outcome(
        &self,
        operation: OperationHandle,
        wait: std::time::Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = operation.id();
        match operation.ended(wait).await {
            OperationState::Done(result) => result,
            OperationState::UnderWay => self.get(&SandboxRef::Id(id)).await,
        }
    }
}

/// Cause to record with an event; `None` for events that complete what another one began.
const fn told(event: Event, cause: Cause) -> Option<Cause> {
    match event {
        // An operator stopped it, or it ended by itself; a more precise cause is kept.
        Event::FoundDown if matches!(cause, Cause::ASKED) => Some(Cause::FoundDown),
        Event::Rebooted => Some(Cause::NodeRebooted),
        Event::FoundUp => Some(Cause::FoundUp),
        Event::Released
        | Event::FoundDown
        | Event::CameUp
        | Event::StartAsked
        | Event::StartFailed
        | Event::PauseAsked
        | Event::ResumeAsked
        | Event::FreezeFailed
        | Event::StopAsked
        | Event::StopRefused
        | Event::DeleteAsked => Some(cause),
        Event::CreateFailed | Event::Undone | Event::WentDown | Event::Removed => None,
    }
}

pub(super) fn refused(record: &Record, event: Event) -> Error {
    let phase = reads::phase_word(record.phase);
    match (record.phase, event) {
        (Phase::Deleted | Phase::Deleting, _) => reads::deleted(&SandboxRef::Id(record.id)),
        (Phase::Paused, Event::StartAsked) => {
            Error::new(Reason::SandboxPaused, format!("{} is paused: resume it", record.id))
        }
        (_, Event::StartAsked | Event::StopAsked | Event::PauseAsked | Event::ResumeAsked) => {
            Error::new(Reason::SandboxNotRunning, format!("{} is {phase}", record.id))
        }
        _ => Error::new(
            Reason::Invariant,
            format!("{event:?} cannot happen to {}, which is {phase}", record.id),
        ),
    }
}
