//! Operations under way. One at a time works on a sandbox. A second request for the same operation
//! joins the first; another kind waits for its turn. Each runs on its own task, so a caller that
//! hangs up cancels nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::{Reason, id::SandboxId};
use tokio::{
    sync::{OwnedMutexGuard, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::Error;
use crate::journal::Record;

/// Kind of an operation on a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OperationKind {
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
    Leave,
}

#[derive(Debug, Clone)]
enum Progress {
    Begun,
    Recorded,
    Done(Result<Arc<Record>, Error>),
}

/// Handle of an operation, to wait for it or to cancel it.
#[derive(Debug, Clone)]
pub(super) struct OperationHandle {
    id: SandboxId,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
}

/// State of an operation when the wait is over.
#[derive(Debug)]
pub(super) enum OperationState {
    Done(Result<Arc<Record>, Error>),
    UnderWay,
}

impl OperationHandle {
    pub(super) fn id(&self) -> SandboxId {
        self.id
    }

    /// Waits until the operation has ended, at most `wait`.
    pub(super) async fn ended(mut self, wait: Duration) -> OperationState {
        match timeout(wait, self.progress.wait_for(|p| matches!(p, Progress::Done(_)))).await {
            Ok(Ok(progress)) => match &*progress {
                Progress::Done(result) => OperationState::Done(result.clone()),
                Progress::Begun | Progress::Recorded => OperationState::UnderWay,
            },
            Ok(Err(_)) => OperationState::Done(Err(lost())),
            Err(_) => OperationState::UnderWay,
        }
    }

    /// Waits until the intent is durable or the operation has ended.
    pub(super) async fn recorded(&mut self, wait: Duration) {
        let recorded = self.progress.wait_for(|p| !matches!(p, Progress::Begun));
        // The result does not matter here: `ended` reads the state again.
        drop(timeout(wait, recorded).await);
    }

    /// Asks the operation to stop and to roll back what it did.
    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }
}

/// Error of an operation whose task ended without a result.
pub(super) fn lost() -> Error {
    Error::new(Reason::ShuttingDown, "the agent stopped during the operation")
        .retry_after(Duration::from_secs(2))
}

#[derive(Debug, Default)]
struct OperationSlot {
    lock: Arc<tokio::sync::Mutex<()>>,
    operations: Vec<(OperationKind, OperationHandle)>,
}

/// Table of all operations under way.
#[derive(Debug, Clone, Default)]
pub(super) struct OperationTable(Arc<Mutex<HashMap<SandboxId, OperationSlot>>>);

/// Result of entering an operation.
#[derive(Debug)]
pub(super) enum Entry {
    /// A new operation; the caller must run it.
    New(OperationGuard, OperationHandle),
    /// An operation of this kind that was under way already.
    Joined(OperationHandle),
}

impl OperationTable {
    /// Enters an operation, unless one of its kind is under way.
    pub(super) fn enter(&self, id: SandboxId, kind: OperationKind) -> Entry {
        let mut map = self.lock();
        let slot = map.entry(id).or_default();
        if let Some((_, operation)) = slot.operations.iter().find(|(known, _)| *known == kind) {
            return Entry::Joined(operation.clone());
        }
        let (sender, progress) = watch::channel(Progress::Begun);
        let operation = OperationHandle { id, progress, cancel: CancellationToken::new() };
        slot.operations.push((kind, operation.clone()));
        let context = OperationContext {
            id,
            progress: sender,
            cancel: operation.cancel.clone(),
            turn: Arc::clone(&slot.lock),
        };
        let guard = OperationGuard { kind, context, operations: self.clone() };
        Entry::New(guard, operation)
    }

    /// Finds the operation of this kind, if one is under way.
    pub(super) fn find(&self, id: &SandboxId, kind: OperationKind) -> Option<OperationHandle> {
        let map = self.lock();
        let operations = &map.get(id)?.operations;
        operations.iter().find(|(known, _)| *known == kind).map(|(_, operation)| operation.clone())
    }

    /// Sandboxes with an operation under way.
    pub(super) fn busy(&self) -> Vec<SandboxId> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, OperationSlot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Context of an operation while it runs.
#[derive(Debug, Clone)]
pub(super) struct OperationContext {
    id: SandboxId,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl OperationContext {
    /// Waits until no other operation works on the sandbox.
    pub(super) async fn turn(&self, deadline: Instant) -> Result<OwnedMutexGuard<()>, Error> {
        timeout_at(deadline, Arc::clone(&self.turn).lock_owned()).await.map_err(|_| {
            Error::new(
                Reason::SandboxBusy,
                format!("another operation on {} did not end in time", self.id),
            )
            .retry_after(Duration::from_secs(2))
        })
    }

    /// Token that is cancelled when the operation is to be cancelled.
    pub(super) fn cancelled(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Reports that the intent is durable.
    pub(super) fn recorded(&self) {
        self.progress.send_replace(Progress::Recorded);
    }
}

/// Right to run an operation. Dropping it, however the task ends, frees the place in the table.
#[derive(Debug)]
pub(super) struct OperationGuard {
    kind: OperationKind,
    context: OperationContext,
    operations: OperationTable,
}

impl OperationGuard {
    /// Context for the task that runs the operation.
    pub(super) fn context(&self) -> OperationContext {
        self.context.clone()
    }

    /// Ends the operation with its result.
    pub(super) fn done(self, result: Result<Arc<Record>, Error>) {
        let progress = self.context.progress.clone();
        // Leaves the table first, so that a caller that learns of the end can begin again at once.
        drop(self);
        progress.send_replace(Progress::Done(result));
    }
}

impl Drop for OperationGuard {
    fn drop(&mut self) {
        let mut map = self.operations.lock();
        if let Some(slot) = map.get_mut(&self.context.id) {
            slot.operations.retain(|(kind, _)| *kind != self.kind);
            if slot.operations.is_empty() {
                map.remove(&self.context.id);
            }
        }
    }
}
