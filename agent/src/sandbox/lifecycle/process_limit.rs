//! Limit on the processes of every sandbox. The kernel forgets it at each boot of a container, so it is
//! written again after each: by a start before anything is entered, by whoever notices a boot that
//! nobody asked for, before a shim is started, and by each pass of the reconciler.

use std::{collections::BTreeMap, sync::Arc};

use daemon::sync::Mutex;
use proto::{Reason, id::SandboxId};

use crate::{
    journal::Record,
    pve::Limited,
    sandbox::{Error, Result, Sandboxes},
};

/// Facts about the limits on this host.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct ProcessLimits(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    /// True once the kernel was found to have no controller for it.
    no_controller: bool,
    /// Sandboxes that run without their limit, with the reason, as of the last pass.
    failed: BTreeMap<SandboxId, String>,
}

impl Sandboxes {
    /// Limits the processes of a sandbox. Does nothing when its container does not run, and where the
    /// kernel has no controller for it.
    ///
    /// # Errors
    /// LIMITS_FAILED when the container runs without the limit.
    pub(in crate::sandbox) async fn limit_processes(&self, record: &Record) -> Result<()> {
        let max = self.options.limits.processes;
        match self.pve.limit_processes(record.vmid, max).await {
            Ok(Limited::InForce) => Ok(()),
            Ok(Limited::NoController) => {
                let told = std::mem::replace(&mut self.process_limits.0.lock().no_controller, true);
                if !told {
                    tracing::warn!(
                        "this kernel has no cgroup controller `pids`: the processes of sandboxes are not limited"
                    );
                }
                Ok(())
            }
            Err(_) if !self.pve.running(record.vmid).await => Ok(()),
            Err(error) => Err(Error::new(
                Reason::LimitsFailed,
                format!("the sandbox's processes are not limited: {error}"),
            )),
        }
    }

    /// Limits the processes of a sandbox in a boot that nobody asked for.
    pub(in crate::sandbox) async fn limit_processes_of_found(&self, record: &Record) {
        if let Err(error) = self.limit_processes(record).await {
            tracing::error!(sandbox_id = %record.id, %error, "sandbox booted without its limit on processes");
        }
    }

    /// Limits the processes of all sandboxes that run.
    pub async fn enforce_process_limits(&self) {
        let (busy, live) = (self.busy(), self.live());
        let quiet = |record: &&Arc<Record>| record.phase.is_up() && !busy.contains(&record.id);
        let mut failed = BTreeMap::new();
        for record in live.iter().filter(quiet) {
            // By now, somebody else's container may have its number.
            if !matches!(self.pve.carries(&record.mark()).await, Ok(true)) {
                continue;
            }
            if let Err(error) = self.limit_processes(record).await {
                failed.insert(record.id, error.message);
            }
        }
        let mut memory = self.process_limits.0.lock();
        for (id, why) in failed.iter().filter(|(id, _)| !memory.failed.contains_key(*id)) {
            tracing::error!(sandbox_id = %id, why, "sandbox runs without its limit on processes");
        }
        memory.failed = failed;
    }

    /// Returns whether the kernel has no controller for the limit, and the sandboxes that run without it,
    /// each with the reason.
    pub(in crate::sandbox) fn unlimited(&self) -> (bool, BTreeMap<SandboxId, String>) {
        let memory = self.process_limits.0.lock();
        (memory.no_controller, memory.failed.clone())
    }
}
