//! Sizes of the fake host's containers.

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::Size,
};

use super::world::{World, put};
use crate::pve::{ContainerConfig, ErrorKind, Result};

/// Limits of a container that runs, which its config need not show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelLimits {
    /// Cores.
    pub cores: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: u32,
}

impl KernelLimits {
    pub(super) fn of(config: &ContainerConfig) -> Self {
        Self { cores: config.cores(), memory_mib: config.memory_mib() }
    }
}

impl World {
    /// Gives a container that runs other limits than its config shows. As with PVE, equal ones are
    /// passed over.
    pub(super) fn give_limits(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
        size: Size,
    ) -> Result<()> {
        self.owned(node, vmid, owner)?;
        let guest = self.ours(node, vmid)?;
        let wanted = KernelLimits { cores: Some(size.cpu_cores), memory_mib: size.memory_mib };
        if guest.pid.is_some() && KernelLimits::of(&guest.config) != wanted {
            guest.limits = wanted;
        }
        Ok(())
    }

    pub(super) fn set_limits(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        owner: &SandboxId,
        size: Size,
    ) -> Result<()> {
        self.owned(node, vmid, owner)?;
        let guest = self.ours(node, vmid)?;
        put(&mut guest.config, "cores", &size.cpu_cores.to_string());
        put(&mut guest.config, "cpulimit", &size.cpu_cores.to_string());
        put(&mut guest.config, "memory", &size.memory_mib.to_string());
        Ok(())
    }

    pub(super) fn resize(&mut self, node: &NodeName, vmid: Vmid, gib: u32) -> Result<()> {
        let guest = self.ours(node, vmid)?;
        if guest.config.rootfs_gib() >= gib {
            return Ok(());
        }
        if guest.pid.is_some() && !guest.config.grows_running() {
            return Err(ErrorKind::WrongState(format!(
                "the root of CT {vmid} is mounted read-only"
            )));
        }
        let Some(line) = guest.config.get("rootfs") else {
            return Err(ErrorKind::Failed("missing 'rootfs' configuration".to_owned()));
        };
        let options = line.split(',').filter(|option| !option.starts_with("size="));
        let line = options.collect::<Vec<_>>().join(",");
        put(&mut guest.config, "rootfs", &format!("{line},size={gib}G"));
        Ok(())
    }
}
