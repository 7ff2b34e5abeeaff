//! The wire: `agent.v1` for the controller only. Handlers convert, make one call of the domain, and
//! convert back. The only module that uses tonic; it does not depend on the reconciler.

mod certificates;
mod convert;
mod exec;
mod files;
mod forward;
pub mod join;
mod load;
mod names;
mod node;
mod pause;
mod places;
mod sandbox;
pub mod status;
mod watch;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use daemon::{flow, listen::ConnInfo, peer::Peer, status::Refusal};
use proto::{
    MESSAGE_BYTES_MAX, Reason,
    agent::v1::{
        agent_service_server::{AgentService, AgentServiceServer},
        certificate_service_server::CertificateServiceServer,
        name_service_server::NameServiceServer,
        *,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming, service::interceptor::InterceptedService,
    transport::server::Connected,
};

use crate::{
    certificates::Certificates,
    hand_edits::HandEdits,
    name_directory::NameDirectory,
    revoked::Revoked,
    sandbox::{
        Sandboxes,
        drift::{fsck::Check, garbage::Garbage},
        exec::Execs,
    },
};
pub use load::Reporter;
use places::{About, Places};
pub use tonic::transport::Error;

/// Error type of a listener.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Byte stream with the identity of its peer: its info is `daemon::listen::ConnInfo`, or
/// `daemon::peer::Peer` alone.
pub trait Connection: Connected + AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: Connected + AsyncRead + AsyncWrite + Unpin + Send + 'static> Connection for T {}

type Answer<T> = Result<Response<T>, Status>;

/// Answer of a handler, before it has its form on the wire.
type Handled<T> = Result<T, Refusal>;

/// Longest time without an answer, for any call.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Time after which an unanswered call fails with an unknown outcome.
const CALL_MAX: Duration = Duration::from_secs(25);
/// Most concurrent watches.
const WATCHES_MAX: usize = 16;

/// Service of the agent for its controller (`agent.v1`). Clones share the state.
#[derive(Debug, Clone)]
pub struct Rpc {
    sandboxes: Arc<Sandboxes>,
    execs: Execs,
    reporter: Reporter,
    garbage: Arc<dyn Garbage>,
    /// Additional check of another component.
    checks: Arc<OnceLock<Arc<dyn Check>>>,
    /// Certificates that the controller may renew.
    certificates: Arc<OnceLock<Arc<Certificates>>>,
    /// Nodes whose peers are refused.
    revoked: Arc<OnceLock<Arc<Revoked>>>,
    /// Names of the sandboxes of all nodes.
    names: Arc<OnceLock<Arc<NameDirectory>>>,
    places: Places,
    watches: Arc<Semaphore>,
    streams: exec::Streams,
}

impl Rpc {
    /// Makes a service that serves nobody yet; the parts below are added before it does.
    pub fn new(
        sandboxes: Arc<Sandboxes>,
        execs: Execs,
        reporter: Reporter,
        garbage: Arc<dyn Garbage>,
    ) -> Self {
        Self {
            garbage,
            checks: Arc::default(),
            certificates: Arc::default(),
            revoked: Arc::default(),
            names: Arc::default(),
            execs,
            sandboxes,
            reporter,
            places: Places::new(),
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
            streams: exec::Streams::default(),
        }
    }

    /// Reports these changes by hand with the load. Called once; without it there are none.
    pub fn report_edits(&self, edits: Arc<HandEdits>) {
        self.reporter.report_edits(edits);
    }

    /// Adds a check to `fsck`. Called once.
    pub fn also_check(&self, check: Arc<dyn Check>) {
        drop(self.checks.set(check));
    }

    /// Serves every connection of `incoming` until `stop`, then completes the pending calls.
    ///
    /// # Errors
    /// When the transport fails as a whole.
    pub async fn serve<C: Connection, E: Into<BoxError>>(
        self,
        incoming: impl Stream<Item = Result<C, E>>,
        stop: CancellationToken,
    ) -> Result<(), Error> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<AgentServiceServer<Self>>().await;
        let certificates = CertificateServiceServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let names =
            NameServiceServer::new(self.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let service = AgentServiceServer::new(self)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let stopped = stop.clone();
        flow::agent_server()
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .http2_max_header_list_size(16 * 1024)
            .add_service(InterceptedService::new(health_service, only_the_controller))
            .add_service(InterceptedService::new(service, only_the_controller))
            .add_service(InterceptedService::new(certificates, only_the_controller))
            .add_service(InterceptedService::new(names, only_the_controller))
            .serve_with_incoming_shutdown(incoming, async move {
                stopped.cancelled().await;
                health.set_not_serving::<AgentServiceServer<Self>>().await;
            })
            .await
    }

    /// Runs a unary call that needs only the agent: bounds concurrency and duration, and converts
    /// errors to their wire form.
    async fn call<T>(&self, work: impl Future<Output = Result<T, Refusal>>) -> Answer<T> {
        self.call_about(About::Agent, work).await
    }

    /// Runs a call about one sandbox in the same way.
    async fn call_about_one<T>(
        &self,
        id: String,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Answer<T> {
        self.call_about(About::Sandbox(&id), work).await
    }

    /// Runs a call about a sandbox in the same way; its tenant may prolong the call.
    async fn call_about<T>(
        &self,
        about: About<'_>,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Answer<T> {
        let _place = self.places.take(about).ok_or_else(full)?;
        let answered = tokio::select! {
            biased;
            // A simulated crash: connected callers get no answer from this life of the agent.
            () = self.sandboxes.tasks().killed().cancelled() => std::future::pending().await,
            answered = timeout(CALL_MAX, work) => answered,
        };
        match answered {
            Ok(Ok(answer)) => Ok(Response::new(answer)),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(_) => Err(Refusal::new(
                Reason::OutcomeUnknown,
                "no answer in time; what was asked for may go on",
            )
            .into()),
        }
    }

    /// Checks that the epoch permits a change.
    async fn fence(&self, epoch: u64) -> Result<(), Refusal> {
        if epoch == 0 {
            return Err(proto::id::Invalid::new("epoch", "must be the controller's epoch").into());
        }
        self.sandboxes.fence(epoch).await.map_err(status::refusal)
    }
}

fn permit(limit: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Status> {
    Arc::clone(limit).try_acquire_owned().map_err(|_| full())
}

fn full() -> Status {
    Refusal::new(Reason::TooManyCalls, "too many calls at a time")
        .retry_after(Duration::from_secs(1))
        .into()
}

/// Rejects all peers but the controller: any other holder of our certificates is another agent, or
/// unknown.
fn only_the_controller(request: Request<()>) -> Result<Request<()>, Status> {
    let extensions = request.extensions();
    let peer = extensions.get::<ConnInfo>().map(|info| &info.peer);
    match peer.or_else(|| extensions.get::<Peer>()) {
        Some(Peer::Controller) => Ok(request),
        Some(Peer::Agent(_) | Peer::Client(_) | Peer::Anonymous) | None => {
            Err(Refusal::new(Reason::ScopeMissing, "only the controller may ask this").into())
        }
    }
}

#[tonic::async_trait]
impl AgentService for Rpc {
    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        self.call(self.say_hello(request.into_inner())).await
    }

    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Answer<CreateSandboxResponse> {
        self.call(self.create(request.into_inner())).await
    }

    async fn cancel_create(
        &self,
        request: Request<CancelCreateRequest>,
    ) -> Answer<CancelCreateResponse> {
        let request = request.into_inner();
        self.call_about_one(request.sandbox_id.clone(), self.cancel(request)).await
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Answer<GetSandboxResponse> {
        self.call(self.get(request.into_inner())).await
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Answer<ListSandboxesResponse> {
        self.call(self.list(request.into_inner())).await
    }

    async fn start_sandbox(
        &self,
        request: Request<StartSandboxRequest>,
    ) -> Answer<StartSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.start(request)).await
    }

    async fn stop_sandbox(
        &self,
        request: Request<StopSandboxRequest>,
    ) -> Answer<StopSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.stop(request)).await
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Answer<DeleteSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.delete(request)).await
    }

    type ExecStream = exec::Responses;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        let (execs, sandboxes) = (self.execs.clone(), Arc::clone(&self.sandboxes));
        exec::exec(execs, sandboxes, &self.streams, request.into_inner()).await
    }

    async fn pause_sandbox(
        &self,
        request: Request<PauseSandboxRequest>,
    ) -> Answer<PauseSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.pause(request)).await
    }

    async fn resume_sandbox(
        &self,
        request: Request<ResumeSandboxRequest>,
    ) -> Answer<ResumeSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.resume(request)).await
    }

    async fn update_sandbox(
        &self,
        request: Request<UpdateSandboxRequest>,
    ) -> Answer<UpdateSandboxResponse> {
        let request = request.into_inner();
        Box::pin(self.call_about_one(request.id.clone(), self.update(request))).await
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Answer<CollectGarbageResponse> {
        self.call_about(About::Many, self.garbage(request.into_inner())).await
    }

    async fn recover_sandbox(
        &self,
        request: Request<RecoverSandboxRequest>,
    ) -> Answer<RecoverSandboxResponse> {
        self.call_about(About::Many, self.recover(request.into_inner())).await
    }

    async fn set_scheduling(
        &self,
        request: Request<SetSchedulingRequest>,
    ) -> Answer<SetSchedulingResponse> {
        self.call(self.set_scheduling(request.into_inner())).await
    }

    async fn reserve(&self, request: Request<ReserveRequest>) -> Answer<ReserveResponse> {
        self.call(Rpc::reserve(self, request.into_inner())).await
    }

    async fn cancel_reservation(
        &self,
        request: Request<CancelReservationRequest>,
    ) -> Answer<CancelReservationResponse> {
        self.call(Rpc::cancel_reservation(self, request.into_inner())).await
    }

    async fn export_sandbox(
        &self,
        request: Request<ExportSandboxRequest>,
    ) -> Answer<ExportSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), Rpc::export_sandbox(self, request)).await
    }

    async fn import_sandbox(
        &self,
        request: Request<ImportSandboxRequest>,
    ) -> Answer<ImportSandboxResponse> {
        self.call_about(About::Many, Rpc::import_sandbox(self, request.into_inner())).await
    }

    async fn adopt_sandbox(
        &self,
        request: Request<AdoptSandboxRequest>,
    ) -> Answer<AdoptSandboxResponse> {
        self.call_about(About::Many, self.adopt(request.into_inner())).await
    }

    async fn release_sandbox(
        &self,
        request: Request<ReleaseSandboxRequest>,
    ) -> Answer<ReleaseSandboxResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.release(request)).await
    }

    async fn control_exec(
        &self,
        request: Request<ControlExecRequest>,
    ) -> Answer<ControlExecResponse> {
        let request = request.into_inner();
        let id = exec::sandbox_of(&request).map(str::to_owned);
        let about = id.as_deref().map_or(About::Agent, About::Sandbox);
        self.call_about(about, exec::control(&self.execs, &self.streams, request)).await
    }

    async fn list_execs(&self, request: Request<ListExecsRequest>) -> Answer<ListExecsResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), exec::list(&self.execs, request)).await
    }

    type FilesStream = files::Responses;

    async fn files(&self, request: Request<Streaming<FilesRequest>>) -> Answer<Self::FilesStream> {
        files::files(self.execs.clone(), request.into_inner()).await
    }

    type ForwardStream = forward::Responses;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Answer<Self::ForwardStream> {
        let (execs, sandboxes) = (self.execs.clone(), Arc::clone(&self.sandboxes));
        forward::forward(execs, sandboxes, &self.streams, request.into_inner()).await
    }

    type ForwardListenStream = forward::Accepted;

    async fn forward_listen(
        &self,
        request: Request<ForwardListenRequest>,
    ) -> Answer<Self::ForwardListenStream> {
        let (execs, sandboxes) = (self.execs.clone(), Arc::clone(&self.sandboxes));
        forward::listen(execs, sandboxes, request.into_inner()).await
    }

    async fn list_ports(&self, request: Request<ListPortsRequest>) -> Answer<ListPortsResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), forward::ports(&self.execs, request)).await
    }

    async fn get_usage(&self, request: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        self.call_about(About::Many, self.usage(request.into_inner())).await
    }

    async fn expose_http_service(
        &self,
        request: Request<ExposeHttpServiceRequest>,
    ) -> Answer<ExposeHttpServiceResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.expose(request)).await
    }

    async fn hide_http_service(
        &self,
        request: Request<HideHttpServiceRequest>,
    ) -> Answer<HideHttpServiceResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.hide(request)).await
    }

    async fn create_access_link(
        &self,
        request: Request<CreateAccessLinkRequest>,
    ) -> Answer<CreateAccessLinkResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.access_link(request)).await
    }

    async fn revoke_access(
        &self,
        request: Request<RevokeAccessRequest>,
    ) -> Answer<RevokeAccessResponse> {
        let request = request.into_inner();
        self.call_about_one(request.id.clone(), self.revoke(request)).await
    }

    async fn get_load(&self, _: Request<GetLoadRequest>) -> Answer<GetLoadResponse> {
        self.call(self.load()).await
    }

    type WatchStream = watch::Responses;

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let permit = permit(&self.watches)?;
        Ok(Response::new(watch::watch(self, request.into_inner(), permit)))
    }

    async fn check(&self, _: Request<CheckRequest>) -> Answer<CheckResponse> {
        self.call_about(About::Many, self.check_node()).await
    }
}

#[cfg(test)]
pub(crate) mod tests;
