//! Cancelling a creation, whether the node knows of it or not.

use std::{sync::Arc, time::Duration};

use proto::id::{SandboxId, SandboxRef};

use crate::{
    journal::Record,
    sandbox::{
        Known, Result, Sandboxes,
        core::operations::{OperationKind, OperationState},
    },
};

impl Sandboxes {
    /// Cancels all attempts of `id` up to `attempt`: one that is to come is refused, one under way
    /// is rolled back, one that has come up is deleted. Returns the record after at most `wait`.
    ///
    /// # Errors
    /// When the journal cannot be written, or the sandbox could not be removed yet.
    pub async fn cancel(
        self: &Arc<Self>,
        id: &SandboxId,
        attempt: u32,
        wait: Duration,
    ) -> Result<Option<Arc<Record>>> {
        if self.faults.ignore_cancels {
            return Ok(None);
        }
        self.records.cancel(id, attempt, self.now_ms()).await?;
        let name = SandboxRef::Id(*id);
        let meant = self.admission.creation(id).is_none_or(|creation| creation.attempt <= attempt);
        if let Some(operation) = self.operations.find(id, OperationKind::Create).filter(|_| meant) {
            operation.cancel();
            if let OperationState::UnderWay = operation.ended(wait).await {
                return Ok(self.records.index.live(id));
            }
        }
        match self.known(&name) {
            None => Ok(None),
            Some(Known::Live(record)) if record.attempt <= attempt => {
                self.delete(id, wait).await.map(Some)
            }
            Some(Known::Live(record)) => Ok(Some(record)),
            Some(Known::Ended(_)) => self.get(&name).await.map(Some),
        }
    }
}
