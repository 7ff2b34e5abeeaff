//! Taking PVE's lock off a template that a dead clone of ours has left on it. Without that no clone
//! of it would ever work again.

use std::time::Duration;

use proto::id::{SandboxId, SandboxRef, Vmid};
use tokio::time::Instant;

use super::{Error, Known, Sandboxes};

/// How long the reconciler waits for a turn at a template.
const TURN: Duration = Duration::from_secs(2);

impl Sandboxes {
    /// True when a clone of this template was ours and ended in its middle: then, and only then, a
    /// lock on the template may be what it left.
    pub fn has_dead_clone(&self, template: Vmid) -> bool {
        let busy = self.busy();
        // In whatever phase: a creation that was cut short may be deleted before anybody looks.
        let cut_short = self.live().into_iter().any(|record| {
            record.template == template
                && record.progress.is_cloning()
                && !busy.contains(&record.id)
        });
        cut_short
            || self
                .ended()
                .into_iter()
                .any(|tombstone| tombstone.template == template && tombstone.cloning)
    }

    /// Before the tombstone of an attempt is replaced by the record of the next: if it ended in the
    /// middle of a clone, it is all that says whose the lock on the template is.
    ///
    /// # Errors
    /// When the lock is there and could not be taken off: the tombstone must stay.
    pub(super) async fn unlock_before(
        &self,
        id: &SandboxId,
        deadline: Instant,
    ) -> Result<(), Error> {
        let Some(Known::Ended(before)) = self.known(&SandboxRef::Id(*id)) else { return Ok(()) };
        if !before.cloning {
            return Ok(());
        }
        let _turn = self.queues.turn(before.template, deadline).await?;
        match self.pve.config(before.template).await? {
            Some(config) if config.lock() == Some("disk") => {
                self.pve.unlock_template(before.template).await.map_err(Error::from)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Takes the lock off, in a turn at the template, so no clone of ours is under way; whether
    /// anybody else's is, `Pve` looks.
    ///
    /// # Errors
    /// When the turn did not come, or the lock is somebody's who lives.
    pub async fn unlock_template(&self, template: Vmid) -> Result<(), Error> {
        let _turn = self.queues.turn(template, Instant::now() + TURN).await?;
        self.pve.unlock_template(template).await.map_err(Error::from)
    }

    /// The same for a creation that has the turn and found the template locked.
    pub(super) async fn unlock_after_dead_clone(&self, template: Vmid) {
        let locked = matches!(
            self.pve.config(template).await,
            Ok(Some(config)) if config.lock() == Some("disk")
        );
        if !locked || !self.has_dead_clone(template) {
            return;
        }
        match self.pve.unlock_template(template).await {
            Ok(()) => tracing::warn!(%template, "lock of a dead clone was taken off"),
            Err(error) => tracing::warn!(%template, %error, "template stays locked"),
        }
    }
}
