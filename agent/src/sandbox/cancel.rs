//! Calling a creation off, whether the node has heard of it or not.

use std::{sync::Arc, time::Duration};

use proto::{
    id::{SandboxId, SandboxRef},
    reason,
};

use super::{
    Error, Known, Sandboxes,
    flights::{Flight, Kind, Standing},
};
use crate::journal::Record;

impl Sandboxes {
    /// Makes attempts of `id` up to `attempt` void: one that is to come is refused, one under way is
    /// undone, one that has come up is deleted. Answers with what the node holds of it after at
    /// most `wait`.
    ///
    /// # Errors
    /// When the journal cannot be written, or what is there could not be removed yet.
    pub async fn cancel(
        self: &Arc<Self>,
        id: &SandboxId,
        attempt: u32,
        wait: Duration,
    ) -> Result<Option<Arc<Record>>, Error> {
        self.journal.cancel(id, attempt, self.now_ms()).await?;
        let name = SandboxRef::Id(*id);
        let under_way = self.gate.creation(id).is_some_and(|creation| creation.attempt <= attempt);
        if let Some(flight) = self.flights.find(id, Kind::Create).filter(|_| under_way) {
            flight.cancel();
            self.called_off(flight, wait).await?;
        }
        match self.known(&name) {
            None => Ok(None),
            Some(Known::Live(record))
                if record.attempt <= attempt && self.flights.find(id, Kind::Create).is_none() =>
            {
                self.delete(id, wait).await.map(Some)
            }
            Some(Known::Live(record)) => Ok(Some(record)),
            Some(Known::Ended(_)) => self.get(&name).await.map(Some),
        }
    }

    async fn called_off(&self, flight: Flight, wait: Duration) -> Result<(), Error> {
        match flight.ended(wait).await {
            // That it was called off before it was recorded is what was asked for.
            Standing::Done(Err(error)) if error.reason != reason::CREATE_CANCELLED => Err(error),
            Standing::Done(_) | Standing::UnderWay => Ok(()),
        }
    }
}
