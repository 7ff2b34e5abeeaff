//! Operations under way. One at a time works on a sandbox. A second request for the same operation
//! joins the first; another kind waits for its turn. Each runs on its own task, so a caller that
//! hangs up cancels nothing. A caller who joins an expiry is not left with one that was not due any
//! more: `launch_because` begins again then.

use std::{collections::HashMap, sync::Arc, time::Duration};

use daemon::{
    keyed_lock::{Guard, KeyedLock},
    sync::Mutex,
};
use proto::{Reason, id::SandboxId};
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::Record,
    sandbox::{Error, Result},
};

/// Kind of an operation on a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OperationKind {
    /// Creates the sandbox.
    Create,
    /// Rolls back a creation that a crash cut short.
    Undo,
    /// Boots the container.
    Start,
    /// Stops the container.
    Stop,
    /// Freezes the container.
    Pause,
    /// Freezes the container, or stops it if that fails.
    PauseOrStop,
    /// Thaws the container.
    Resume,
    /// Freezes or thaws the container, as its phase says.
    EnforcePause,
    /// Changes the size of the container.
    Resize,
    /// Deletes the sandbox.
    Delete,
    /// Compares the container with its record.
    Look,
    /// Makes a sandbox of an existing container.
    Adopt,
    /// Ends the record and keeps the container.
    Release,
    /// Gives the container to another node.
    ExportSandbox,
    /// Ends the record after another node took over the container.
    ForgetMoved,
}

#[derive(Debug, Clone)]
enum Progress {
    Begun,
    Recorded,
    Done(Result<Arc<Record>>),
}

/// Handle of an operation, to wait for it or to cancel it.
#[derive(Debug, Clone)]
pub(crate) struct OperationHandle {
    id: SandboxId,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
}

/// State of an operation when the wait is over.
#[derive(Debug)]
pub(crate) enum OperationState {
    Done(Result<Arc<Record>>),
    UnderWay,
}

impl OperationHandle {
    pub(crate) fn id(&self) -> SandboxId {
        self.id
    }

    /// Waits until the operation has ended, at most `wait`.
    pub(crate) async fn ended(self, wait: Duration) -> OperationState {
        match timeout(wait, self.result()).await {
            Ok(result) => OperationState::Done(result),
            Err(_) => OperationState::UnderWay,
        }
    }

    /// Waits until the operation has ended. Every wait in an operation has a deadline, so this one ends too.
    pub(crate) async fn result(mut self) -> Result<Arc<Record>> {
        match self.progress.wait_for(|p| matches!(p, Progress::Done(_))).await {
            Ok(progress) => match &*progress {
                Progress::Done(result) => result.clone(),
                Progress::Begun | Progress::Recorded => Err(lost()),
            },
            Err(_) => Err(lost()),
        }
    }

    /// Returns a handle of something that goes on after this operation, and what ends that. To cancel it cancels this
    /// operation.
    pub(crate) fn continued(&self) -> (Self, Continuation) {
        let (sender, progress) = watch::channel(Progress::Begun);
        (Self { progress, ..self.clone() }, Continuation(sender))
    }

    /// Waits until the intent is durable or the operation has ended.
    pub(crate) async fn recorded(&mut self, wait: Duration) {
        let recorded = self.progress.wait_for(|p| !matches!(p, Progress::Begun));
        // The result does not matter here: `ended` reads the state again.
        drop(timeout(wait, recorded).await);
    }

    /// Asks the operation to stop and to roll back what it did.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }
}

/// End of what goes on after an operation. Dropping it tells that it was lost.
#[derive(Debug)]
pub(crate) struct Continuation(watch::Sender<Progress>);

impl Continuation {
    /// Ends it with its result.
    pub(crate) fn done(self, result: Result<Arc<Record>>) {
        self.0.send_replace(Progress::Done(result));
    }
}

