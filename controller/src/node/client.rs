//! Calls to one agent. Every call has a deadline, and every failure is one of `node::Error`.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use proto::{
    MESSAGE_BYTES_MAX,
    agent::v1::{
        self as wire, agent_service_client::AgentServiceClient,
        certificate_service_client::CertificateServiceClient, files_request, files_response,
        name_service_client::NameServiceClient,
    },
    id::SandboxId,
    name::{NodeName, Port, SnapshotId, Team},
    sandbox::v1 as api,
    spec::Egress,
};
use tonic::{Request, Status, transport::Channel};

use super::{
    Connector, Error, Lane, Result,
    answer::{MARGIN, QUICK, call, decode, duration, sandbox},
    bulk::{Bulk, StreamOwner},
    calls::Call,
    output::{self, HangUp, Output},
    places::{Origin, Places},
    sandbox_calls::SandboxCalls,
};

/// Deadline of calls that roll back: the agent answers when an attempt is undone, or after 20 s.
const UNDO: Duration = Duration::from_secs(24);
/// Deadline to start a command or attach to one: the agent gives up after 14 s.
const START: Duration = Duration::from_secs(16);
/// Deadline of a whole check of a node.
const CHECK: Duration = Duration::from_secs(15);

/// One attempt of a creation, as it is sent to a node.
#[derive(Debug, Clone)]
pub struct CreateOrder {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Team that owns the sandbox.
    pub team: String,
    /// Number of the attempt.
    pub attempt: u32,
    /// SHA-256 of the request body, hex.
    pub digest: String,
    /// Request of the caller.
    pub request: api::CreateSandboxRequest,
    /// Rules for ports that the snapshot exposes.
    pub port_rules: wire::PortRules,
}

/// Cheap handle to one agent.
#[derive(Debug, Clone)]
pub struct Client {
    /// Client on the connection for unary calls.
    agent: AgentServiceClient<Channel>,
    /// Client on the connection for the watch.
    watch: AgentServiceClient<Channel>,
    /// Client for the node's certificates, on the connection for unary calls.
    certificates: CertificateServiceClient<Channel>,
    /// Client for the names of sandboxes, on the connection for unary calls.
    names: NameServiceClient<Channel>,
    bulk: Arc<Bulk>,
    /// Places for calls about sandboxes on the connection for unary calls.
    places: Places,
    /// Counter that numbers the streams of commands.
    streams: Arc<AtomicU64>,
}

