//! Boots a container and waits until it is ready, both for a creation and for a start.

use std::{net::Ipv4Addr, time::Duration};

use proto::{Reason, name::Team, spec::Network};
use tokio::time::{Instant, timeout};

use super::probe;
use crate::{
    journal::Record,
    pve::ContainerConfig,
    sandbox::{Error, Probe, Result, Sandboxes, admission::fair_slots::Slot, core::deadline},
};

/// Longest time for which a container keeps its slot once PVE has started it. A boot takes a few seconds; one that
/// does not end must not keep other teams from theirs.
const BOOT: Duration = Duration::from_secs(5);

/// Container boot under way.
pub(crate) struct Boot<'a> {
    pub(crate) record: &'a Record,
    /// Start of the boot: earlier DHCP replies belong to another boot.
    pub(crate) begun: Instant,
    pub(crate) probe: &'a Probe,
    pub(crate) deadline: Instant,
}

/// Does what is left of a boot once PVE has started the container. Its slot is given back at the end, or after
/// [`BOOT`]: by then the node has done its own work.
pub(super) async fn in_slot<T>(slot: Slot, rest: impl Future<Output = T>) -> T {
    let mut rest = Box::pin(rest);
    if let Ok(done) = timeout(BOOT, &mut rest).await {
        return done;
    }
    drop(slot);
    rest.await
}

impl Sandboxes {
    /// Waits for one of the few slots for containers that boot at the same time. The teams take turns.
    pub(in crate::sandbox) async fn start_slot(
        &self,
        team: &Team,
        deadline: Instant,
    ) -> Result<Slot> {
        let slot = self.starts.take(Some(team), deadline).await;
        slot.ok_or_else(|| Error::new(Reason::QueueFull, "no free slot for a start in time"))
    }

    /// Starts the container. Returns the static addresses of its interfaces beside `net0`.
    pub(in crate::sandbox) async fn start_container(
        &self,
        boot: &Boot<'_>,
    ) -> Result<Vec<Ipv4Addr>> {
        let config = self.config_of_ours(boot.record).await?;
        self.check_connection(boot.record, &config).await?;
        if boot.record.network == Network::Dhcp {
            self.network_of(Network::Dhcp)?;
            if let Some(net0) = config.net0() {
                self.check_dhcp_bridge(&net0.bridge)?;
            }
        }
        self.isolate_before_start(boot.record, &config).await?;
        let left = deadline::left(boot.deadline, self.options.limits.start)?;
        self.pve.start(boot.record.vmid, left).await?;
        self.limit_in_cgroup(boot.record).await?;
        // Now it shows which bridge PVE made for its VLAN, if it did.
        self.isolate().await?;
        Ok(config.further_addresses())
    }

    /// Reads the config of the container, which must carry this sandbox's mark: an operator may
    /// have removed the mark, or made another container under the vmid.
    ///
    /// # Errors
    /// NOT_OURS when it does not.
    async fn config_of_ours(&self, record: &Record) -> Result<ContainerConfig> {
        let config = self.pve.config(record.vmid).await?;
        config.filter(|config| config.mark() == Some(record.mark())).ok_or_else(|| not_ours(record))
    }

    /// Checks that the container carries this sandbox's mark. While pmxcfs is unavailable, a
    /// running container is recognised by its init.
    ///
    /// # Errors
    /// NOT_OURS when it does not; NO_QUORUM when that cannot be decided.
    pub(in crate::sandbox) async fn check_ours(&self, record: &Record) -> Result<()> {
        if self.pve.carries(&record.mark()).await? {
            return Ok(());
        }
        Err(not_ours(record))
    }

    /// Waits until the sandbox has its address, runs commands and passes its probe.
    pub(in crate::sandbox) async fn until_it_answers(&self, boot: &Boot<'_>) -> Result<()> {
        let until = boot.deadline.min(Instant::now() + self.options.limits.answer);
        let Record { vmid, network, ip, .. } = *boot.record;
        let ip = match network {
            Network::Static => ip,
            Network::Dhcp => Some(self.lease_from_dhcp(boot, until).await?),
        };
        probe::until_it_answers(&*self.pve, vmid, ip, boot.probe, until).await?;
        // From now on its init identifies it, even if pmxcfs fails before the next check.
        drop(self.pve.carries(&boot.record.mark()).await);
        Ok(())
    }
}

fn not_ours(record: &Record) -> Error {
    let message = format!("CT {} does not carry the mark of {}", record.vmid, record.id);
    Error::new(Reason::NotOurs, message)
}
