//! Opening and closing ports. Nothing is touched but the record: the ingress asks for each request.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use proto::{
    id::{SandboxId, SandboxRef},
    name::{Port, ServiceName},
    reason,
    spec::limit,
};

use super::{Error, Sandboxes, cut};
use crate::journal::Record;

impl Sandboxes {
    /// Opens a port under a name. Again with the same port: nothing changes.
    ///
    /// # Errors
    /// When there is no such sandbox, the name is taken by another port, or there are too many.
    pub async fn expose(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
        port: Port,
    ) -> Result<Arc<Record>, Error> {
        self.amend_living(id, move |record| match record.services.get(&name) {
            Some(known) if *known == port => Ok(()),
            Some(known) => Err(Error::new(
                reason::SERVICE_EXISTS,
                format!("service {name} is port {known} already; hide it first"),
            )),
            None if record.services.len() >= limit::SERVICES_MAX => Err(Error::new(
                reason::FIELD_INVALID,
                format!("a sandbox has at most {} open ports", limit::SERVICES_MAX),
            )),
            None => {
                record.services.insert(name.clone(), port);
                Ok(())
            }
        })
        .await
    }

    /// Closes a port, and cuts the connections to it that are open.
    ///
    /// # Errors
    /// When there is no such sandbox, or no service of this name in it.
    pub async fn hide(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
    ) -> Result<Arc<Record>, Error> {
        let port = self.living(&SandboxRef::Id(*id))?.services.get(&name).copied();
        let hidden = self.remove_service(id, name).await?;
        if let (Some(port), Some(ip)) = (port, hidden.ip) {
            self.cut(&hidden, port, ip).await;
        }
        Ok(hidden)
    }

    /// Now, and again when whoever got a route just before has connected.
    async fn cut(self: &Arc<Self>, record: &Record, port: Port, ip: Ipv4Addr) {
        // No way in: a fake, which has no connections either.
        if self.pve.enter(record.vmid).is_none() || record.services.values().any(|p| *p == port) {
            return;
        }
        let to = SocketAddr::new(ip.into(), port.get());
        cut_now(to).await;
        let (sandboxes, id) = (Arc::clone(self), record.id);
        self.tasks.spawn(async move {
            tokio::select! {
                () = sandboxes.tasks.stopping().cancelled() => {}
                () = tokio::time::sleep(cut::AGAIN) => {}
            }
            let open = sandboxes.index.live(&id).is_some_and(|record| {
                record.ip == Some(ip) && record.services.values().any(|p| *p == port)
            });
            if !open {
                cut_now(to).await;
            }
        });
    }

    async fn remove_service(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
    ) -> Result<Arc<Record>, Error> {
        self.amend_living(id, move |record| {
            record.services.remove(&name).map(drop).ok_or_else(|| {
                Error::new(
                    reason::SERVICE_NOT_FOUND,
                    format!("{} has no service {name}", record.id),
                )
            })
        })
        .await
    }
}

async fn cut_now(to: SocketAddr) {
    match cut::connections(to).await {
        Ok(0) => {}
        Ok(connections) => tracing::info!(%to, connections, "open connections were cut"),
        Err(error) => tracing::warn!(%to, %error, "open connections were not cut"),
    }
}
