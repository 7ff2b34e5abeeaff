//! Moves sandboxes from phase to phase.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    sandbox::v1::StopResult,
};
use tokio::time::Instant;

use super::{
    operations::{
        Entry, OperationContext, OperationGuard, OperationHandle, OperationKind, OperationState,
        lost,
    },
    queries,
};
use crate::{
    journal::{Phase, Record},
    sandbox::{Error, Event, Result, Sandboxes, next},
};

/// Work of an operation, which ends with the record as it left it.
pub(crate) type Work<'a> = BoxFuture<'a, Result<Arc<Record>>>;

/// Most launches of an operation after one of its kind that it had joined.
const LAUNCHES_MAX: usize = 5;

impl Sandboxes {
    /// Runs a change on a task of its own and waits for it: it runs to its end though its caller hangs up.
    pub(in crate::sandbox) async fn run_to_end<T, F>(
        self: &Arc<Self>,
        work: impl FnOnce(Arc<Self>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let ended = self.tasks.run(work(Arc::clone(self)));
        ended.await.unwrap_or_else(|| Err(lost()))
    }

    /// Changes the record of a live sandbox, and nothing else.
    ///
    /// Runs on its own task: otherwise a caller that hangs up could leave the index behind the
    /// journal. A caller that has more to do after the change does all of it in one `run_to_end`.
    pub(in crate::sandbox) async fn amend_living(
        self: &Arc<Self>,
        id: &SandboxId,
        change: impl Fn(&mut Record) -> Result<()> + Send + 'static,
    ) -> Result<Arc<Record>> {
        self.living(&SandboxRef::Id(*id))?;
        let id = *id;
        let change = move |record: &mut Record| {
            if record.phase.is_ending() {
                return Err(queries::deleted(&SandboxRef::Id(record.id)));
            }
            refuse_exported(record)?;
            change(record)
        };
        self.run_to_end(|sandboxes| async move { sandboxes.records.amend(&id, change).await }).await
    }

    /// Moves a sandbox to its next phase because of a request, with `more` in the same write.
    pub(in crate::sandbox) async fn advance(
        &self,
        id: &SandboxId,
        event: Event,
        more: impl Fn(&mut Record),
    ) -> Result<Arc<Record>> {
        self.advance_because(id, event, Cause::ASKED, more).await
    }

    /// Moves a sandbox to its next phase, with the cause in the same write.
    pub(in crate::sandbox) async fn advance_because(
        &self,
        id: &SandboxId,
        event: Event,
        cause: Cause,
        more: impl Fn(&mut Record),
    ) -> Result<Arc<Record>> {
        let now = self.clock.moment();
        let record = self
            .records
            .amend(id, |record| {
                let from = record.phase;
                record.phase = next(from, event).ok_or_else(|| refused(record, event))?;
                if record.phase != from {
                    record.since = now.clone();
                    (record.halt_by, record.stop_result) = (None, StopResult::Unspecified);
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
            self.activity.used(id, Duration::ZERO);
        }
        tracing::info!(
            sandbox_id = %record.id, vmid = %record.vmid, phase = ?record.phase,
            cause = record.cause.name(), "phase changed"
        );
        Ok(record)
    }

    /// Records how far an operation is. Runs in parallel to the step, so it takes no
    /// time; if the write is lost, the record only shows an older step.
    pub(in crate::sandbox) async fn note(&self, id: &SandboxId, progress: Progress) {
        let noted = self.records.change(id, |record| record.progress = progress).await;
        if let Err(error) = noted {
            tracing::warn!(sandbox_id = %id, %error, "step was not recorded");
        }
    }

    /// Enters an operation and runs `work` on its own task, or joins the one that is under way.
    pub(in crate::sandbox) fn launch<F>(
        self: &Arc<Self>,
        id: SandboxId,
        kind: OperationKind,
        work: impl FnOnce(Arc<Self>, OperationContext) -> F,
    ) -> OperationHandle
    where
        F: Future<Output = Result<Arc<Record>>> + Send + 'static,
    {
        match self.operations.enter(id, kind) {
            Entry::Joined(operation) => operation,
            Entry::New(guard, operation) => {
                self.run(guard, work);
                operation
            }
        }
    }

    /// Launches an operation with its cause. What a caller asked for leads to `reached`, though it joins an expiry of
    /// the same kind that is not due any more when its turn comes and that leaves the sandbox as it is: then it begins
    /// again, also when the caller has hung up.
    pub(in crate::sandbox) fn launch_because<F, W>(
        self: &Arc<Self>,
        cause: Cause,
        (id, kind): (SandboxId, OperationKind),
        reached: fn(&Record) -> bool,
        work: W,
    ) -> OperationHandle
    where
        F: Future<Output = Result<Arc<Record>>> + Send + 'static,
        W: Fn(Arc<Self>, OperationContext) -> F + Send + 'static,
    {
        let joined = match self.operations.enter(id, kind) {
            Entry::New(guard, operation) => {
                self.run(guard, work);
                return operation;
            }
            // An expiry that joins another one has nothing to insist on.
            Entry::Joined(operation) if cause != Cause::ASKED => return operation,
            Entry::Joined(operation) => operation,
        };
        let (operation, continuation) = joined.continued();
        let sandboxes = Arc::clone(self);
        self.tasks.spawn(async move {
            continuation.done(sandboxes.insist(joined, kind, reached, work).await);
        });
        operation
    }

    /// Waits for an operation that was joined, and launches it again until the sandbox is where it is to be.
    async fn insist<F, W>(
        self: Arc<Self>,
        mut operation: OperationHandle,
        kind: OperationKind,
        reached: fn(&Record) -> bool,
        work: W,
    ) -> Result<Arc<Record>>
    where
        F: Future<Output = Result<Arc<Record>>> + Send + 'static,
        W: Fn(Arc<Self>, OperationContext) -> F + Send + 'static,
    {
        let id = operation.id();
        let mut launches = 0;
        loop {
            let record = operation.result().await?;
            if reached(&record) {
                return Ok(record);
            }
            if self.tasks.stopping().is_cancelled() {
                return Err(lost());
            }
            if launches == LAUNCHES_MAX {
                let why = format!("an expiry of {id} came first each time: ask again");
                return Err(
                    Error::new(Reason::SandboxBusy, why).retry_after(Duration::from_secs(2))
                );
            }
            launches += 1;
            operation = self.launch(id, kind, &work);
        }
    }

    /// Launches an operation that does its work in the sandbox's turn.
    pub(in crate::sandbox) fn launch_in_turn(
        self: &Arc<Self>,
        id: &SandboxId,
        kind: OperationKind,
        work: impl for<'a> FnOnce(&'a Arc<Self>, &'a SandboxId) -> Work<'a> + Send + 'static,
    ) -> OperationHandle {
        let id = *id;
        self.launch(id, kind, |sandboxes, context| async move {
            let _turn = context.turn(Instant::now() + sandboxes.options.limits.turn).await?;
            work(&sandboxes, &id).await
        })
    }

    /// Launches an operation in the sandbox's turn, and waits for its outcome.
    pub(in crate::sandbox) async fn operate(
        self: &Arc<Self>,
        id: &SandboxId,
        kind: OperationKind,
        wait: Duration,
        work: impl for<'a> FnOnce(&'a Arc<Self>, &'a SandboxId) -> Work<'a> + Send + 'static,
    ) -> Result<Arc<Record>> {
        let operation = self.launch_in_turn(id, kind, work);
        self.outcome(operation, wait).await
    }

    /// Runs an operation that was entered before.
    pub(in crate::sandbox) fn run<F>(
        self: &Arc<Self>,
        guard: OperationGuard,
        work: impl FnOnce(Arc<Self>, OperationContext) -> F,
    ) where
        F: Future<Output = Result<Arc<Record>>> + Send + 'static,
    {
        let work = work(Arc::clone(self), guard.context());
        self.tasks.spawn(async move {
            let result = work.await;
            guard.done(result);
        });
    }

    /// Waits for an operation, at most `wait`; then returns the record as it is.
    pub(in crate::sandbox) async fn outcome(
        &self,
        operation: OperationHandle,
        wait: Duration,
    ) -> Result<Arc<Record>> {
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

pub(crate) fn refused(record: &Record, event: Event) -> Error {
    let phase = record.phase;
    match (phase, event) {
        (Phase::Deleted | Phase::Deleting, _) => queries::deleted(&SandboxRef::Id(record.id)),
        (Phase::Paused, Event::StartAsked) => {
            Error::new(Reason::SandboxPaused, format!("{} is paused: resume it", record.id))
        }
        (_, Event::StartAsked | Event::StopAsked | Event::PauseAsked | Event::ResumeAsked) => {
            Error::new(Reason::SandboxNotRunning, format!("{} is {phase}", record.id))
        }
        _ => Error::new(
            Reason::Invariant,
            format!("{event} cannot happen to {}, which is {phase}", record.id),
        ),
    }
}

/// Refuses a change that the other node would not learn of.
pub(crate) fn refuse_exported(record: &Record) -> Result<()> {
    if record.progress != Progress::Export {
        return Ok(());
    }
    let why =
        format!("{} is on its way to another node: ask again, or drain its node again", record.id);
    Err(Error::new(Reason::SandboxBusy, why).retry_after(Duration::from_secs(1)))
}
