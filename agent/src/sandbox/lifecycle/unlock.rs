//! Removes PVE's lock that a dead clone of ours left on a template. Otherwise no clone of that
//! template would ever work again.

use std::time::Duration;

use proto::id::{SandboxId, SandboxRef, Vmid};
use tokio::time::Instant;

use crate::sandbox::{Error, Known, Result, Sandboxes};

/// Longest wait of the reconciler for a turn at a template.
const TURN: Duration = Duration::from_secs(2);

impl Sandboxes {
    /// True when a clone of this template was ours and ended in its middle: only then may a lock on
    /// the template be its leftover.
    pub fn has_dead_clone(&self, template: Vmid) -> bool {
        let busy = self.busy();
        // In any phase: a creation that was cut short may be deleted before anybody checks.
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

    /// Unlocks a template before the tombstone of an attempt is replaced by the record of the next:
    /// if the attempt ended in the middle of a clone, only the tombstone shows whose the lock is.
    ///
    /// # Errors
    /// When the lock is there and could not be removed: the tombstone must stay.
    pub(in crate::sandbox) async fn unlock_before(
        &self,
        id: &SandboxId,
        deadline: Instant,
    ) -> Result<()> {
        let Some(Known::Ended(before)) = self.known(&SandboxRef::Id(*id)) else { return Ok(()) };
        if !before.cloning {
            return Ok(());
        }
        let _turn = self.queues.turn(before.template, Some(&before.team), deadline).await?;
        match self.pve.config(before.template).await? {
            Some(config) if config.lock() == Some("disk") => {
                self.pve.unlock_template(before.template).await.map_err(Error::from)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Removes the lock, in a turn at the template, so that no clone of ours is under way; `Pve`
    /// checks for a clone by anybody else.
    ///
    /// # Errors
    /// When the turn did not come, or the owner of the lock lives.
    pub async fn unlock_template(&self, template: Vmid) -> Result<()> {
        let _turn = self.queues.turn(template, None, Instant::now() + TURN).await?;
        self.pve.unlock_template(template).await.map_err(Error::from)
    }

    /// Removes the lock for a creation that has the turn and found the template locked.
    pub(in crate::sandbox) async fn unlock_after_dead_clone(&self, template: Vmid) {
        let locked = matches!(
            self.pve.config(template).await,
            Ok(Some(config)) if config.lock() == Some("disk")
        );
        if !locked || !self.has_dead_clone(template) {
            return;
        }
        match self.pve.unlock_template(template).await {
            Ok(()) => tracing::warn!(%template, "lock of a dead clone removed"),
            Err(error) => tracing::warn!(%template, %error, "template stays locked"),
        }
    }
}
