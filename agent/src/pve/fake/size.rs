//! Sizes of the fake host's containers.

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
    spec::Size,
};

use super::world::{World, put};
use crate::pve::{ContainerConfig, ErrorKind, IoLimited, IoMax, Limited, Result};

/// Limits of a container that runs, which its config need not show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelLimits {
    /// Cores.
    pub cores: Option<u32>,
    /// Memory, MiB.
    pub memory_mib: u32,
}

/// Behaviour of the fake host's kernel when a limit is written to a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Limiting {
    /// The limit is in force then.
    #[default]
    Works,
    /// The write fails.
    Fails,
    /// The kernel has no controller.
    NoController,
    /// The kernel cannot limit the use of the containers' volumes.
    NoDevice,
}

impl KernelLimits {
    pub(super) fn of(config: &ContainerConfig) -> Self {
        Self { cores: config.cores(), memory_mib: config.memory_mib() }
    }
}

impl World {
    /// Limits the processes of a container that runs.
    pub(super) fn limit_processes(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        max: u32,
    ) -> Result<Limited> {
        match self.limiting {
            Limiting::Works | Limiting::NoDevice => {}
            Limiting::Fails => return Err(ErrorKind::Failed("told to fail".to_owned())),
            Limiting::NoController => return Ok(Limited::NoController),
        }
        let guest = self.container_mut(node, vmid)?;
        if guest.pid.is_none() {
            return Err(ErrorKind::Failed("no such cgroup".to_owned()));
        }
        guest.processes_max = Some(max);
        Ok(Limited::InForce)
    }

    /// Limits the use of disks of a container that runs.
    pub(super) fn limit_io(
        &mut self,
        node: &NodeName,
        vmid: Vmid,
        max: IoMax,
    ) -> Result<IoLimited> {
        match self.limiting {
            Limiting::Works => {}
            Limiting::Fails => return Err(ErrorKind::Failed("told to fail".to_owned())),
            Limiting::NoController => return Ok(IoLimited::NoController),
            Limiting::NoDevice => {
                let why = "zfs has no block device that the kernel could limit";
                return Ok(IoLimited::Partly([why.to_owned()].into()));
            }
        }
        let guest = self.container_mut(node, vmid)?;
        if guest.pid.is_none() {
            return Err(ErrorKind::Failed("no such cgroup".to_owned()));
        }
        guest.io_max = Some(max);
        Ok(IoLimited::InForce)
    }

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
