//! Cuts open connections of ports that were closed, to the end: though the caller hangs up, and though the agent
//! crashes in between. The record says what is still to be cut (`Access::pending_cuts`); that is written with the closing.
//!
//! | step | after a crash |
//! |---|---|
//! | the closing and its pending cut in the journal | nothing was written, or the next agent goes on |
//! | the first cut | repeated by the next agent |
//! | `AGAIN` later the second one | repeated by the next agent |
//! | the pending cut leaves the record | repeated by the next agent |

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use daemon::{keyed_lock::KeyedLock, sync::Mutex};
use proto::{Reason, id::SandboxId, name::Port, visibility::Visibility};
use tokio::time::sleep;

use super::kill_connections;
use crate::sandbox::{Result, Sandboxes};

/// Cut of a sandbox's port, with the number of the closing.
type Cut = (SandboxId, Port, u64);

/// Cuts that this agent carries out.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct CutsUnderWay {
    all: Arc<Mutex<BTreeSet<Cut>>>,
    /// Held during the first cut, so that a caller whose cut another task has taken on waits for it.
    first: KeyedLock<SandboxId>,
}

/// Cuts of one sandbox that one task carries out, until they are dropped.
#[derive(Debug)]
struct Cuts {
    under_way: Arc<Mutex<BTreeSet<Cut>>>,
    id: SandboxId,
    /// Address of the sandbox at the closing; `None`: there are no connections.
    ip: Option<Ipv4Addr>,
    /// Ports, each with the number of its closing.
    ports: Vec<(Port, u64)>,
}

impl Drop for Cuts {
    fn drop(&mut self) {
        let mut under_way = self.under_way.lock();
        for (port, closing) in &self.ports {
            under_way.remove(&(self.id, *port, *closing));
        }
    }
}

impl Sandboxes {
    /// Begins the cuts that nobody carries out: an earlier agent has left them, or the journal failed behind the write
    /// of a closing.
    pub async fn resume_cuts(self: &Arc<Self>) {
        for record in self.live() {
            if !record.access.pending_cuts.is_empty() {
                self.begin_cuts(&record.id).await;
            }
        }
    }

    /// Cuts the connections that the sandbox's record says are still to be cut. Cuts them again in the background, once
    /// a request that got its route just before has connected.
    pub(super) async fn begin_cuts(self: &Arc<Self>, id: &SandboxId) {
        let _first = self.cuts.first.lock(*id).await;
        let Some(cuts) = self.take_on_cuts(id) else { return };
        for (port, _) in &cuts.ports {
            cut_now(cuts.ip, *port).await;
        }
        let sandboxes = Arc::clone(self);
        self.tasks.spawn(async move { sandboxes.complete_cuts(&cuts).await });
    }

    /// Takes on the pending cuts of a sandbox that no task carries out yet; `None` when there are none.
    fn take_on_cuts(&self, id: &SandboxId) -> Option<Cuts> {
        let mut under_way = self.cuts.all.lock();
        // Read under the lock: a cut that is complete leaves the record first, and then the set.
        let record = self.records.index.live(id)?;
        let pending = record.access.pending_cuts.iter().map(|(port, closing)| (*port, *closing));
        let ports: Vec<_> =
            pending.filter(|(port, closing)| under_way.insert((*id, *port, *closing))).collect();
        drop(under_way);
        if ports.is_empty() {
            return None;
        }
        // A fake PVE has no way in, and no connections either.
        let ip = record.lease().filter(|_| self.pve.enter(record.vmid).is_some());
        Some(Cuts { under_way: Arc::clone(&self.cuts.all), id: *id, ip, ports })
    }

    /// Cuts the second time, and then takes the pending cuts out of the record. When the agent stops before that time,
    /// the next one goes on.
    async fn complete_cuts(&self, cuts: &Cuts) {
        let stopping = self.tasks.stopping();
        let stops = stopping.run_until_cancelled(sleep(kill_connections::AGAIN)).await.is_none();
        for (port, _) in &cuts.ports {
            // Whoever connects once everybody may be there stays.
            cut_now(cuts.ip.filter(|ip| !self.is_public(&cuts.id, *ip, *port)), *port).await;
        }
        if stops {
            return;
        }
        // While the journal fails, only this write is repeated: who has connected since may stay.
        while let Err(error) = self.note_cuts(cuts).await {
            tracing::warn!(sandbox_id = %cuts.id, %error, "cut of connections was not recorded");
            let is_forgotten = error.reason == Reason::SandboxNotFound;
            let waited = stopping.run_until_cancelled(sleep(kill_connections::AGAIN));
            if is_forgotten || waited.await.is_none() {
                return;
            }
        }
    }

    async fn note_cuts(&self, cuts: &Cuts) -> Result<()> {
        let noted = self.records.change(&cuts.id, |record| {
            // A tombstone stays as it is.
            if !record.phase.ended() {
                cuts.ports.iter().for_each(|(port, closing)| record.note_cut(*port, *closing));
            }
        });
        noted.await.map(drop)
    }

    fn is_public(&self, id: &SandboxId, ip: Ipv4Addr, port: Port) -> bool {
        self.records.index.live(id).is_some_and(|record| {
            record.lease() == Some(ip) && record.visibility(port) == Some(Visibility::Public)
        })
    }
}

async fn cut_now(ip: Option<Ipv4Addr>, port: Port) {
    let Some(ip) = ip else { return };
    let to = SocketAddr::new(ip.into(), port.get());
    match kill_connections::connections(to).await {
        Ok(0) => {}
        Ok(connections) => tracing::info!(%to, connections, "open connections were cut"),
        Err(error) => tracing::warn!(%to, %error, "open connections were not cut"),
    }
}
