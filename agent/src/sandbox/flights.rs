//! Operations under way. One at a time works on a sandbox; the same one asked for twice is joined;
//! another kind waits for its turn. Each runs on a task of its own, so a caller that hangs up
//! cancels nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::{Reason, id::SandboxId};
use tokio::{
    sync::{OwnedMutexGuard, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::Error;
use crate::journal::Record;

/// What is being done to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Made.
    Create,
    /// Unmade, after a creation that a crash cut short.
    Undo,
    /// Booted.
    Start,
    /// Stopped.
    Stop,
    /// Frozen.
    Pause,
    /// Frozen, or else stopped.
    PauseOrStop,
    /// Thawed.
    Resume,
    /// Made what its phase says, as far as a pause goes.
    Settle,
    /// Removed.
    Delete,
    /// Looked at, whether it still runs.
    Look,
    /// A container that was there becomes it.
    Adopt,
    /// Its container is left.
    Release,
    /// Its container goes to another node.
    HandOver,
    /// Its container went to another node.
    Leave,
}

#[derive(Debug, Clone)]
enum Progress {
    Begun,
    Recorded,
    Done(Result<Arc<Record>, Error>),
}

/// An operation that somebody may wait for, or call off.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    id: SandboxId,
    progress: watch::Receiver<Progress>,
    cancel: CancellationToken,
}

/// How an operation stands when the wait is over.
#[derive(Debug)]
pub(super) enum Standing {
    Done(Result<Arc<Record>, Error>),
    UnderWay,
}

impl Flight {
    /// The sandbox.
    pub(super) fn id(&self) -> SandboxId {
        self.id
    }

    /// Waits until the operation has ended, at most so long.
    pub(super) async fn ended(mut self, wait: Duration) -> Standing {
        match timeout(wait, self.progress.wait_for(|p| matches!(p, Progress::Done(_)))).await {
            Ok(Ok(progress)) => match &*progress {
                Progress::Done(result) => Standing::Done(result.clone()),
                Progress::Begun | Progress::Recorded => Standing::UnderWay,
            },
            Ok(Err(_)) => Standing::Done(Err(lost())),
            Err(_) => Standing::UnderWay,
        }
    }

    /// Waits until the intent is durable or the operation has ended.
    pub(super) async fn recorded(&mut self, wait: Duration) {
        let recorded = self.progress.wait_for(|p| !matches!(p, Progress::Begun));
        // Whatever it is, `ended` finds it out again.
        drop(timeout(wait, recorded).await);
    }

    /// Asks the operation to stop and to undo what it did.
    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }
}

/// The task ended without a word.
pub(super) fn lost() -> Error {
    Error::new(Reason::ShuttingDown, "the agent stopped during the operation")
        .retry_after(Duration::from_secs(2))
}

#[derive(Debug, Default)]
struct Runway {
    lock: Arc<tokio::sync::Mutex<()>>,
    flights: Vec<(Kind, Flight)>,
}

/// All operations under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<SandboxId, Runway>>>);

/// Whether an operation is new.
#[derive(Debug)]
pub(super) enum Entered {
    /// The caller must run it.
    New(Ticket, Flight),
    /// It is under way already.
    Joined(Flight),
}

impl Flights {
    /// Enters an operation, unless one of its kind is under way.
    pub(super) fn enter(&self, id: SandboxId, kind: Kind) -> Entered {
        let mut map = self.lock();
        let runway = map.entry(id).or_default();
        if let Some((_, flight)) = runway.flights.iter().find(|(known, _)| *known == kind) {
            return Entered::Joined(flight.clone());
        }
        let (sender, progress) = watch::channel(Progress::Begun);
        let flight = Flight { id, progress, cancel: CancellationToken::new() };
        runway.flights.push((kind, flight.clone()));
        let crew = Crew {
            id,
            progress: sender,
            cancel: flight.cancel.clone(),
            turn: Arc::clone(&runway.lock),
        };
        let ticket = Ticket { kind, crew, flights: self.clone() };
        Entered::New(ticket, flight)
    }

    /// The operation of this kind, if it is under way.
    pub(super) fn find(&self, id: &SandboxId, kind: Kind) -> Option<Flight> {
        let map = self.lock();
        let flights = &map.get(id)?.flights;
        flights.iter().find(|(known, _)| *known == kind).map(|(_, flight)| flight.clone())
    }

    /// Sandboxes that something is being done to.
    pub(super) fn busy(&self) -> Vec<SandboxId> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Runway>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an operation knows of itself.
#[derive(Debug, Clone)]
pub(super) struct Crew {
    id: SandboxId,
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Crew {
    /// Waits until no other operation works on the sandbox.
    pub(super) async fn turn(&self, deadline: Instant) -> Result<OwnedMutexGuard<()>, Error> {
        timeout_at(deadline, Arc::clone(&self.turn).lock_owned()).await.map_err(|_| {
            Error::new(
                Reason::SandboxBusy,
                format!("another operation on {} did not end in time", self.id),
            )
            .retry_after(Duration::from_secs(2))
        })
    }

    /// Cancelled when the operation was called off.
    pub(super) fn cancelled(&self) -> &CancellationToken {
        &self.cancel
    }

    /// The intent is durable.
    pub(super) fn recorded(&self) {
        self.progress.send_replace(Progress::Recorded);
    }
}

/// The right to run an operation. Dropped, however the task ends, it makes way.
#[derive(Debug)]
pub(super) struct Ticket {
    kind: Kind,
    crew: Crew,
    flights: Flights,
}

impl Ticket {
    /// Who works on it.
    pub(super) fn crew(&self) -> Crew {
        self.crew.clone()
    }

    /// The operation has ended.
    pub(super) fn done(self, result: Result<Arc<Record>, Error>) {
        let progress = self.crew.progress.clone();
        // First out of the map, so that whoever hears of the end can begin anew at once.
        drop(self);
        progress.send_replace(Progress::Done(result));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut map = self.flights.lock();
        if let Some(runway) = map.get_mut(&self.crew.id) {
            runway.flights.retain(|(kind, _)| *kind != self.kind);
            if runway.flights.is_empty() {
                map.remove(&self.crew.id);
            }
        }
    }
}
