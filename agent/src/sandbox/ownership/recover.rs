//! Recovering a container that carries our mark and is in no journal: the journal was lost, or is
//! an older one. Until an operator decides, the container is left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxRef, Vmid},
    name::SnapshotId,
    sandbox::v1::StopResult,
    spec::{Egress, Network, Size},
};

use crate::{
    journal::{self, Access, Lifetime, Phase, Record, WakeOn},
    pve::{ContainerConfig, Mark, OwnVolumes, pause_lock},
    sandbox::{Error, Known, Result, Sandboxes, core::operations::lost, drift::observe},
};

impl Sandboxes {
    /// Records the container as the sandbox that its mark names: running, paused or stopped as it
    /// is, with its ports closed. Does nothing to the container. With `dry_run` nothing is written.
    ///
    /// # Errors
    /// NOT_OURS when it carries no mark for its own vmid; CONTAINER_LOCKED when somebody works on
    /// it; SANDBOX_KNOWN when the journal has it, or another one with its vmid, address or request;
    /// SANDBOX_DELETED when it has ended; ISOLATION_FAILED when it shall be closed and nothing is
    /// isolated here; DHCP_REFUSED and ADDRESS_CONFLICT as `address_of`.
    pub async fn recover(
        self: &Arc<Self>,
        vmid: Vmid,
        egress: Egress,
        dry_run: bool,
    ) -> Result<Arc<Record>> {
        let config = self.container(vmid).await?;
        self.check_egress(&egress)?;
        if egress != Egress::Open {
            self.check_interfaces(vmid, &config)?;
        }
        let mark = config.mark().filter(|mark| mark.vmid == vmid && !config.is_template());
        let Some(mark) = mark else {
            let why = format!("container {vmid} does not carry a mark of ours for its number");
            return Err(Error::new(Reason::NotOurs, why));
        };
        // The lock of a pause is ours, and outlives the journal.
        if let Some(lock) = config.lock().filter(|_| !pause_lock::is_held(&config)) {
            let why = format!("CT {vmid} is locked ({lock}): somebody works on it");
            return Err(Error::new(Reason::ContainerLocked, why));
        }
        match self.known(&SandboxRef::Id(mark.sandbox_id)) {
            None => {}
            Some(Known::Live(_)) => {
                let why = format!("{} is known, there is nothing to recover", mark.sandbox_id);
                return Err(Error::new(Reason::SandboxKnown, why));
            }
            Some(Known::Ended(_)) => {
                let why = format!("{} has ended: what is left of it is removed", mark.sandbox_id);
                return Err(Error::new(Reason::SandboxDeleted, why));
            }
        }
        let record = self.record_of(&config, &mark, SnapshotId::RECOVERED).await?;
        let record = Record { egress, ..record };
        if dry_run {
            return Ok(Arc::new(record));
        }
        let record = self.take_in(record).await?;
        tracing::warn!(sandbox_id = %record.id, %vmid, phase = ?record.phase, "sandbox recovered");
        Ok(record)
    }

    /// Reads the config of a container of this node.
    pub(in crate::sandbox) async fn container(&self, vmid: Vmid) -> Result<ContainerConfig> {
        self.pve.config(vmid).await?.ok_or_else(|| {
            Error::new(Reason::SandboxNotFound, format!("this node has no container {vmid}"))
        })
    }

    /// Writes the first record of an existing container, on its own task as `amend_living` does.
    pub(in crate::sandbox) async fn take_in(
        self: &Arc<Self>,
        record: Record,
    ) -> Result<Arc<Record>> {
        let (sandboxes, vmid) = (Arc::clone(self), record.vmid);
        let written = self.tasks.run(async move {
            let record = sandboxes.records.adopt(&record).await?;
            sandboxes.isolate_after_change(&record.id).await;
            Ok(record)
        });
        let written = written.await.ok_or_else(lost)?;
        if written.as_ref().is_ok_and(|record| record.egress != Egress::Open) {
            // The record stands: if this fails, each pass of the reconciler tries again.
            self.isolate().await?;
        }
        written.map_err(|error| {
            if matches!(error, journal::Error::Conflict { .. }) {
                let why = "another sandbox has its number, its address or its request";
                return Error::new(Reason::SandboxKnown, format!("container {vmid}: {why}"));
            }
            error.into()
        })
    }

    /// Builds the record of a container that is in no journal.
    pub(in crate::sandbox) async fn record_of(
        &self,
        config: &ContainerConfig,
        mark: &Mark,
        snapshot: &str,
    ) -> Result<Record> {
        let running = self.pve.running(mark.vmid).await;
        let (network, ip) = self.address_of(mark.vmid, config).await?;
        let created_ms = mark.sandbox_id.created_ms();
        let now = self.clock.moment();
        Ok(Record {
            id: mark.sandbox_id,
            vmid: mark.vmid,
            // The real template is unknown.
            template: mark.vmid,
            team: mark.team.clone(),
            request_id: mark.request_id.clone(),
            body_digest: String::new(),
            attempt: mark.attempt,
            phase: match (running, pause_lock::is_held(config)) {
                (true, true) => Phase::Paused,
                (true, false) => Phase::Running,
                (false, _) => Phase::Stopped,
            },
            progress: Progress::Done,
            snapshot: snapshot.parse()?,
            size: Size {
                cpu_cores: config.cores().unwrap_or(1),
                memory_mib: config.memory_mib(),
                disk_gib: config.rootfs_gib(),
            },
            resizing: None,
            disk_unfinished: false,
            network,
            ip,
            ip_granted: network == Network::Dhcp && ip.is_some(),
            further_ips: config.further_addresses(),
            egress: Egress::default(),
            services: BTreeMap::new(),
            access: Access::default(),
            name: None,
            metadata: BTreeMap::new(),
            env: Default::default(),
            env_lost: false,
            // Facts about earlier boots do not apply to this one.
            boot: 1,
            created_ms,
            started_ms: if running { now.wall_ms } else { 0 },
            ended_ms: 0,
            wake_on: WakeOn::default(),
            lifetime: Lifetime::default(),
            since: now,
            cause: Cause::ASKED,
            init: None,
            halt_by: None,
            stop_result: StopResult::Unspecified,
            adopted: false,
            moved_to: None,
            // The maker of volumes that its config does not name is unknown.
            volumes: OwnVolumes::default(),
            failure: None,
            revision: 0,
        })
    }

    /// Stores the addresses of observed containers that are no sandboxes of ours.
    pub async fn note_foreign_addresses(&self, observed: &observe::Observed) {
        let own: BTreeSet<Vmid> = self.live().iter().map(|record| record.vmid).collect();
        let strangers = observed.containers.iter().filter(|(vmid, _)| !own.contains(vmid));
        let ips = strangers.flat_map(|(_, container)| container.ips.iter().copied()).collect();
        *self.foreign_addresses.lock().await = Some(ips);
    }

    /// Addresses that no sandbox may get, even if they are free in the journal.
    pub(in crate::sandbox) async fn taken_addresses(&self) -> BTreeSet<Ipv4Addr> {
        if let Some(known) = self.foreign_addresses.lock().await.clone() {
            return known;
        }
        if let Ok(observed) = observe::observe(&*self.pve).await {
            self.note_foreign_addresses(&observed).await;
        }
        self.foreign_addresses.lock().await.clone().unwrap_or_default()
    }
}
