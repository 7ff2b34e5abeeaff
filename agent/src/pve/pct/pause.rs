//! Freezing and thawing a container, and PVE's lock on its config meanwhile. By files alone: what
//! `pct` calls suspend is CRIU, which is another thing and does not work.

use std::time::Duration;

use proto::id::{SandboxId, Vmid};
use tokio::time::{Instant, sleep};

use super::{CALL, Host, unread};
use crate::pve::{ContainerConfig, ErrorKind, cgroup::Freezer, hold, ownership};

/// How long PVE's lock on a config, which is held for the time of a write, is waited for.
const LOCK: Duration = Duration::from_secs(10);
/// Thawing takes the kernel less than a millisecond.
const THAW: Duration = Duration::from_secs(2);
/// How long it is looked without a pause whether all is frozen: most often it is by then, and the
/// runtime's shortest sleep is longer.
const AT_ONCE: Duration = Duration::from_micros(500);
/// Between two later looks.
const PAUSE: Duration = Duration::from_millis(2);

impl Host {
    pub(super) async fn hold(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), ErrorKind> {
        self.edit(vmid, Some(*owner), hold::take).await
    }

    pub(super) async fn release(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), ErrorKind> {
        self.edit(vmid, Some(*owner), hold::give_back).await
    }

    pub(super) async fn freeze(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        deadline: Instant,
    ) -> Result<(), ErrorKind> {
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

    pub(super) async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), ErrorKind> {
        self.owned(vmid, owner).await?;
        self.thaw_all(vmid).await
    }

    /// Thaws a paused container of ours and takes the lock off that was held meanwhile: PVE stops,
    /// starts and removes none that is locked.
    pub(super) async fn let_go(&self, vmid: Vmid) -> Result<(), ErrorKind> {
        let Some(config) = self.config(vmid).await? else { return Ok(()) };
        if ownership::marked(&config, vmid).is_err() {
            // The caller says what that means.
            return Ok(());
        }
        self.thaw_all(vmid).await?;
        if !hold::leaves(&config) {
            return Ok(());
        }
        self.edit(vmid, None, hold::give_back).await
    }

    /// The outer cgroup too, which an operator may have frozen.
    async fn thaw_all(&self, vmid: Vmid) -> Result<(), ErrorKind> {
        for freezer in Freezer::of(&self.places.cgroup_root, vmid).iter().rev() {
            if !freezer.freezing() {
                continue;
            }
            match freezer.set(false) {
                Ok(()) => {}
                // It ended meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unfrozen(&error)),
            }
            if !seen(freezer, false, Instant::now() + THAW).await {
                return Err(ErrorKind::Deadline(format!("CT {vmid} was not thawed in time")));
            }
        }
        Ok(())
    }

    async fn owned(&self, vmid: Vmid, owner: &SandboxId) -> Result<ContainerConfig, ErrorKind> {
        let config = self.config(vmid).await?.ok_or_else(|| self.missing(vmid))?;
        ownership::owned(&config, vmid, owner)?;
        Ok(config)
    }

    /// Changes the config in one step, under PVE's own lock on it, if it is ours. One that is to
    /// stay as it is needs no quorum.
    async fn edit(
        &self,
        vmid: Vmid,
        owner: Option<SandboxId>,
        change: fn(&mut ContainerConfig) -> Result<(), ErrorKind>,
    ) -> Result<(), ErrorKind> {
        // Every file of pmxcfs is a way through FUSE: none is read twice, and none in turn.
        let until = Instant::now() + LOCK.min(CALL);
        let (quorum, lock) = tokio::join!(self.check_quorum(), self.lock_config(vmid, until));
        let (quorum, lock) = (quorum.map(drop), lock?);
        let missing = quorum.clone().err().unwrap_or_else(|| self.missing(vmid));
        let path = self.config_path(vmid);
        let written = self.files.blocking(move || {
            // Held by the thread that writes, however long that takes.
            let _lock = lock;
            let before = ContainerConfig::parse(&std::fs::read(&path)?);
            let ours = match owner {
                Some(owner) => ownership::owned(&before, vmid, &owner),
                None => ownership::marked(&before, vmid),
            };
            let mut after = before.clone();
            if let Err(kind) = ours.and_then(|()| change(&mut after)) {
                return Ok(Err(kind));
            }
            if after != before {
                if let Err(kind) = quorum {
                    return Ok(Err(kind));
                }
                // As PVE names its own.
                let fresh = path.with_extension(format!("conf.tmp.{}", std::process::id()));
                let renamed = std::fs::write(&fresh, after.to_bytes())
                    .and_then(|()| std::fs::rename(&fresh, &path));
                if let Err(error) = renamed {
                    drop(std::fs::remove_file(&fresh));
                    return Err(error);
                }
            }
            Ok(Ok(()))
        });
        match written.await {
            Ok(result) => result,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(missing),
            Err(error) => Err(unread(&error)),
        }
    }
}

fn unfrozen(error: &std::io::Error) -> ErrorKind {
    ErrorKind::Failed(format!("the container's cgroup could not be written: {error}"))
}

/// Looks until it is frozen, or is not; false when that was not so in time.
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
