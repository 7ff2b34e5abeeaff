//! The API server, the only user of tonic as a server. gRPC and gRPC-Web on one port, health and
//! reflection beside our services, and bounds on everything that a caller can make large.

mod audit;
mod auth;
mod calls;
mod connections;
mod convert;
mod cut;
mod enrolment;
mod guard;
mod health;
mod operator;
mod pace;
mod permits;
mod sandbox;
mod scope;
mod ssh_keys;
mod status;
mod subject;
mod teams;
mod tokens;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use proto::{
    MESSAGE_BYTES_MAX,
    sandbox::v1::{
        SshServer, enrolment_service_server::EnrolmentServiceServer,
        operator_service_server::OperatorServiceServer,
        sandbox_service_server::SandboxServiceServer,
    },
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{codec::CompressionEncoding, service::Routes, transport::server::Connected};
use tonic_web::GrpcWebLayer;

use connections::Connections;
pub(crate) use health::{Health, is_replaced};
pub(crate) use permits::{Permit, Permits};

use crate::{
    access::Access, audit::Audit, config::ApiLimits, enrolment::Enrolment, sandbox::Sandboxes,
    url::Urls,
};

/// Time after which a silent caller is pinged; without an answer it is disconnected.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
const HEADERS_BYTES_MAX: u32 = 16 * 1024;

/// All services, with the guard and the limits.
#[derive(Debug, Clone)]
pub struct Api {
    routes: Routes,
    guard: guard::GuardLayer,
    limits: ApiLimits,
    enrolment: Arc<OnceLock<Arc<Enrolment>>>,
    permits: permits::Permits,
    ssh: Arc<OnceLock<SshServer>>,
    health: Health,
}

impl Api {
    /// Builds the services over the domain.
    pub async fn new(
        sandboxes: Arc<Sandboxes>,
        access: Arc<Access>,
        audit: Audit,
        urls: Urls,
        limits: ApiLimits,
    ) -> Self {
        let own = sandbox::Rpc { sandboxes: sandboxes.clone(), urls: Arc::new(urls) };
        let sandbox = SandboxServiceServer::new(own)
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let recorder = calls::Recorder::new(audit.clone(), access.clone(), sandboxes.clone());
        let permits = permits::Permits::new(&limits);
        let guard =
            guard::GuardLayer::new(access.clone(), permits.clone(), sandboxes.clone(), recorder);
        let ssh = Arc::<OnceLock<_>>::default();
        let operator =
            operator::Rpc { sandboxes, access, audit, permits: permits.clone(), ssh: ssh.clone() };
        let operator = OperatorServiceServer::new(operator)
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let enrolment = Arc::<OnceLock<_>>::default();
        let joins = EnrolmentServiceServer::new(enrolment::Rpc::new(enrolment.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let health = Health::serving(reporter).await;
        let mut routes = Routes::default();
        routes = routes.add_service(sandbox).add_service(operator).add_service(joins);
        routes = routes.add_service(health_service);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("sandbox.v1.SandboxService")
                .with_service_name("sandbox.v1.OperatorService")
                .with_service_name("sandbox.v1.EnrolmentService")
                .with_service_name("grpc.health.v1.Health")
        };
        let (v1, v1alpha) = (reflection().build_v1(), reflection().build_v1alpha());
        routes = routes.add_service(v1.expect("our own descriptors are whole"));
        routes = routes.add_service(v1alpha.expect("our own descriptors are whole"));
        Self { routes, guard, limits, enrolment, permits, ssh, health }
    }

    /// Lets nodes join. Called once.
    pub fn enrol(&self, enrolment: Arc<Enrolment>) {
        drop(self.enrolment.set(enrolment));
    }

    /// Tells clients of an SSH server. Called once.
    pub(crate) fn announce_ssh(&self, server: SshServer) {
        drop(self.ssh.set(server));
    }

    /// Returns the health of the services.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Returns the permits of calls, which other ways in share.
    pub(crate) fn permits(&self) -> Permits {
        self.permits.clone()
    }

    /// Serves connections until `stop`, then lets the calls that are under way end.
    ///
    /// # Errors
    /// When the incoming connections fail as a whole.
    pub async fn serve<I, IO, E>(
        self,
        incoming: I,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error>
    where
        I: Stream<Item = Result<IO, E>>,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let connections = Connections::new(self.limits.connections_max);
        let incoming = incoming.map(move |io| io.map(|io| connections.admit(io)));
        daemon::flow::api_server(self.limits.streams_per_connection())
            .accept_http1(true)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_ANSWER))
            .http2_max_header_list_size(HEADERS_BYTES_MAX)
            .layer(GrpcWebLayer::new())
            .layer(self.guard)
            .add_routes(self.routes)
            .serve_with_incoming_shutdown(incoming, stop)
            .await
    }
}
