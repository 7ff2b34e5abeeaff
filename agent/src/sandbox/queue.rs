//! Clone queues. PVE locks a template during a clone and fails a second clone at once, so clones of
//! one template wait here, first come first served.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use proto::{Reason, id::Vmid};
use tokio::{
    sync::OwnedMutexGuard,
    time::{Instant, timeout_at},
};

use super::Error;

/// One queue per template. Admission bounds how many wait.
#[derive(Debug, Default)]
pub(super) struct Queues(Mutex<BTreeMap<Vmid, Arc<tokio::sync::Mutex<()>>>>);

impl Queues {
    /// Waits for a turn at the template; it lasts until the guard is dropped.
    pub(super) async fn turn(
        &self,
        template: Vmid,
        deadline: Instant,
    ) -> Result<OwnedMutexGuard<()>, Error> {
        let queue = {
            let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(queues.entry(template).or_default())
        };
        timeout_at(deadline, queue.lock_owned()).await.map_err(|_| {
            Error::new(Reason::QueueFull, format!("no turn at template {template} in time"))
                .retry_after(Duration::from_secs(5))
        })
    }
}