/// Error of an operation whose task ended without a result.
pub(crate) fn lost() -> Error {
    Error::new(Reason::ShuttingDown, "the agent stopped during the operation")
        .retry_after(Duration::from_secs(2))
}

type Operations = HashMap<SandboxId, Vec<(OperationKind, OperationHandle)>>;

/// Table of all operations under way.
#[derive(Debug, Clone, Default)]
pub(crate) struct OperationTable {
    operations: Arc<Mutex<Operations>>,
    turns: KeyedLock<SandboxId>,
}

/// Result of entering an operation.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A new operation; the caller must run it.
    New(OperationGuard, OperationHandle),
    /// An operation of this kind that was under way already.
    Joined(OperationHandle),
}

impl OperationTable {
    /// Enters an operation, unless one of its kind is under way.
    pub(crate) fn enter(&self, id: SandboxId, kind: OperationKind) -> Entry {
        let mut map = self.operations.lock();
        let operations = map.entry(id).or_default();
        if let Some((_, operation)) = operations.iter().find(|(known, _)| *known == kind) {
            return Entry::Joined(operation.clone());
        }
        let (sender, progress) = watch::channel(Progress::Begun);
        let operation = OperationHandle { id, progress, cancel: CancellationToken::new() };
        operations.push((kind, operation.clone()));
        let context = OperationContext {
            id,
            progress: sender,
            cancel: operation.cancel.clone(),
            turns: self.turns.clone(),
        };
        let guard = OperationGuard { kind, context, operations: self.clone() };
        Entry::New(guard, operation)
    }

    /// Finds the operation of this kind, if one is under way.
    pub(crate) fn find(&self, id: &SandboxId, kind: OperationKind) -> Option<OperationHandle> {
        let map = self.operations.lock();
        let operations = map.get(id)?;
        operations.iter().find(|(known, _)| *known == kind).map(|(_, operation)| operation.clone())
    }

    /// Sandboxes with an operation under way.
    pub(crate) fn busy(&self) -> Vec<SandboxId> {
        self.operations.lock().keys().copied().collect()
    }
}

/// Context of an operation while it runs.
#[derive(Debug, Clone)]
pub(crate) struct OperationContext {
    id: SandboxId,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
    turns: KeyedLock<SandboxId>,
}

impl OperationContext {
    /// Waits until no other operation works on the sandbox.
    pub(crate) async fn turn(&self, deadline: Instant) -> Result<Guard<SandboxId>> {
        timeout_at(deadline, self.turns.lock(self.id)).await.map_err(|_| {
            Error::new(
                Reason::SandboxBusy,
                format!("another operation on {} did not end in time", self.id),
            )
            .retry_after(Duration::from_secs(2))
        })
    }

    /// Token that is cancelled when the operation is to be cancelled.
    pub(crate) fn cancelled(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Reports that the intent is durable.
    pub(crate) fn recorded(&self) {
        self.progress.send_replace(Progress::Recorded);
    }
}

/// Right to run an operation. Dropping it, however the task ends, frees the place in the table.
#[derive(Debug)]
pub(crate) struct OperationGuard {
    kind: OperationKind,
    context: OperationContext,
    operations: OperationTable,
}

impl OperationGuard {
    /// Context for the task that runs the operation.
    pub(crate) fn context(&self) -> OperationContext {
        self.context.clone()
    }

    /// Ends the operation with its result.
    pub(crate) fn done(self, result: Result<Arc<Record>>) {
        let progress = self.context.progress.clone();
        // Leaves the table first, so that a caller that learns of the end can begin again at once.
        drop(self);
        progress.send_replace(Progress::Done(result));
    }
}

impl Drop for OperationGuard {
    fn drop(&mut self) {
        let mut map = self.operations.operations.lock();
        if let Some(operations) = map.get_mut(&self.context.id) {
            operations.retain(|(kind, _)| *kind != self.kind);
            if operations.is_empty() {
                map.remove(&self.context.id);
            }
        }
    }
}
