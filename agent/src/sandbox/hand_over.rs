//! Giving a stopped sandbox to another node that sees its volumes, because this one is to become empty.
//!
//! ```text
//!  here: hand_over   the container's config goes to the other node, then the record is given to whoever
//!                    asked, and does not change here any more
//!  there: take_over  the other journal has the record, with an address of its own
//!  here: leave       this journal lets go of it
//! ```
//! Each is repeated without harm, so whoever asks can be cut off anywhere and begins anew. Nothing is
//! lost on the way: until the last, this journal has the record.

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef},
    name::NodeName,
    spec::Network,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    Dhcp, Error, Event, Known, Sandboxes,
    flights::{Crew, Kind, lost},
    look::Place,
};
use crate::{
    clock::Moment,
    journal::{self, Lifetime, Phase, Record},
    pve::ErrorKind,
    saga::Lapse,
};

/// A sandbox as it goes over.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Handed {
    /// All that its node knows of it.
    pub record: Record,
    /// The clocks of its node by then: no two nodes have the same.
    pub now: Moment,
}

impl Sandboxes {
    /// Gives the container to the node, and answers with the sandbox and where the container is: on
    /// the node that it was given to before, if it was.
    ///
    /// # Errors
    /// NOT_MOVABLE when it is not stopped, or the other node is not online or does not see its volumes;
    /// NOT_OURS when its container is not its own any more.
    pub async fn hand_over(
        self: &Arc<Self>,
        id: &SandboxId,
        target: &NodeName,
        wait: Duration,
    ) -> Result<(Handed, NodeName), Error> {
        let (id, to) = (*id, target.clone());
        self.living_or_going(&id)?;
        let flight = self.launch(id, Kind::HandOver, |sandboxes, crew| async move {
            sandboxes.hand_over_now(&id, &to, &crew).await
        });
        let record = self.outcome(flight, wait).await?;
        match self.place(&record).await? {
            Some(Place::Elsewhere(node)) => {
                let (record, now) = (Record::clone(&record), self.clock.moment());
                Ok((Handed { record, now }, node))
            }
            Some(Place::Here { .. } | Place::Taken | Place::Gone) | None => {
                let why = format!("{id} is not on another node: ask again");
                Err(Error::new(Reason::NotMovable, why))
            }
        }
    }

