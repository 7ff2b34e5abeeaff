//! Clone queues. PVE locks a template during a clone and fails a second clone at once, so clones of
//! one template wait here, first come first served.

use std::time::Duration;

use daemon::keyed_lock::{Guard, KeyedLock};
use proto::{Reason, id::Vmid};
use tokio::time::{Instant, timeout_at};

use crate::sandbox::{Error, Result};

/// One queue per template. Admission bounds how many wait.
#[derive(Debug, Default)]
pub(crate) struct Queues(KeyedLock<Vmid>);

impl Queues {
    /// Waits for a turn at the template; it lasts until the guard is dropped.
    pub(crate) async fn turn(&self, template: Vmid, deadline: Instant) -> Result<Guard<Vmid>> {
        timeout_at(deadline, self.0.lock(template)).await.map_err(|_| {
            Error::new(Reason::QueueFull, format!("no turn at template {template} in time"))
                .retry_after(Duration::from_secs(5))
        })
    }
}
