//! Limits on the processes and the disk use of every sandbox, which are in its cgroup. The kernel forgets
//! them at each boot of a container, so they are written again at each: by `limit_boots` as soon as there is
//! a cgroup, and where that is missed by a start before anything is entered, by whoever notices a boot that
//! nobody asked for, before a shim is started, and by each pass of the reconciler.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use daemon::sync::Mutex;
use proto::{Reason, id::SandboxId};

use crate::{
    journal::Record,
    pve::{self, IoLimited, Limited},
    sandbox::{Error, Result, Sandboxes},
};

/// Facts about the limits on this host.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct CgroupLimits(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    /// Controllers of cgroups that the kernel was found not to have, with what is not limited.
    missing: BTreeMap<&'static str, &'static str>,
    /// Sandboxes with volumes whose use cannot be limited, with the reasons.
    unlimited: BTreeMap<SandboxId, BTreeSet<String>>,
    /// Sandboxes that run without a limit, with the reason, as of the last pass.
    failed: BTreeMap<SandboxId, String>,
}

/// Reason why a limit is not in force.
pub(super) struct Unlimited {
    /// Subject of the sentence about it, with its verb.
    what: &'static str,
    error: pve::Error,
}

impl Sandboxes {
    /// Limits what a sandbox uses of the kernel. Does nothing when its container does not run, and where
    /// the kernel has no controller for it.
    ///
    /// # Errors
    /// LIMITS_FAILED when the container runs without a limit.
    pub(in crate::sandbox) async fn limit_in_cgroup(&self, record: &Record) -> Result<()> {
        match self.write_limits(record).await {
            Ok(()) => Ok(()),
            Err(unlimited) => self.unless_stopped(record, unlimited).await,
        }
    }

    /// Writes the limits of a container, first those on its processes.
    pub(super) async fn write_limits(&self, record: &Record) -> Result<(), Unlimited> {
        self.limit_processes(record).await?;
        self.limit_io(record).await
    }

    async fn limit_processes(&self, record: &Record) -> Result<(), Unlimited> {
        let limited = self.pve.limit_processes(record.vmid, self.options.limits.processes).await;
        match limited.map_err(|error| Unlimited { what: "processes are", error })? {
            Limited::InForce => {}
            Limited::NoController => self.note_missing("pids", "the processes of sandboxes"),
        }
        Ok(())
    }

    async fn limit_io(&self, record: &Record) -> Result<(), Unlimited> {
        let limited = self.pve.limit_io(record.vmid, self.options.limits.io).await;
        let why = match limited.map_err(|error| Unlimited { what: "use of disks is", error })? {
            IoLimited::InForce => BTreeSet::new(),
            IoLimited::NoController => {
                self.note_missing("io", "reads and writes of sandboxes");
                BTreeSet::new()
            }
            IoLimited::Partly(why) => why,
        };
        let mut memory = self.cgroup_limits.0.lock();
        if why.is_empty() {
            memory.unlimited.remove(&record.id);
        } else {
            memory.unlimited.insert(record.id, why);
        }
        Ok(())
    }

    fn note_missing(&self, controller: &'static str, what: &'static str) {
        let known = self.cgroup_limits.0.lock().missing.insert(controller, what).is_some();
        if !known {
            tracing::warn!(
                controller,
                what,
                "a controller of cgroups is missing: nothing limits this"
            );
        }
    }

    /// Fails unless the container has ended meanwhile.
    async fn unless_stopped(&self, record: &Record, unlimited: Unlimited) -> Result<()> {
        if !self.pve.running(record.vmid).await {
            return Ok(());
        }
        let Unlimited { what, error } = unlimited;
        let message = format!("the sandbox's {what} not limited: {error}");
        Err(Error::new(Reason::LimitsFailed, message))
    }

    /// Limits a sandbox in a boot that nobody asked for.
    pub(in crate::sandbox) async fn limit_found_in_cgroup(&self, record: &Record) {
        if let Err(error) = self.limit_in_cgroup(record).await {
            tracing::error!(sandbox_id = %record.id, %error, "sandbox booted without a limit in its cgroup");
        }
    }

    /// Limits all sandboxes that run.
    pub async fn enforce_cgroup_limits(&self) {
        let (busy, live) = (self.busy(), self.live());
        let quiet = |record: &&Arc<Record>| record.phase.is_up() && !busy.contains(&record.id);
        let mut failed = BTreeMap::new();
        for record in live.iter().filter(quiet) {
            // By now, somebody else's container may have its number.
            if !matches!(self.pve.carries(&record.mark()).await, Ok(true)) {
                continue;
            }
            if let Err(error) = self.limit_in_cgroup(record).await {
                failed.insert(record.id, error.message);
            }
        }
        let up: BTreeSet<_> =
            self.live().iter().filter(|r| r.phase.is_up()).map(|r| r.id).collect();
        let mut memory = self.cgroup_limits.0.lock();
        for (id, why) in failed.iter().filter(|(id, _)| !memory.failed.contains_key(*id)) {
            tracing::error!(sandbox_id = %id, why, "sandbox runs without a limit in its cgroup");
        }
        memory.failed = failed;
        memory.unlimited.retain(|id, _| up.contains(id));
    }

    /// Returns what is not limited, with the reason: of single sandboxes, or on the whole node.
    pub(in crate::sandbox) fn unlimited(&self) -> Vec<(Option<SandboxId>, String)> {
        let node = |why: String| (None, why);
        let memory = self.cgroup_limits.0.lock();
        let missing = memory.missing.iter().map(|(controller, what)| {
            node(format!(
                "the kernel has no cgroup controller `{controller}`: {what} are not limited"
            ))
        });
        // One finding for a reason: many sandboxes may have the same.
        let mut reasons = BTreeMap::<&str, usize>::new();
        for why in memory.unlimited.values().flatten() {
            *reasons.entry(why).or_default() += 1;
        }
        let unlimited = reasons.into_iter().map(|(why, count)| {
            node(format!(
                "reads and writes of {count} sandboxes are not limited: {why} (limits.io_* = 0 in agent.toml \
                 asks for no limit)"
            ))
        });
        let failed = memory.failed.iter().map(|(id, why)| (Some(*id), why.clone()));
        missing.chain(unlimited).chain(failed).collect()
    }
}
