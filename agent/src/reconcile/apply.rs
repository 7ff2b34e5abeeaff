//! Executes planned actions.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};

use super::Action;
use crate::sandbox::{Error, Sandboxes};

/// Most concurrent operations: a reconciliation must not crowd out callers.
const PARALLEL: usize = 4;
/// Longest wait of a pass for one operation, which then continues by itself.
const WAIT: Duration = Duration::from_secs(240);

/// Longest wait for a stop to begin. It gives its sandbox time to shut down, which must not hold up the
/// pass.
const BEGUN: Duration = Duration::from_secs(1);

/// Executes the actions: locks first, because the others need the templates; then the rest, a few
/// at a time.
pub(super) async fn apply(sandboxes: &Arc<Sandboxes>, actions: &[Action]) {
    for action in actions {
        if let Action::Unlock(template) = action
            && let Err(error) = sandboxes.unlock_template(*template).await
        {
            tracing::warn!(%template, %error, "a template could not be unlocked");
        }
    }
    stream::iter(actions)
        .for_each_concurrent(PARALLEL, |action| async move {
            // The operations log their failures themselves; the next pass tries again.
            if let Err(error) = act(sandboxes, action).await {
                tracing::debug!(?action, %error, "an action failed; the next pass tries again");
            }
        })
        .await;
}

async fn act(sandboxes: &Arc<Sandboxes>, action: &Action) -> Result<(), Error> {
    match action {
        Action::Undo(id) => sandboxes.undo(id, WAIT).await.map(drop),
        Action::Delete(id) => sandboxes.delete(id, WAIT).await.map(drop),
        Action::Stop(id) => sandboxes.stop(id, BEGUN).await.map(drop),
        Action::Start(id) => sandboxes.start(id, WAIT).await.map(drop),
        Action::EnforcePause(id) => sandboxes.enforce_pause(id, WAIT).await.map(drop),
        Action::SettleSize(id) => sandboxes.settle_size(id, WAIT).await.map(drop),
        Action::RecordDrift(id) => sandboxes.record_drift(id, WAIT).await.map(drop),
        Action::Adopt(id) => sandboxes.finish_adoption(id, WAIT).await.map(drop),
        Action::Release(id) => sandboxes.release(id, WAIT).await.map(drop),
        Action::Unmark { id, vmid } => sandboxes.unmark(id, *vmid).await,
        Action::DestroyOrphan { id, vmid } => sandboxes.destroy_orphan(id, *vmid).await,
        Action::RemoveRemnant(vmid) => sandboxes.remove_remnant(*vmid).await,
        Action::Forget { before_ms } => {
            let forgotten = sandboxes.forget(*before_ms).await?;
            tracing::info!(forgotten, "old tombstones were forgotten");
            Ok(())
        }
        Action::Unlock(_) | Action::Quarantine { .. } | Action::TooManyOrphans { .. } => Ok(()),
    }
}
