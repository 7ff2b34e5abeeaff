//! Does what was planned.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};

use super::Action;
use crate::sandbox::{Error, Sandboxes};

/// Operations at a time: a reconciliation must not crowd out what callers want.
const PARALLEL: usize = 4;
/// How long a pass waits for one of them. It goes on alone after that.
const WAIT: Duration = Duration::from_secs(240);

/// Locks first, because what follows needs the templates; then the rest, a few at a time.
pub(super) async fn apply(sandboxes: &Arc<Sandboxes>, actions: &[Action]) {
    for action in actions {
        if let Action::Unlock(template) = action
            && let Err(error) = sandboxes.unlock_template(*template).await
        {
            tracing::warn!(%template, %error, "template stays locked");
        }
    }
    stream::iter(actions)
        .for_each_concurrent(PARALLEL, |action| async move {
            // The operations log what went wrong themselves; the next pass tries again.
            if let Err(error) = act(sandboxes, action).await {
                tracing::debug!(?action, %error, "not reconciled yet");
            }
        })
        .await;
}

async fn act(sandboxes: &Arc<Sandboxes>, action: &Action) -> Result<(), Error> {
    match action {
        Action::Undo(id) => sandboxes.undo(id, WAIT).await.map(drop),
        Action::Delete(id) => sandboxes.delete(id, WAIT).await.map(drop),
        Action::Stop(id) => sandboxes.stop(id, WAIT).await.map(drop),
        Action::Start(id) => sandboxes.start(id, WAIT).await.map(drop),
        Action::Settle(id) => sandboxes.settle(id, WAIT).await.map(drop),
        Action::Look(id) => sandboxes.look(id, WAIT).await.map(drop),
        Action::Adopt(id) => sandboxes.finish_adoption(id, WAIT).await.map(drop),
        Action::Release(id) => sandboxes.release(id, WAIT).await.map(drop),
        Action::Unmark { id, vmid } => sandboxes.unmark(id, *vmid).await,
        Action::Sweep { id, vmid } => sandboxes.sweep(id, *vmid).await,
        Action::Clear(vmid) => sandboxes.clear(*vmid).await,
        Action::Forget { before_ms } => {
            let forgotten = sandboxes.forget(*before_ms).await?;
            tracing::info!(forgotten, "tombstones forgotten");
            Ok(())
        }
        Action::Unlock(_) | Action::Quarantine { .. } | Action::TooMany { .. } => Ok(()),
    }
}
