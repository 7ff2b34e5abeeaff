//! Opening and closing ports. Opening changes only the record, which the ingress reads for each
//! request; closing, and letting fewer in, also cuts open connections (`pending_cuts`).

use std::{
    collections::{BTreeMap, BTreeSet},
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
        let id = *id;
        let work = |sandboxes: Arc<Self>| async move {
            sandboxes.expose_now(&id, name, port, reach).await
        };
        self.run_to_end(work).await
    }

    async fn expose_now(
        self: &Arc<Self>,
        id: &SandboxId,
        name: ServiceName,
        port: Port,
        reach: Reach,
    ) -> Result<Arc<Record>> {
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
            record.open((name.clone(), port), reach.wanted, reach.default);
            record.note_opened(port);
            Ok(())
        });
        let opened = opened.await?;
        self.begin_cuts(id).await;
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
        let id = *id;
        self.run_to_end(|sandboxes| async move { sandboxes.hide_now(&id, name).await }).await
    }

    async fn hide_now(
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
            self.forwards.cut(hidden.id, port);
        }
        self.begin_cuts(id).await;
        Ok((hidden, closed.into_iter().collect()))
    }
}
