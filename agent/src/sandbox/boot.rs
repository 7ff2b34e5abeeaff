//! Booting a container and waiting until it answers: the same for a creation and for a start.

use std::net::Ipv4Addr;

use proto::{id::Vmid, reason};
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, timeout_at},
};

use super::{Error, Probe, Sandboxes, deadline, probe};

/// One boot.
pub(super) struct Boot<'a> {
    pub(super) vmid: Vmid,
    /// The address that it must get; any, when unknown.
    pub(super) ip: Option<Ipv4Addr>,
    pub(super) probe: &'a Probe,
    pub(super) deadline: Instant,
}

impl Sandboxes {
    /// Waits for a place among the few that boot at a time.
    pub(super) async fn start_slot(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Error> {
        let slot = timeout_at(deadline, self.starts.acquire()).await;
        slot.ok()
            .and_then(Result::ok)
            .ok_or_else(|| Error::new(reason::QUEUE_FULL, "no place among those that boot in time"))
    }

    pub(super) async fn start_container(&self, boot: &Boot<'_>) -> Result<(), Error> {
        let left = deadline::left(boot.deadline, self.options.limits.start)?;
        self.pve.start(boot.vmid, left).await.map_err(Error::from)
    }

    /// Returns its address once it has one, runs commands and answers its probe.
    pub(super) async fn until_it_answers(&self, boot: &Boot<'_>) -> Result<Ipv4Addr, Error> {
        let until = boot.deadline.min(Instant::now() + self.options.limits.answer);
        probe::until_it_answers(&*self.pve, boot.vmid, boot.ip, boot.probe, until).await
    }
}
