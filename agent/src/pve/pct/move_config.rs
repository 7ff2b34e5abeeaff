//! Moves a container to another node. `pct migrate` would use ssh, and leave its lock behind when
//! cut off. When the container is stopped and every node sees its volumes, only its config has to
//! move: one rename in pmxcfs, as PVE's HA manager does for a dead node.

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};
use tokio::time::Instant;

use super::{CALL, Host, unread};
use crate::pve::{ContainerConfig, ErrorKind, Result, ownership, pmxcfs};

impl Host {
    pub(super) async fn move_config_to(
        &self,
        vmid: Vmid,
        owner: SandboxId,
        target: NodeName,
    ) -> Result<()> {
        let cluster = self.check_quorum().await?;
        if target != self.node && cluster.guests.get(&vmid) == Some(&target) {
            return Ok(());
        }
        if target == self.node || !cluster.members.get(&target).is_some_and(|node| node.online) {
            let text = format!("{target} is no other node of the cluster that is online");
            return Err(ErrorKind::WrongState(text));
        }
        let lock = self.lock_config(vmid, Instant::now() + CALL).await?;
        let config = self.ours(vmid).await?;
        ownership::owned(&config, vmid, &owner)?;
        if self.running(vmid) {
            return Err(ErrorKind::WrongState(format!("CT {vmid} is running")));
        }
        self.check_shared(&config, &target).await?;
        let from = self.config_path(vmid);
        let to = self.places.root.join(pmxcfs::config(&target, vmid));
        let renamed = self.files.blocking(move || {
            // The lock belongs to the thread that writes, however long that takes.
            let _lock = lock;
            std::fs::rename(from, to)
        });
        renamed.await.map_err(|error| unread(&error))
    }

    async fn check_shared(&self, config: &ContainerConfig, target: &NodeName) -> Result<()> {
        let storages = self.storages().await?;
        let of = |volume: &str| {
            let (name, _) = volume.split_once(':').filter(|_| !volume.starts_with('/'))?;
            storages.iter().find(|storage| storage.name == name)
        };
        let seen = |volume: &&str| {
            of(volume)
                .is_some_and(|storage| storage.is_shared() && storage.holds_containers(target))
        };
        match config.mounts().find(|volume| !seen(volume)) {
            None => Ok(()),
            Some(volume) => Err(ErrorKind::WrongState(format!("{target} does not see {volume}"))),
        }
    }
}
