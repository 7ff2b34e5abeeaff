//! Freezes and thaws a container, and holds PVE's lock on its config meanwhile. Uses only files:
//! what `pct` calls suspend is CRIU, which is different and does not work.

use std::time::Duration;

use proto::id::{SandboxId, Vmid};
use tokio::time::{Instant, sleep};

use super::Host;
use crate::pve::{ContainerConfig, ErrorKind, Result, cgroup::Freezer, ownership, pause_lock};

/// Longest wait for a thaw, which takes the kernel less than a millisecond.
const THAW: Duration = Duration::from_secs(2);
/// Time of polling without sleep: most often all is frozen by then, and the runtime's shortest
/// sleep is longer.
const AT_ONCE: Duration = Duration::from_micros(500);
/// Interval of later polls.
const PAUSE: Duration = Duration::from_millis(2);

impl Host {
    /// Changes PVE's lock for a pause of the owner's container.
    pub(super) async fn edit_pause_lock(
        &self,
        vmid: Vmid,
        owner: SandboxId,
        change: fn(&mut ContainerConfig) -> Result<()>,
    ) -> Result<()> {
        self.edit(vmid, move |config| {
            ownership::owned(config, vmid, &owner)?;
            change(config)
        })
        .await
    }

    pub(super) async fn freeze(
        &self,
        vmid: Vmid,
        owner: SandboxId,
        deadline: Instant,
    ) -> Result<()> {
        self.owned(vmid, owner).await?;
        let freezers = Freezer::of(&self.places.cgroup_root, vmid);
        let Some(inner) = freezers.first().filter(|_| self.running(vmid)) else {
            return Err(ErrorKind::WrongState(format!("CT {vmid} not running")));
        };
        let froze = inner.set(true).map_err(|error| unfrozen(&error));
        if froze.is_ok() && seen(inner, true, deadline).await {
            return Ok(());
        }
        self.thaw_all(vmid).await?;
        froze?;
        let text = format!("something in CT {vmid} did not freeze in time, it was thawed again");
        Err(ErrorKind::Deadline(text))
    }

    pub(super) async fn thaw(&self, vmid: Vmid, owner: SandboxId) -> Result<()> {
        self.owned(vmid, owner).await?;
        self.thaw_all(vmid).await
    }

    /// Thaws a paused container of ours and releases the lock that was held meanwhile: PVE refuses
    /// to stop, start or destroy a locked container.
    pub(super) async fn end_pause(&self, vmid: Vmid) -> Result<()> {
        let Some(config) = self.config(vmid).await? else { return Ok(()) };
        if ownership::marked(&config, vmid).is_err() {
            // The caller decides what that means.
            return Ok(());
        }
        if !pause_lock::is_noted(&config) {
            return self.thaw_all(vmid).await;
        }
        // Without quorum the lock cannot be released, and the container must stay paused.
        self.check_quorum().await?;
        self.thaw_all(vmid).await?;
        self.edit(vmid, move |config| {
            ownership::marked(config, vmid)?;
            pause_lock::release(config)
        })
        .await
    }

    /// Thaws the outer cgroup too, which an operator may have frozen.
    async fn thaw_all(&self, vmid: Vmid) -> Result<()> {
        for freezer in Freezer::of(&self.places.cgroup_root, vmid).iter().rev() {
            if !freezer.freezing() {
                continue;
            }
            match freezer.set(false) {
                Ok(()) => {}
                // The container ended meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unfrozen(&error)),
            }
            if !seen(freezer, false, Instant::now() + THAW).await {
                return Err(ErrorKind::Deadline(format!("CT {vmid} was not thawed in time")));
            }
        }
        Ok(())
    }

    /// `Ok` when the container is this owner's, or was when /etc/pve could last be read.
    pub(super) async fn owned(&self, vmid: Vmid, owner: SandboxId) -> Result<()> {
        match self.config(vmid).await {
            Ok(config) => {
                ownership::owned(&config.ok_or_else(|| self.missing(vmid))?, vmid, &owner)
            }
            Err(error @ ErrorKind::NoQuorum(_)) => {
                let known = self.known.mark(vmid, self.init(vmid).await);
                known.filter(|mark| mark.sandbox_id == owner).map(drop).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }
}

fn unfrozen(error: &std::io::Error) -> ErrorKind {
    ErrorKind::Failed(format!("the container's cgroup could not be written: {error}"))
}

/// Polls until the cgroup is frozen (or not); false when the deadline passes first.
async fn seen(freezer: &Freezer, frozen: bool, deadline: Instant) -> bool {
    let begun = Instant::now();
    loop {
        if freezer.frozen() == frozen {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        if begun.elapsed() < AT_ONCE {
            tokio::task::yield_now().await;
        } else {
            sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests;
