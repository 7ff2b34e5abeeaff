//! Opening and closing ports. Opening changes only the record, which the ingress reads for each
//! request; closing, and letting fewer in, also cuts open connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use daemon::sync::Mutex;
use proto::{
    Reason,
    id::SandboxId,
    name::{Port, ServiceName},
    spec::limit,
    visibility::Visibility,
};

use super::kill_connections;
use crate::{
    journal::Record,
    sandbox::{Error, Result, Sandboxes},
};

/// Services that were closed, with their ports.
pub type Closed = BTreeMap<ServiceName, Port>;

/// Visibility of a port that is opened.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Visibility that the caller wants; `None`: as the port has it.
    pub wanted: Option<Visibility>,
    /// Visibility of a port that was closed, where the caller wants none.
    pub default: Visibility,
}

impl Sandboxes {
    /// Opens a port under a name. Repeating it with the same port changes nothing, except the visibility where
    /// one is wanted.
    ///
    /// # Errors
    /// When there is no such sandbox, the name is taken by another port, or there are too many.
    pub async fn expose(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
        port: Port,
        reach: Reach,
    ) -> Result<Arc<Record>> {
        let before = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&before);
        let opened = self.amend_living(id, move |record| {
            match record.port_named(&name) {
                Some(known) if known != port => {
                    let why = format!("service {name} is port {known} already; hide it first");
                    return Err(Error::new(Reason::ServiceExists, why));
                }
                None if record.open_ports().len() >= limit::SERVICES_MAX => {
                    let why = format!("a sandbox has at most {} open ports", limit::SERVICES_MAX);
                    return Err(Error::new(Reason::FieldInvalid, why));
                }
                Some(_) | None => {}
            }
            *seen.lock() = record.visibility(port);
            record.open((name.clone(), port), reach.wanted, reach.default);
            record.note_opened(port);
            Ok(())
        });
        let opened = opened.await?;
        let before = *before.lock();
        let now = opened.visibility(port);
        // Whoever came in under the old rule has no place under the new one.
        if before.is_some() && now != before && now != Some(Visibility::Public) {
            self.cut_connections(&opened, port).await;
        }
        Ok(opened)
    }

    /// Closes a port under all of its names, and cuts open connections and forwards to it. `name` is one of the
    /// names; where two ports have it, both are closed. Also returns the services that were closed.
    ///
    /// # Errors
    /// When there is no such sandbox, or no service of this name in it.
    pub async fn hide(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
    ) -> Result<(Arc<Record>, Closed)> {
        let closed = Arc::new(Mutex::new(Vec::new()));
        let taken_out = Arc::clone(&closed);
        let hidden = self.amend_living(id, move |record| {
            let services = record.close_named(&name);
            if services.is_empty() {
                let why = format!("{} has no service {name}", record.id);
                return Err(Error::new(Reason::ServiceNotFound, why));
            }
            *taken_out.lock() = services;
            Ok(())
        });
        let hidden = hidden.await?;
        let closed = closed.lock().clone();
        let ports: BTreeSet<Port> = closed.iter().map(|(_, port)| *port).collect();
        for port in ports {
            if hidden.visibility(port).is_none() {
                self.forwards.cut(hidden.id, port);
                self.cut_connections(&hidden, port).await;
            }
        }
        Ok((hidden, closed.into_iter().collect()))
    }

    /// Cuts connections to a port now, and again once a request that got its route just before has
    /// connected; unless everybody may be there by then.
    pub(super) async fn cut_connections(self: &Arc<Self>, record: &Record, port: Port) {
        // A fake PVE has no way in, and no connections either.
        let Some(ip) = record.lease().filter(|_| self.pve.enter(record.vmid).is_some()) else {
            return;
        };
        let to = SocketAddr::new(ip.into(), port.get());
        cut_now(to).await;
        let (sandboxes, id) = (Arc::clone(self), record.id);
        self.tasks.spawn(async move {
            tokio::select! {
                () = sandboxes.tasks.stopping().cancelled() => {}
                () = tokio::time::sleep(kill_connections::AGAIN) => {}
            }
            if !sandboxes.is_public(&id, ip, port) {
                cut_now(to).await;
            }
        });
    }

    fn is_public(&self, id: &SandboxId, ip: Ipv4Addr, port: Port) -> bool {
        self.records.index.live(id).is_some_and(|record| {
            record.lease() == Some(ip) && record.visibility(port) == Some(Visibility::Public)
        })
    }
}

async fn cut_now(to: SocketAddr) {
    match kill_connections::connections(to).await {
        Ok(0) => {}
        Ok(connections) => tracing::info!(%to, connections, "open connections were cut"),
        Err(error) => tracing::warn!(%to, %error, "open connections were not cut"),
    }
}
