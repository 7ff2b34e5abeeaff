//! Host's view of a container, through its files in procfs and cgroupfs.

use std::ffi::OsString;

use proto::id::{Invalid, Vmid};

use super::{Host, Options};
use crate::{
    pve::{HostPaths, cgroup, container, shim_cgroup},
    sys::proc,
};

/// One boot of a container.
#[derive(Debug)]
pub struct Container {
    vmid: Vmid,
    places: HostPaths,
    enter: Vec<OsString>,
    /// Pid and start time of its init when the shim was started.
    init: Option<(u32, u64)>,
}

impl Container {
    /// Captures the current boot of the container.
    ///
    /// # Errors
    /// When the vmid is invalid.
    pub fn new(options: &Options) -> Result<Self, Invalid> {
        let vmid = Vmid::try_from(options.vmid)?;
        let (places, enter) = (options.places.clone(), options.enter.iter().map(Into::into));
        let mut container = Self { vmid, places, enter: enter.collect(), init: None };
        container.init = container.init();
        Ok(container)
    }

    /// Returns the number of the container.
    pub fn vmid(&self) -> Vmid {
        self.vmid
    }

    fn init(&self) -> Option<(u32, u64)> {
        let HostPaths { proc, cgroup_root, .. } = &self.places;
        let pid = container::init_pid(proc, cgroup_root, self.vmid)?;
        Some((pid, proc::kin(proc, pid)?.start))
    }
}

impl Host for Container {
    fn processes(&self) -> Vec<u32> {
        cgroup::processes(&self.places.cgroup_root, self.vmid)
    }

    fn frozen(&self) -> bool {
        cgroup::frozen(&self.places.cgroup_root, self.vmid)
    }

    fn runs(&self) -> bool {
        self.init.is_some() && self.init() == self.init
    }

    fn enter(&self) -> Vec<OsString> {
        self.enter.clone()
    }

    fn entered(&self, pid: u32) {
        shim_cgroup::send_home(&self.places.cgroup_root, self.vmid, pid);
    }
}
