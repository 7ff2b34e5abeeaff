//! Edits a container's config without `pct`: one line, in one atomic step, keeping all others.

use std::time::Duration;

use proto::id::{SandboxId, Vmid};
use tokio::time::Instant;

use super::{CALL, Host, unread};
use crate::{
    pve::{ContainerConfig, ErrorKind, Mark, Result, ownership},
    sys::read,
};

/// Longest wait for PVE's lock on a config, which is held for the time of a write.
const LOCK: Duration = Duration::from_secs(10);

impl Host {
    pub(super) async fn mark(&self, mark: Mark) -> Result<()> {
        self.edit(mark.vmid, move |config| ownership::mark(config, &mark)).await
    }

    pub(super) async fn unmark(&self, vmid: Vmid, owner: SandboxId) -> Result<()> {
        let edited = self.edit(vmid, move |config| {
            ownership::unmark(config, &owner);
            Ok(())
        });
        match edited.await {
            Err(ErrorKind::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    /// Changes the config in one step, under PVE's own lock on it. `change` must check the
    /// ownership. A config that stays the same needs no quorum.
    pub(super) async fn edit(
        &self,
        vmid: Vmid,
        change: impl FnOnce(&mut ContainerConfig) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        // Reads of pmxcfs go through FUSE: no file is read twice, and they run in parallel.
        let until = Instant::now() + LOCK.min(CALL);
        let (quorum, lock) = tokio::join!(self.check_quorum(), self.lock_config(vmid, until));
        let (quorum, lock) = (quorum.map(drop), lock?);
        let missing = quorum.clone().err().unwrap_or_else(|| self.missing(vmid));
        let path = self.config_path(vmid);
        let written = self.files.blocking(move || {
            // The lock belongs to the thread that writes, however long that takes.
            let _lock = lock;
            let before = ContainerConfig::parse(&read::whole(&path, read::LARGE)?);
            let mut after = before.clone();
            if let Err(kind) = change(&mut after) {
                return Ok(Err(kind));
            }
            if after != before {
                if let Err(kind) = quorum {
                    return Ok(Err(kind));
                }
                // Named like PVE's own temporary files.
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
