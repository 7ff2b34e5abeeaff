//! Watches one sandbox.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use proto::{Reason, id::SandboxId, name::Team, sandbox::v1::Sandbox};
use tokio::{sync::watch::Receiver, time::timeout};

use crate::sandbox::{Error, RETRY, Sandboxes};

/// Time without a change after which the sandbox is sent again, so that the stream is never silent.
const HEARTBEAT: Duration = Duration::from_secs(15);

struct Watch {
    sandboxes: Arc<Sandboxes>,
    id: SandboxId,
    changes: Receiver<u64>,
    last: Option<Sandbox>,
    over: bool,
}

impl Sandboxes {
    /// Streams the sandbox now and at every change until it has ended.
    ///
    /// # Errors
    /// When there is none of this name in the team.
    pub fn watch(
        self: &Arc<Self>,
        team: &Team,
        id: &str,
    ) -> Result<impl Stream<Item = Result<Sandbox, Error>> + Send + use<>, Error> {
        let id = self.find(team, id)?.id;
        let changes = self.nodes.cache.watch(id);
        let watch = Watch { sandboxes: self.clone(), id, changes, last: None, over: false };
        Ok(stream::unfold(watch, |mut watch| async move {
            let next = watch.next().await?;
            Some((next, watch))
        }))
    }
}

impl Watch {
    async fn next(&mut self) -> Option<Result<Sandbox, Error>> {
        if self.over {
            return None;
        }
        let mut heartbeat = false;
        loop {
            self.changes.mark_unchanged();
            // Removed from the cache: it had ended long ago.
            let sandbox = self.sandboxes.view(&self.id)?;
            if heartbeat || self.last.as_ref() != Some(&sandbox) {
                self.over = sandbox.phase().has_ended();
                self.last = Some(sandbox.clone());
                return Some(Ok(sandbox));
            }
            tokio::select! {
                changed = timeout(HEARTBEAT, self.changes.changed()) => {
                    heartbeat = changed.is_err();
                }
                () = self.sandboxes.stop.cancelled() => {
                    self.over = true;
                    let error = Error::new(Reason::ShuttingDown, "the controller is stopping");
                    return Some(Err(error.retry(RETRY)));
                }
            }
        }
    }
}
