//! Opening and closing ports. Opening changes only the record, which the ingress reads for each
//! request; closing also cuts open connections.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use daemon::sync::Mutex;
use proto::{
    Reason,
    id::SandboxId,
    name::{Port, ServiceName},
    spec::limit,
};

use super::kill_connections;
use crate::{
    journal::Record,
    sandbox::{Error, Result, Sandboxes},
};

/// Services that were closed, with their ports.
pub type Closed = BTreeMap<ServiceName, Port>;

impl Sandboxes {
    /// Opens a port under a name. Repeating it with the same port changes nothing.
    ///
    /// # Errors
    /// When there is no such sandbox, the name is taken by another port, or there are too many.
    pub async fn expose(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
        port: Port,
    ) -> Result<Arc<Record>> {
        self.amend_living(id, move |record| match record.services.get(&name) {
            Some(known) if *known == port => Ok(()),
            Some(known) => Err(Error::new(
                Reason::ServiceExists,
                format!("service {name} is port {known} already; hide it first"),
            )),
            None if record.services.len() >= limit::SERVICES_MAX => Err(Error::new(
                Reason::FieldInvalid,
                format!("a sandbox has at most {} open ports", limit::SERVICES_MAX),
            )),
            None => {
                record.services.insert(name.clone(), port);
                Ok(())
            }
        })
        .await
    }

    /// Closes a port under all of its names, and cuts open connections to it. `name` is one of the
    /// names. Also returns the services that were closed.
    ///
    /// # Errors
    /// When there is no such sandbox, or no service of this name in it.
    pub async fn hide(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
    ) -> Result<(Arc<Record>, Closed)> {
        let closed = Arc::new(Mutex::new(Closed::new()));
        let taken_out = Arc::clone(&closed);
        let hidden = self.amend_living(id, move |record| {
            let port = record.services.get(&name).copied().ok_or_else(|| {
                let why = format!("{} has no service {name}", record.id);
                Error::new(Reason::ServiceNotFound, why)
            })?;
            let of_port = record.services.extract_if(.., |_, known| *known == port).collect();
            *taken_out.lock() = of_port;
            Ok(())
        });
        let hidden = hidden.await?;
        let closed = closed.lock().clone();
        if let (Some(port), Some(ip)) = (closed.values().next(), hidden.lease()) {
            self.cut(&hidden, *port, ip).await;
        }
        Ok((hidden, closed))
    }

    /// Cuts connections now, and again once a request that got its route just before has connected.
    async fn cut(self: &Arc<Self>, record: &Record, port: Port, ip: Ipv4Addr) {
        // A fake PVE has no way in, and no connections either.
        if self.pve.enter(record.vmid).is_none() || record.services.values().any(|p| *p == port) {
            return;
        }
        let to = SocketAddr::new(ip.into(), port.get());
        cut_now(to).await;
        let (sandboxes, id) = (Arc::clone(self), record.id);
        self.tasks.spawn(async move {
            tokio::select! {
                () = sandboxes.tasks.stopping().cancelled() => {}
                () = tokio::time::sleep(kill_connections::AGAIN) => {}
            }
            let open = sandboxes.records.index.live(&id).is_some_and(|record| {
                record.lease() == Some(ip) && record.services.values().any(|p| *p == port)
            });
            if !open {
                cut_now(to).await;
            }
        });
    }
}

async fn cut_now(to: SocketAddr) {
    match kill_connections::connections(to).await {
        Ok(0) => {}
        Ok(connections) => tracing::info!(%to, connections, "open connections were cut"),
        Err(error) => tracing::warn!(%to, %error, "open connections were not cut"),
    }
}