impl Client {
    /// Creates a client over connections of this connector, which connect when first used.
    ///
    /// # Errors
    /// When the address can never work.
    pub fn new(connector: Arc<dyn Connector>, node: &NodeName, address: &str) -> io::Result<Self> {
        let (node, address) = (node.clone(), address.to_owned());
        let client = |channel| {
            AgentServiceClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
        let open = move |lane| connector.channel(&node, &address, lane);
        let control = open(Lane::Control)?;
        let certificates = CertificateServiceClient::new(control.clone());
        let names =
            NameServiceClient::new(control.clone()).max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (agent, watch) = (client(control), client(open(Lane::Watch)?));
        let bulk = Bulk::new(Box::new(move || open(Lane::Bulk).map(client)));
        let places = Places::new();
        Ok(Self { agent, watch, certificates, names, bulk, places, streams: Arc::default() })
    }

    /// Returns the calls about the sandboxes of a team, with a place for one of them at a time.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when the team uses its share of the node's places.
    pub fn calls(&self, origin: Origin, team: &Team) -> Result<SandboxCalls> {
        Ok(SandboxCalls::new(self.agent(), self.places.take(origin, team)?))
    }

    /// Connection of short calls. Clones share it.
    fn agent(&self) -> AgentServiceClient<Channel> {
        self.agent.clone()
    }

    /// Connection of the calls for the node's certificates.
    pub(super) fn certificates(&self) -> CertificateServiceClient<Channel> {
        self.certificates.clone()
    }

    /// Connection of the calls about names.
    pub(super) fn names(&self) -> NameServiceClient<Channel> {
        self.names.clone()
    }

    /// Closes bulk connections that are idle.
    pub(super) fn close_idle(&self) {
        self.bulk.close_idle();
    }

    /// Asks the agent for its identity. `epoch` 0 does not claim the node.
    pub async fn hello(&self, epoch: u64) -> Result<wire::HelloResponse> {
        call(Call::Hello, QUICK, self.agent().hello(wire::HelloRequest { epoch })).await
    }

    /// Starts or follows a creation; answers after `wait` at the latest. The same id and attempt
    /// name the same creation, so this call may be repeated.
    pub async fn create(
        &self,
        epoch: u64,
        order: &CreateOrder,
        wait: Duration,
    ) -> Result<(api::Sandbox, Option<api::NodeLoad>)> {
        let request = wire::CreateSandboxRequest {
            epoch,
            sandbox_id: order.id.to_string(),
            team: order.team.clone(),
            request_id: order.request.request_id.clone(),
            body_digest: order.digest.clone(),
            attempt: order.attempt,
            spec: Some(order.request.clone()),
            wait: duration(wait),
            port_rules: Some(order.port_rules.clone()),
        };
        let answer =
            call(Call::CreateSandbox, wait + MARGIN, self.agent().create_sandbox(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.load))
    }

    /// Cancels the attempts up to `attempt`. Returns the sandbox that the node holds, if any.
    pub async fn cancel_create(
        &self,
        epoch: u64,
        id: &SandboxId,
        attempt: u32,
    ) -> Result<Option<api::Sandbox>> {
        let request = wire::CancelCreateRequest { epoch, sandbox_id: id.to_string(), attempt };
        call(Call::CancelCreate, UNDO, self.agent().cancel_create(request))
            .await
            .map(|answer| answer.sandbox)
    }

    /// Returns one sandbox of this node.
    pub async fn get(&self, id: &SandboxId) -> Result<api::Sandbox> {
        let request = wire::GetSandboxRequest { id: id.to_string() };
        sandbox(call(Call::GetSandbox, QUICK, self.agent().get_sandbox(request)).await?.sandbox)
    }

    /// Lists what the agent cleans up next and, unless `dry_run`, cleans it up at once.
    pub async fn collect_garbage(
        &self,
        epoch: u64,
        dry_run: bool,
    ) -> Result<Vec<api::GarbageItem>> {
        let request = wire::CollectGarbageRequest { epoch, dry_run };
        Ok(call(Call::CollectGarbage, CHECK, self.agent().collect_garbage(request)).await?.items)
    }

    /// Recovers a container that carries our mark.
    pub async fn recover(
        &self,
        epoch: u64,
        (vmid, egress): (u32, Option<&Egress>),
        dry_run: bool,
    ) -> Result<api::Sandbox> {
        let request = wire::RecoverSandboxRequest {
            epoch,
            vmid,
            dry_run,
            egress: egress.map(api::Egress::from).unwrap_or_default().into(),
            egress_names: egress.map(Egress::names).unwrap_or_default(),
        };
        sandbox(
            call(Call::RecoverSandbox, QUICK, self.agent().recover_sandbox(request)).await?.sandbox,
        )
    }

    /// Sets whether the node takes new work. Returns the load that it reports afterwards.
    pub async fn set_scheduling(
        &self,
        epoch: u64,
        state: wire::SchedulingState,
        why: String,
    ) -> Result<Option<api::NodeLoad>> {
        let request = wire::SetSchedulingRequest { epoch, state: state.into(), why };
        Ok(call(Call::SetScheduling, QUICK, self.agent().set_scheduling(request)).await?.load)
    }

    /// Reserves for a creation; returns the node's load. No answer within `time` is an error.
    pub async fn reserve(
        &self,
        epoch: u64,
        id: &SandboxId,
        (snapshot, size): (&SnapshotId, api::Size),
        time: Duration,
    ) -> Result<Option<api::NodeLoad>> {
        let request = wire::ReserveRequest {
            epoch,
            sandbox_id: id.to_string(),
            snapshot_id: snapshot.to_string(),
            size: Some(size),
        };
        Ok(call(Call::Reserve, time, self.agent().reserve(request)).await?.load)
    }

    /// Cancels a reservation.
    pub async fn cancel_reservation(&self, id: &SandboxId) -> Result<()> {
        let request = wire::CancelReservationRequest { sandbox_id: id.to_string() };
        call(Call::CancelReservation, QUICK, self.agent().cancel_reservation(request))
            .await
            .map(drop)
    }

    /// Exports a stopped sandbox's container; returns the node that has it now, and its record.
    pub async fn export_sandbox(
        &self,
        epoch: u64,
        id: &SandboxId,
        target: &NodeName,
    ) -> Result<(String, bytes::Bytes)> {
        let (id, target) = (id.to_string(), target.to_string());
        let request = wire::ExportSandboxRequest { epoch, id, target };
        let answer = call(Call::ExportSandbox, UNDO, self.agent().export_sandbox(request)).await?;
        Ok((answer.node, answer.record))
    }

    /// Imports a sandbox whose container was moved to this node.
    pub async fn import_sandbox(&self, epoch: u64, record: bytes::Bytes) -> Result<api::Sandbox> {
        let request = wire::ImportSandboxRequest { epoch, record };
        sandbox(
            call(Call::ImportSandbox, UNDO, self.agent().import_sandbox(request)).await?.sandbox,
        )
    }

    /// Adopts a container as a sandbox. Also returns the volumes that its deletion will remove.
    pub async fn adopt(
        &self,
        request: wire::AdoptSandboxRequest,
    ) -> Result<(api::Sandbox, Vec<String>)> {
        let answer = call(Call::AdoptSandbox, UNDO, self.agent().adopt_sandbox(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.volumes))
    }

    /// Ends a sandbox and keeps its container. `moved_to` is the node that imported it.
    pub async fn release(
        &self,
        epoch: u64,
        id: &SandboxId,
        moved_to: Option<&NodeName>,
    ) -> Result<api::Sandbox> {
        let moved_to = moved_to.map(ToString::to_string).unwrap_or_default();
        let request = wire::ReleaseSandboxRequest { epoch, id: id.to_string(), moved_to };
        sandbox(
            call(Call::ReleaseSandbox, UNDO, self.agent().release_sandbox(request)).await?.sandbox,
        )
    }

    /// Checks the node. Returns the findings and the number of sandboxes checked.
    pub async fn check(&self) -> Result<(Vec<api::Finding>, u32)> {
        let answer = call(Call::Check, CHECK, self.agent().check(wire::CheckRequest {})).await?;
        Ok((answer.findings, answer.sandboxes))
    }

    /// Runs a command. Readers pull both streams, so that a slow end slows the other.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when the team or the sandbox uses its share of the node's streams.
    pub async fn exec<S>(
        &self,
        epoch: u64,
        owner: &StreamOwner,
        input: S,
    ) -> Result<impl Stream<Item = Result<wire::ExecResponse>> + Send + use<S>>
    where
        S: Stream<Item = api::ExecRequest> + Send + 'static,
    {
        let mut lease = self.bulk.lease(owner)?;
        let stream_id = self.stream_id(epoch);
        let mut name = Some(stream_id.clone());
        let input = input.map(move |message| {
            let stream_id = name.take().unwrap_or_default();
            wire::ExecRequest { message: Some(message), stream_id }
        });
        let (input, gone) = output::input(&lease, input);
        let output = call(Call::Exec, START, lease.agent.exec(Request::new(input))).await?;
        let hang_up = HangUp { agent: lease.agent.clone(), stream_id, input: gone };
        let output = Output::new(&lease, output, hang_up);
        Ok(output.map(|message| message.map_err(|status| decode(Call::Exec, &status))))
    }

    /// Makes a name for a stream, unique at the agent: each controller has an epoch of its own.
    fn stream_id(&self, epoch: u64) -> String {
        format!("{epoch}-{}", self.streams.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs one file operation. Readers pull both streams. The caller bounds the wait: an upload is
    /// answered when all of it was sent.
    ///
    /// # Errors
    /// As `exec`.
    pub async fn files<S>(
        &self,
        owner: &StreamOwner,
        input: S,
    ) -> Result<impl Stream<Item = Result<files_response::Message>> + Send + use<S>>
    where
        S: Stream<Item = files_request::Message> + Send + 'static,
    {
        let input = input.map(|message| wire::FilesRequest { message: Some(message) });
        let broken = |status: Status| decode(Call::Files, &status);
        let mut lease = self.bulk.lease(owner)?;
        let request = Request::new(lease.hold(input));
        let output = lease.agent.files(request).await.map_err(broken)?;
        Ok(lease.hold(output.into_inner()).map(move |message| match message {
            Ok(message) => message
                .message
                .ok_or_else(|| Error::Nonsense("there is nothing in the answer".into())),
            Err(status) => Err(broken(status)),
        }))
    }

    /// Connects to a server in a sandbox. Readers pull both streams, so that a slow end slows the other.
    ///
    /// # Errors
    /// As `exec`.
    pub async fn forward<S>(
        &self,
        epoch: u64,
        owner: &StreamOwner,
        input: S,
    ) -> Result<impl Stream<Item = Result<api::ForwardResponse>> + Send + use<S>>
    where
        S: Stream<Item = api::ForwardRequest> + Send + 'static,
    {
        let mut lease = self.bulk.lease(owner)?;
        let stream_id = self.stream_id(epoch);
        let mut name = Some(stream_id.clone());
        let input = input.map(move |message| {
            let stream_id = name.take().unwrap_or_default();
            wire::ForwardRequest { message: Some(message), stream_id }
        });
        let (input, gone) = output::input(&lease, input);
        let output = call(Call::Forward, START, lease.agent.forward(Request::new(input))).await?;
        let hang_up = HangUp { agent: lease.agent.clone(), stream_id, input: gone };
        Ok(Output::new(&lease, output, hang_up).map(|message| match message {
            Ok(message) => Ok(message.message.unwrap_or_default()),
            Err(status) => Err(decode(Call::Forward, &status)),
        }))
    }

    /// Listens on a port inside a sandbox until the stream is dropped.
    ///
    /// # Errors
    /// As `exec`.
    pub async fn forward_listen(
        &self,
        owner: &StreamOwner,
        port: Port,
    ) -> Result<impl Stream<Item = Result<api::ForwardListenResponse>> + Send + use<>> {
        let mut lease = self.bulk.lease(owner)?;
        let request =
            wire::ForwardListenRequest { id: owner.sandbox.to_string(), port: port.into() };
        let listening = lease.agent.forward_listen(request);
        let messages = call(Call::ForwardListen, START, listening).await?;
        Ok(lease.hold(messages).map(|message| match message {
            Ok(message) => Ok(message.message.unwrap_or_default()),
            Err(status) => Err(decode(Call::ForwardListen, &status)),
        }))
    }

    /// Watches the node: its inventory, then changes and load reports without end.
    pub(super) async fn watch(
        &self,
        journal_id: String,
        revision: u64,
    ) -> Result<tonic::Streaming<wire::WatchResponse>> {
        let request = wire::WatchRequest { journal_id, revision };
        call(Call::Watch, QUICK, self.watch.clone().watch(request)).await
    }
}
