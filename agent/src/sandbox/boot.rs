//! Booting a container and waiting until it answers: the same for a creation and for a start.

use std::net::Ipv4Addr;

use proto::reason;
use tokio::{
    sync::SemaphorePermit,
    time::{Instant, timeout_at},
};

use super::{Error, Probe, Sandboxes, deadline, probe};
use crate::{journal::Record, saga::Lapse};

/// One boot.
pub(super) struct Boot<'a> {
    pub(super) record: &'a Record,
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
        self.check_ours(boot.record).await?;
        let left = deadline::left(boot.deadline, self.options.limits.start)?;
        self.pve.start(boot.record.vmid, left).await.map_err(Error::from)
    }

    /// `Ok` when the container carries this sandbox's mark: an operator may have taken it off, or
    /// made another container under the number.
    pub(super) async fn check_ours(&self, record: &Record) -> Result<(), Error> {
        let config = self.pve.config(record.vmid).await?;
        let ours = config.is_some_and(|config| config.mark() == Some(record.mark()));
        if ours || self.faults.lapses(Lapse::Entry) {
            return Ok(());
        }
        let message = format!("CT {} does not carry the mark of {}", record.vmid, record.id);
        Err(Error::new(reason::NOT_OURS, message))
    }

    /// Returns its address once it has one, runs commands and answers its probe.
    pub(super) async fn until_it_answers(&self, boot: &Boot<'_>) -> Result<Ipv4Addr, Error> {
        let until = boot.deadline.min(Instant::now() + self.options.limits.answer);
        probe::until_it_answers(&*self.pve, boot.record.vmid, boot.ip, boot.probe, until).await
    }
}