    async fn hand_over_now(
        &self,
        id: &SandboxId,
        target: &NodeName,
        crew: &Crew,
    ) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living_or_going(id)?;
        let going = record.phase == Phase::Deleting;
        if !(record.phase == Phase::Stopped || going) || record.adopted {
            let why = format!("{id} is not stopped, or was adopted: it stays where it is");
            return Err(Error::new(Reason::NotMovable, why));
        }
        match self.place(&record).await? {
            Some(Place::Here { running: false }) if !going => {}
            // Also of what was deleted after it had been given away: it is deleted there.
            Some(Place::Elsewhere(_)) => return self.given(record).await,
            Some(Place::Here { .. } | Place::Taken | Place::Gone) | None => {
                let why =
                    format!("the container of {id} runs, is being deleted, or is not its own");
                return Err(Error::new(Reason::NotMovable, why));
            }
        }
        let handed = self.pve.hand_to(record.vmid, id, target).await;
        handed.map_err(|error| {
            if matches!(error.kind, ErrorKind::WrongState(_)) {
                return Error::new(Reason::NotMovable, format!("{id}: {error}"));
            }
            Error::from(error)
        })?;
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, %target, "gave its container away");
        if self.faults.lapses(Lapse::Leave) {
            return self.left(id, target.clone()).await;
        }
        self.given(record).await
    }

    /// The record as it goes over: what is asked for from now on is asked for there.
    async fn given(&self, record: Arc<Record>) -> Result<Arc<Record>, Error> {
        if record.phase == Phase::Deleting || record.progress == Progress::Export {
            return Ok(record);
        }
        self.amend(&record.id, |record| {
            record.progress = Progress::Export;
            Ok(())
        })
        .await
    }

    /// Takes a sandbox over whose container another node has given to this one: stopped, with all that
    /// its record said, and with an address of this node's. One that was being deleted is deleted here.
    ///
    /// # Errors
    /// NOT_OURS when its container is not here; SANDBOX_KNOWN when a sandbox of its number or request
    /// is; ADDRESSES_EXHAUSTED; NODE_NUMBER_CHANGED.
    pub async fn take_over(
        self: &Arc<Self>,
        handed: Handed,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let Handed { record, now } = handed;
        let (id, vmid) = (record.id, record.vmid);
        let (phase, progress) = if record.phase == Phase::Deleting {
            (Phase::Deleting, Progress::Done)
        } else {
            (Phase::Stopped, Progress::Import)
        };
        match self.known(&SandboxRef::Id(id)) {
            Some(Known::Live(known)) if known.vmid == vmid && phase == Phase::Deleting => {
                return self.delete(&id, wait).await;
            }
            Some(Known::Live(known)) if known.vmid == vmid => {}
            Some(Known::Live(_)) => {
                return Err(Error::new(Reason::SandboxKnown, format!("{id} is here already")));
            }
            Some(Known::Ended(_)) | None => {
                let config = self.container(vmid).await?;
                if config.mark() != Some(record.mark()) || config.is_template() {
                    let why = format!("container {vmid} does not carry the mark of {id}");
                    return Err(Error::new(Reason::NotOurs, why));
                }
                self.check_number().await?;
                self.unlock_before(&id, Instant::now() + self.options.limits.turn).await?;
                let network = match self.options.network.dhcp {
                    Dhcp::Refused => Network::Static,
                    Dhcp::OnRequest => record.network,
                    Dhcp::All => Network::Dhcp,
                };
                let here = self.clock.moment();
                let moment = |moment: &Moment| moment.elsewhere(&now, &here);
                let expires = record.lifetime.expires.as_ref().map(moment);
                self.write_taken(Record {
                    phase,
                    progress,
                    failure: None,
                    moved_to: None,
                    ip: None,
                    ip_granted: false,
                    network,
                    since: moment(&record.since),
                    lifetime: Lifetime { expires, ..record.lifetime.clone() },
                    revision: 0,
                    ..record
                })
                .await?;
            }
        }
        let taken = self.living_or_going(&id)?;
        if taken.phase == Phase::Deleting {
            return Ok(taken);
        }
        self.finish_adoption(&id, wait).await
    }

    /// On a task of its own, as `amend_living` does.
    async fn write_taken(self: &Arc<Self>, record: Record) -> Result<(), Error> {
        let (sandboxes, vmid) = (Arc::clone(self), record.vmid);
        let written = self.tasks.run(async move {
            let (taken, now_ms) = (sandboxes.taken_addresses().await, sandboxes.now_ms());
            let written = sandboxes.journal.take_over(&record, taken, now_ms).await?;
            sandboxes.index.apply(written);
            Ok(())
        });
        written.await.ok_or_else(lost)?.map_err(|error| {
            if matches!(error, journal::Error::Conflict { .. }) {
                let why = "another sandbox has its number or its request";
                return Error::new(Reason::SandboxKnown, format!("container {vmid}: {why}"));
            }
            error.into()
        })
    }

    /// Lets go of one that `to` has taken over, with its container: it goes on there. One that
    /// has gone already is as it should be.
    ///
    /// # Errors
    /// NOT_MOVABLE when its container is not there.
    pub async fn leave(
        self: &Arc<Self>,
        id: &SandboxId,
        to: &NodeName,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let (id, to) = (*id, to.clone());
        if self.index.live(&id).is_none() {
            return self.get(&SandboxRef::Id(id)).await;
        }
        let flight = self.launch(id, Kind::Leave, |sandboxes, crew| async move {
            sandboxes.leave_now(&id, &to, &crew).await
        });
        self.outcome(flight, wait).await
    }

    async fn leave_now(
        &self,
        id: &SandboxId,
        to: &NodeName,
        crew: &Crew,
    ) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living_or_going(id)?;
        let place = self.place(&record).await?;
        if !matches!(&place, Some(Place::Elsewhere(there)) if there == to) {
            let why = format!("container {} of {id} is not on {to}", record.vmid);
            return Err(Error::new(Reason::NotMovable, why));
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, node = %to, "it has left");
        self.left(id, to.clone()).await
    }

    async fn left(&self, id: &SandboxId, there: NodeName) -> Result<Arc<Record>, Error> {
        self.advance_because(id, Event::Released, Cause::Moved, |record| {
            (record.failure, record.moved_to) = (None, Some(there.clone()));
        })
        .await
    }

    /// Connects a container that came from another node to this one. What is to come up must have its
    /// address first: a crash may have been in between.
    pub(super) async fn connected(&self, record: Arc<Record>) -> Result<Arc<Record>, Error> {
        if record.progress != Progress::Import {
            return Ok(record);
        }
        self.pve.configure(record.vmid, &self.settings(&record)).await.map_err(Error::from)?;
        self.amend(&record.id, |record| {
            record.progress = Progress::Done;
            Ok(())
        })
        .await
    }
}

/// Refuses what another node would not hear of.
pub(super) fn on_its_way(record: &Record) -> Result<(), Error> {
    if record.progress != Progress::Export {
        return Ok(());
    }
    let why =
        format!("{} is on its way to another node: ask again, or drain its node again", record.id);
    Err(Error::new(Reason::SandboxBusy, why).retry_after(Duration::from_secs(1)))
}
