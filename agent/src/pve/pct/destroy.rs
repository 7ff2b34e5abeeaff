//! Destroys a sandbox's container in any state: running, half cloned, half destroyed, or only a
//! volume. Repeats check and action until nothing is left.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::Flock,
    mount::{MntFlags, umount2},
};
use proto::id::{SandboxId, Vmid};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Host, unread};
use crate::{
    pve::{
        ContainerConfig, ErrorKind, OwnVolumes, Result, command::Command, ownership, pause_lock,
        volume, worker,
    },
    sys::{flock, pidfd, read},
};

/// Rounds at most: each removes something or ends in an error.
const ROUNDS_MAX: u32 = 6;

/// Longest time that a clone shows nothing but its lock. A clone by PVE's daemon has no worker yet
/// then, and nothing else identifies it.
const BARE: Duration = Duration::from_secs(5);

const LOSETUP: &str = "/usr/sbin/losetup";

/// Remains of a container.
#[derive(Debug)]
enum Found {
    Nothing,
    Volumes(Vec<String>),
    Container(ContainerConfig),
}

impl Host {
    pub(super) async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: SandboxId,
        own: OwnVolumes,
        deadline: Instant,
    ) -> Result<()> {
        let mut last = None;
        let mut seen_bare = None;
        for _ in 0..ROUNDS_MAX {
            self.check_quorum().await?;
            // A `pct` of an agent that died may still be about to create the container.
            self.wait_until_idle(vmid, deadline).await?;
            let result = match self.look(vmid, &owner, &own, deadline).await? {
                Found::Nothing => {
                    self.sweep(vmid);
                    return Ok(());
                }
                Found::Volumes(volumes) => self.free_all(volumes).await,
                Found::Container(config)
                    if ownership::is_bare(&config) && seen_bare.as_ref() != Some(&config) =>
                {
                    if timeout_at(deadline, sleep(BARE)).await.is_err() {
                        let text = "nothing says whose it is, and it may be under way";
                        return Err(ErrorKind::Deadline(text.to_owned()));
                    }
                    seen_bare = Some(config);
                    continue;
                }
                Found::Container(config) => self.destroy(vmid, &config, &own, deadline).await,
            };
            match result {
                Ok(()) => {}
                // A storage's lock was held for too long, or another process was faster.
                Err(kind @ (ErrorKind::Locked(_) | ErrorKind::NotFound(_)))
                    if Instant::now() < deadline =>
                {
                    last = Some(kind);
                }
                Err(kind) => return Err(kind),
            }
        }
        Err(last.unwrap_or_else(|| ErrorKind::Failed(format!("something of CT {vmid} is left"))))
    }

    async fn wait_until_idle(&self, vmid: Vmid, deadline: Instant) -> Result<()> {
        loop {
            let busy = self.processes(move |all| worker::busy_with(all, vmid)).await?;
            let Some(&pid) = busy.first() else { return Ok(()) };
            let late = |_| ErrorKind::Deadline(format!("process {pid} is still busy with it"));
            let ended = timeout_at(deadline, pidfd::ended(pid)).await.map_err(late)?;
            ended.map_err(|error| ErrorKind::Failed(format!("waiting for {pid}: {error}")))?;
        }
    }

    /// Checks the ownership under PVE's own lock, so that nobody writes the config meanwhile.
    async fn look(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        own: &OwnVolumes,
        deadline: Instant,
    ) -> Result<Found> {
        if self.config(vmid).await?.is_none() {
            return self.look_for_volumes(vmid, own).await;
        }
        let _lock = self.lock_config(vmid, deadline).await?;
        let Some(config) = self.config(vmid).await? else {
            return self.look_for_volumes(vmid, own).await;
        };
        ownership::check(&config, vmid, owner)?;
        match config.lock() {
            // No worker is alive, so these are left by a clone or a destroy of ours.
            None | Some("create" | "destroyed") => Ok(Found::Container(config)),
            // The lock of a pause, which `destroy` removes.
            Some(_) if pause_lock::is_held(&config) => Ok(Found::Container(config)),
            Some(lock) => Err(ErrorKind::Locked(format!("CT is locked ({lock})"))),
        }
    }

    /// Finds volumes without a config. Volumes of the vmid that the sandbox did not make stay.
    async fn look_for_volumes(&self, vmid: Vmid, own: &OwnVolumes) -> Result<Found> {
        if let Some(node) = self.cluster().await.guests.get(&vmid) {
            // Either another kind of guest has the vmid, or another node has the config.
            return Err(ErrorKind::NotOurs(format!("{vmid} is a guest of node {node}")));
        }
        let volumes = self.volumes_among(vmid, own.storages()).await?;
        let (volumes, others): (Vec<_>, Vec<_>) = volumes.into_iter().partition(|v| own.owns(v));
        if !others.is_empty() {
            tracing::warn!(%vmid, ?others, "kept volumes of this vmid that the sandbox did not make");
        }
        if volumes.is_empty() {
            return Ok(Found::Nothing);
        }
        for (other, config) in self.configs().await? {
            let name =
                |volume: &String| volume.rsplit([':', '/']).next().unwrap_or(volume).to_owned();
            if volumes.iter().any(|volume| config.mentions(&name(volume))) {
                let text = format!("a volume of {vmid} belongs to CT {other}");
                return Err(ErrorKind::NotOurs(text));
            }
        }
        Ok(Found::Volumes(volumes))
    }

    async fn free_all(&self, volumes: Vec<String>) -> Result<()> {
        for volume in volumes {
            self.free(&volume).await?;
            tracing::info!(volume, "removed a volume that no config named");
        }
        Ok(())
    }

    async fn destroy(
        &self,
        vmid: Vmid,
        config: &ContainerConfig,
        own: &OwnVolumes,
        deadline: Instant,
    ) -> Result<()> {
        if pause_lock::is_noted(config) {
            self.end_pause(vmid).await?;
        } else if config.lock().is_some() {
            self.unmount(vmid).await?;
            self.pct(Command::Unlock(vmid), deadline).await?;
        }
        match self.pct(Command::Destroy(vmid), deadline).await {
            // On some storages a destroy that was cut off after removing its volumes cannot be
            // repeated, because it fails on the missing volumes.
            Err(ErrorKind::Failed(why))
                if !self.running(vmid) && !self.has_volumes(vmid, config, own).await? =>
            {
                // The worker may have outlived the `pct` that reported the failure.
                self.wait_until_idle(vmid, deadline).await?;
                if self.config(vmid).await?.is_none() {
                    return Ok(());
                }
                tracing::warn!(%vmid, why, "removing a config whose volumes are gone");
                self.remove_config(vmid, config, deadline).await
            }
            result => result,
        }
    }

    /// True when a storage still holds a volume of the sandbox: one that its config names, or one
    /// in `own`.
    async fn has_volumes(
        &self,
        vmid: Vmid,
        config: &ContainerConfig,
        own: &OwnVolumes,
    ) -> Result<bool> {
        let (named, storages) = (config.own_volumes(vmid), config.storages());
        let storages = storages.iter().map(String::as_str).chain(own.storages());
        let seen = self.volumes_among(vmid, storages).await?;
        let is_named = |volume: &str| volume::key(volume).is_some_and(|key| named.contains(&key));
        Ok(seen.iter().any(|volume| is_named(volume) || own.owns(volume)))
    }

    /// Removes the config, if it did not change since it was checked.
    async fn remove_config(
        &self,
        vmid: Vmid,
        config: &ContainerConfig,
        deadline: Instant,
    ) -> Result<()> {
        let _lock = self.lock_config(vmid, deadline).await?;
        if self.config(vmid).await?.is_some_and(|now| now.rootfs() != config.rootfs()) {
            return Err(ErrorKind::Failed(format!("the config of CT {vmid} has changed")));
        }
        let path = self.config_path(vmid);
        let removed = self.files.blocking(move || std::fs::remove_file(path)).await;
        removed.map_err(|error| ErrorKind::Failed(format!("its config was not removed: {error}")))
    }

    /// Takes PVE's own lock on a container's config.
    pub(super) async fn lock_config(&self, vmid: Vmid, deadline: Instant) -> Result<Flock<File>> {
        let path = self.places.lock_dir.join(format!("pve-config-{vmid}.lock"));
        let lock = flock::lock(&path, deadline).await.map_err(|error| unread(&error))?;
        let late = || format!("can't lock file '{}' - got timeout", path.display());
        lock.ok_or_else(|| ErrorKind::Locked(late()))
    }

    /// Undoes the mounts of a clone that was killed while it wrote to the new volume.
    async fn unmount(&self, vmid: Vmid) -> Result<()> {
        let below = self.places.lxc_dir.join(vmid.to_string()).join("rootfs");
        let mountinfo = self.places.proc.join("self/mountinfo");
        let loops = self.files.blocking(move || {
            let text = read::whole_text(&mountinfo, read::LARGE)?;
            let mut loops = Vec::new();
            // Mounts listed later are deeper.
            for (point, source) in mounts(&text).rev().filter(|(p, _)| p.starts_with(&below)) {
                umount2(&point, MntFlags::empty())?;
                loops.extend(Some(source).filter(|source| is_loop_of(source, vmid)));
            }
            Ok(loops)
        });
        let loops = loops.await.map_err(|e| ErrorKind::Failed(format!("unmounting: {e}")))?;
        for device in loops {
            self.tool(LOSETUP, ["-d", &device]).await?;
        }
        Ok(())
    }

    /// Removes the directory that PVE leaves for every vmid ever used. Only known entries are
    /// removed, and only empty directories.
    fn sweep(&self, vmid: Vmid) {
        let dir = self.places.lxc_dir.join(vmid.to_string());
        let removed = std::fs::remove_file(dir.join("rules.seccomp"));
        let rest = ["passthrough", "rootfs", ""].map(|name| std::fs::remove_dir(dir.join(name)));
        // Anything else stays; the next container of this vmid reuses it.
        drop((removed, rest));
    }
}

/// True for a loop device over an image of this container. A bind mount names the device of its
/// file system, which must not be detached.
fn is_loop_of(device: &str, vmid: Vmid) -> bool {
    let Some(name) = device.strip_prefix("/dev/").filter(|name| name.starts_with("loop")) else {
        return false;
    };
    let path = format!("/sys/block/{name}/loop/backing_file");
    read::text(Path::new(&path), read::SMALL).contains(&format!("/vm-{vmid}-disk-"))
}

/// Mount points and their sources.
fn mounts(mountinfo: &str) -> impl DoubleEndedIterator<Item = (PathBuf, String)> {
    mountinfo.lines().filter_map(|line| {
        let (fields, source) = line.split_once(" - ")?;
        let point = fields.split(' ').nth(4)?.replace("\\040", " ");
        Some((point.into(), source.split(' ').nth(1)?.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_mounts() {
        let text = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            99 1 7:4 / /var/lib/lxc/701/rootfs rw,relatime shared:1 - ext4 /dev/loop4 rw\n";
        let found: Vec<_> = mounts(text).collect();
        assert_eq!(found[1], ("/var/lib/lxc/701/rootfs".into(), "/dev/loop4".to_owned()));
    }
}
