//! Health of the services. A controller that a later one has replaced changes nothing any more, so it does not serve: what
//! spreads calls over controllers leaves it out, and `doctor` finds it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use daemon::{flow::Leg, peer::CONTROLLER_NAME};
use proto::sandbox::v1::{operator_service_server, sandbox_service_server};
use rustls::ClientConfig;
use tokio::time::timeout;
use tonic_health::{
    ServingStatus,
    pb::{self, HealthCheckRequest, health_client::HealthClient},
    server::HealthReporter,
};

/// Longest wait for the answer of a controller on this machine.
const PATIENCE: Duration = Duration::from_secs(3);
/// Services whose health is told; the empty name stands for the whole server.
const SERVICES: [&str; 3] =
    ["", sandbox_service_server::SERVICE_NAME, operator_service_server::SERVICE_NAME];

/// Health of all services, which callers without a token may ask for.
#[derive(Debug, Clone)]
pub(crate) struct Health(HealthReporter);

impl Health {
    /// Says that all services serve.
    pub(super) async fn serving(reporter: HealthReporter) -> Self {
        let health = Self(reporter);
        health.set(ServingStatus::Serving).await;
        health
    }

    /// Says from now on that none does: a later controller is in charge.
    pub(crate) async fn replaced(&self) {
        self.set(ServingStatus::NotServing).await;
    }

    async fn set(&self, status: ServingStatus) {
        for service in SERVICES {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// Asks the controller that listens on an address of this machine whether a later one is in charge. `None` where it does
/// not tell.
pub(crate) async fn is_replaced(address: SocketAddr, tls: Arc<ClientConfig>) -> Option<bool> {
    let address = address.to_string();
    let channel = daemon::channel::tls(Leg::Api, &address, CONTROLLER_NAME, tls).ok()?;
    let mut client = HealthClient::new(channel);
    let answer = timeout(PATIENCE, client.check(HealthCheckRequest::default())).await.ok()?.ok()?;
    let status = answer.into_inner().status();
    Some(status == pb::health_check_response::ServingStatus::NotServing)
}
