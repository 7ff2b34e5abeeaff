//! Clone queues. PVE locks a template during a clone and fails a second clone at once, so clones of
//! one template wait here. The teams take turns.

use std::{collections::BTreeMap, time::Duration};

use daemon::sync::Mutex;
use proto::{Reason, id::Vmid, name::Team};
use tokio::time::Instant;

use super::fair_slots::{FairSlots, Slot};
use crate::sandbox::{Error, Result};

/// One queue per template, with one slot. Admission bounds how many wait; a node has few templates, so
/// their queues stay.
#[derive(Debug, Default)]
pub(crate) struct Queues(Mutex<BTreeMap<Vmid, FairSlots>>);

impl Queues {
    /// Waits for a turn at the template, for the work of this team or for the agent's own; it lasts until
    /// the slot is dropped.
    pub(crate) async fn turn(
        &self,
        template: Vmid,
        team: Option<&Team>,
        deadline: Instant,
    ) -> Result<Slot> {
        let queue = self.0.lock().entry(template).or_insert_with(|| FairSlots::new(1)).clone();
        queue.take(team, deadline).await.ok_or_else(|| {
            Error::new(Reason::QueueFull, format!("no turn at template {template} in time"))
                .retry_after(Duration::from_secs(5))
        })
    }
}
