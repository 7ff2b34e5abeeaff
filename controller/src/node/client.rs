//! Calls to one agent. Every call has a deadline, and every failure is one of `node::Error`.

use std::{
    fmt::Debug,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use daemon::flow::Leg;
use futures_util::{Stream, StreamExt};
use proto::{
    MESSAGE_BYTES_MAX, Reason,
    agent::v1::{
        self as wire, agent_service_client::AgentServiceClient, files_request, files_response,
    },
    id::SandboxId,
    name::{NodeName, Port, ServiceName, SnapshotId},
    sandbox::v1 as api,
};
use tonic::{Code, Request, Response, Status, transport::Channel};

use super::{
    Error,
    bulk::{Bulk, Whose},
    calls::{Call, Silence},
    output::{self, HangUp, Output},
};

/// Time that a call may take beyond the wait that the agent was given.
const MARGIN: Duration = Duration::from_secs(4);
/// Deadline of a call that only reads or records.
const QUICK: Duration = Duration::from_secs(5);
/// Deadline of calls that roll back: the agent answers when an attempt is undone, or after 20 s.
const UNDO: Duration = Duration::from_secs(24);
/// Deadline of a call that acts on a command: its shim may have to be found first.
const CONTROL: Duration = Duration::from_secs(10);
/// Deadline to start a command or attach to one: the agent gives up after 14 s.
const START: Duration = Duration::from_secs(16);
/// Deadline of a whole check of a node.
const CHECK: Duration = Duration::from_secs(15);

/// Kind of calls with connections of its own, so that none waits for calls of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Unary calls. One connection per node.
    Control,
    /// Watch of the agent. One connection per node.
    Watch,
    /// Commands and files, whose readers may stall. Up to 16 connections per node.
    Bulk,
}

/// Opens channels to agents: TLS over TCP in a daemon, in-memory streams in a simulation, or a
/// connection that an agent behind NAT has opened.
pub trait Connector: Send + Sync + Debug {
    /// Returns a lazy channel over a connection of its own. It connects when used, and reconnects
    /// when the connection is lost.
    ///
    /// # Errors
    /// When the address can never work.
    fn channel(&self, node: &NodeName, address: &str, lane: Lane) -> io::Result<Channel>;
}

/// Mutual TLS over TCP. The agent's certificate must contain the node's name, so that a node cannot
/// answer for another.
#[derive(Debug)]
pub struct TlsConnector(pub Arc<rustls::ClientConfig>);

impl Connector for TlsConnector {
    fn channel(&self, node: &NodeName, address: &str, _: Lane) -> io::Result<Channel> {
        let server_name = format!("{node}.agent.pve-sandbox.internal");
        daemon::channel::tls(Leg::Agent, address, &server_name, self.0.clone())
    }
}

/// One attempt of a creation, as it is sent to a node.
#[derive(Debug, Clone)]
pub struct Order {
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
}

/// Cheap handle to one agent.
#[derive(Debug, Clone)]
pub struct Client {
    /// Client on the connection for unary calls.
    agent: AgentServiceClient<Channel>,
    /// Client on the connection for the watch.
    watch: AgentServiceClient<Channel>,
    bulk: Arc<Bulk>,
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
        let open = move |lane| {
            let channel = connector.channel(&node, &address, lane)?;
            Ok::<_, io::Error>(
                AgentServiceClient::new(channel)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
        };
        let (agent, watch) = (open(Lane::Control)?, open(Lane::Watch)?);
        let bulk = Bulk::new(Box::new(move || open(Lane::Bulk)));
        Ok(Self { agent, watch, bulk, streams: Arc::default() })
    }

    /// Closes bulk connections that are idle.
    pub(super) fn close_idle(&self) {
        self.bulk.close_idle();
    }

    /// Asks the agent for its identity. `epoch` 0 does not claim the node.
    pub async fn hello(&self, epoch: u64) -> Result<wire::HelloResponse, Error> {
        let mut agent = self.agent.clone();
        call(Call::Hello, QUICK, agent.hello(wire::HelloRequest { epoch })).await
    }

    /// Starts or follows a creation; answers after `wait` at the latest. The same id and attempt
    /// name the same creation, so this call may be repeated.
    pub async fn create(
        &self,
        epoch: u64,
        order: &Order,
        wait: Duration,
    ) -> Result<(api::Sandbox, Option<api::NodeLoad>), Error> {
        let request = wire::CreateSandboxRequest {
            epoch,
            sandbox_id: order.id.to_string(),
            team: order.team.clone(),
            request_id: order.request.request_id.clone(),
            body_digest: order.digest.clone(),
            attempt: order.attempt,
            spec: Some(order.request.clone()),
            wait: Some(duration(wait)),
        };
        let mut agent = self.agent.clone();
        let answer =
            call(Call::CreateSandbox, wait + MARGIN, agent.create_sandbox(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.load))
    }

    /// Cancels the attempts up to `attempt`. Returns the sandbox that the node holds, if any.
    pub async fn cancel_create(
        &self,
        epoch: u64,
        id: &SandboxId,
        attempt: u32,
    ) -> Result<Option<api::Sandbox>, Error> {
        let request = wire::CancelCreateRequest { epoch, sandbox_id: id.to_string(), attempt };
        let mut agent = self.agent.clone();
        call(Call::CancelCreate, UNDO, agent.cancel_create(request))
            .await
            .map(|answer| answer.sandbox)
    }

    /// Returns one sandbox of this node.
    pub async fn get(&self, id: &SandboxId) -> Result<api::Sandbox, Error> {
        let mut agent = self.agent.clone();
        let request = wire::GetSandboxRequest { id: id.to_string() };
        sandbox(call(Call::GetSandbox, QUICK, agent.get_sandbox(request)).await?.sandbox)
    }

    /// Boots a sandbox; answers after `wait` at the latest.
    pub async fn start(
        &self,
        epoch: u64,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<api::Sandbox, Error> {
        let wait_for = Some(duration(wait));
        let request = wire::StartSandboxRequest { epoch, id: id.to_string(), wait: wait_for };
        let mut agent = self.agent.clone();
        sandbox(
            call(Call::StartSandbox, wait + MARGIN, agent.start_sandbox(request)).await?.sandbox,
        )
    }

    /// Stops a sandbox; answers after `wait` at the latest.
    pub async fn stop(
        &self,
        epoch: u64,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<api::Sandbox, Error> {
        let wait_for = Some(duration(wait));
        let request = wire::StopSandboxRequest { epoch, id: id.to_string(), wait: wait_for };
        let mut agent = self.agent.clone();
        sandbox(call(Call::StopSandbox, wait + MARGIN, agent.stop_sandbox(request)).await?.sandbox)
    }

    /// Freezes a sandbox; answers after `wait` at the latest.
    pub async fn pause(
        &self,
        epoch: u64,
        id: &SandboxId,
        or_stop: bool,
        wait: Duration,
    ) -> Result<api::Sandbox, Error> {
        let (id, wait_for) = (id.to_string(), Some(duration(wait)));
        let request = wire::PauseSandboxRequest { epoch, id, or_stop, wait: wait_for };
        let mut agent = self.agent.clone();
        sandbox(
            call(Call::PauseSandbox, wait + MARGIN, agent.pause_sandbox(request)).await?.sandbox,
        )
    }

    /// Thaws a sandbox; answers after `wait` at the latest.
    pub async fn resume(
        &self,
        epoch: u64,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<api::Sandbox, Error> {
        let wait_for = Some(duration(wait));
        let request = wire::ResumeSandboxRequest { epoch, id: id.to_string(), wait: wait_for };
        let mut agent = self.agent.clone();
        sandbox(
            call(Call::ResumeSandbox, wait + MARGIN, agent.resume_sandbox(request)).await?.sandbox,
        )
    }

    /// Sets the events that wake a sandbox.
    pub async fn set_wake_on(
        &self,
        epoch: u64,
        id: &SandboxId,
        wake_on: api::WakeOn,
    ) -> Result<api::Sandbox, Error> {
        let (id, wake_on) = (id.to_string(), Some(wake_on));
        let request = wire::SetWakeOnRequest { epoch, id, wake_on };
        let mut agent = self.agent.clone();
        sandbox(call(Call::SetWakeOn, QUICK, agent.set_wake_on(request)).await?.sandbox)
    }

    /// Changes the lifetime rules of a sandbox.
    pub async fn set_lifetime(
        &self,
        epoch: u64,
        id: &SandboxId,
        lifetime: api::Lifetime,
    ) -> Result<api::Sandbox, Error> {
        let (id, lifetime) = (id.to_string(), Some(lifetime));
        let request = wire::SetLifetimeRequest { epoch, id, lifetime };
        let mut agent = self.agent.clone();
        sandbox(call(Call::SetLifetime, QUICK, agent.set_lifetime(request)).await?.sandbox)
    }

    /// Returns the resource usage of those of the sandboxes that run on this node.
    pub async fn usage(&self, ids: &[SandboxId]) -> Result<Vec<api::Usage>, Error> {
        let request = wire::GetUsageRequest { ids: ids.iter().map(ToString::to_string).collect() };
        let mut agent = self.agent.clone();
        Ok(call(Call::GetUsage, QUICK, agent.get_usage(request)).await?.usages)
    }

    /// Deletes a sandbox; answers after `wait` at the latest.
    pub async fn delete(
        &self,
        epoch: u64,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<api::Sandbox, Error> {
        let wait_for = Some(duration(wait));
        let request = wire::DeleteSandboxRequest { epoch, id: id.to_string(), wait: wait_for };
        let mut agent = self.agent.clone();
        sandbox(
            call(Call::DeleteSandbox, wait + MARGIN, agent.delete_sandbox(request)).await?.sandbox,
        )
    }

    /// Exposes a port.
    pub async fn expose(
        &self,
        epoch: u64,
        id: &SandboxId,
        name: &ServiceName,
        port: Port,
    ) -> Result<api::Sandbox, Error> {
        let service =
            api::HttpService { name: name.to_string(), port: port.into(), url: String::new() };
        let request =
            wire::ExposeHttpServiceRequest { epoch, id: id.to_string(), service: Some(service) };
        let mut agent = self.agent.clone();
        sandbox(
            call(Call::ExposeHttpService, QUICK, agent.expose_http_service(request)).await?.sandbox,
        )
    }

    /// Closes a port. Returns the sandbox and the services that were closed.
    pub async fn hide(
        &self,
        epoch: u64,
        id: &SandboxId,
        name: &ServiceName,
    ) -> Result<(api::Sandbox, Vec<api::HttpService>), Error> {
        let request =
            wire::HideHttpServiceRequest { epoch, id: id.to_string(), name: name.to_string() };
        let mut agent = self.agent.clone();
        let answer = call(Call::HideHttpService, QUICK, agent.hide_http_service(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.closed))
    }

    /// Lists what the agent cleans up next and, unless `dry_run`, cleans it up at once.
    pub async fn collect_garbage(
        &self,
        epoch: u64,
        dry_run: bool,
    ) -> Result<Vec<api::GarbageItem>, Error> {
        let mut agent = self.agent.clone();
        let request = wire::CollectGarbageRequest { epoch, dry_run };
        Ok(call(Call::CollectGarbage, CHECK, agent.collect_garbage(request)).await?.items)
    }

    /// Recovers a container that carries our mark.
    pub async fn recover(
        &self,
        epoch: u64,
        vmid: u32,
        dry_run: bool,
    ) -> Result<api::Sandbox, Error> {
        let mut agent = self.agent.clone();
        let request = wire::RecoverSandboxRequest { epoch, vmid, dry_run };
        sandbox(call(Call::RecoverSandbox, QUICK, agent.recover_sandbox(request)).await?.sandbox)
    }

    /// Sets whether the node takes new work. Returns the load that it reports afterwards.
    pub async fn set_intake(
        &self,
        epoch: u64,
        intake: wire::Intake,
        why: String,
    ) -> Result<Option<api::NodeLoad>, Error> {
        let mut agent = self.agent.clone();
        let request = wire::SetIntakeRequest { epoch, intake: intake.into(), why };
        Ok(call(Call::SetIntake, QUICK, agent.set_intake(request)).await?.load)
    }

    /// Reserves for a creation; returns the node's load. No answer within `time` is an error.
    pub async fn reserve(
        &self,
        epoch: u64,
        id: &SandboxId,
        (snapshot, size): (&SnapshotId, api::Size),
        time: Duration,
    ) -> Result<Option<api::NodeLoad>, Error> {
        let mut agent = self.agent.clone();
        let request = wire::ReserveRequest {
            epoch,
            sandbox_id: id.to_string(),
            snapshot_id: snapshot.to_string(),
            size: Some(size),
        };
        Ok(call(Call::Reserve, time, agent.reserve(request)).await?.load)
    }

    /// Cancels a reservation.
    pub async fn give_back(&self, id: &SandboxId) -> Result<(), Error> {
        let mut agent = self.agent.clone();
        let request = wire::GiveBackRequest { sandbox_id: id.to_string() };
        call(Call::GiveBack, QUICK, agent.give_back(request)).await.map(drop)
    }

    /// Exports a stopped sandbox's container; returns the node that has it now, and its record.
    pub async fn export_sandbox(
        &self,
        epoch: u64,
        id: &SandboxId,
        target: &NodeName,
    ) -> Result<(String, bytes::Bytes), Error> {
        let mut agent = self.agent.clone();
        let (id, target) = (id.to_string(), target.to_string());
        let request = wire::ExportSandboxRequest { epoch, id, target };
        let answer = call(Call::ExportSandbox, UNDO, agent.export_sandbox(request)).await?;
        Ok((answer.node, answer.record))
    }

    /// Imports a sandbox whose container was moved to this node.
    pub async fn import_sandbox(
        &self,
        epoch: u64,
        record: bytes::Bytes,
    ) -> Result<api::Sandbox, Error> {
        let mut agent = self.agent.clone();
        let request = wire::ImportSandboxRequest { epoch, record };
        sandbox(call(Call::ImportSandbox, UNDO, agent.import_sandbox(request)).await?.sandbox)
    }

    /// Adopts a container as a sandbox. Also returns the volumes that its deletion will remove.
    pub async fn adopt(
        &self,
        request: wire::AdoptSandboxRequest,
    ) -> Result<(api::Sandbox, Vec<String>), Error> {
        let mut agent = self.agent.clone();
        let answer = call(Call::AdoptSandbox, UNDO, agent.adopt_sandbox(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.volumes))
    }

    /// Ends a sandbox and keeps its container. `moved_to` is the node that imported it.
    pub async fn release(
        &self,
        epoch: u64,
        id: &SandboxId,
        moved_to: Option<&NodeName>,
    ) -> Result<api::Sandbox, Error> {
        let mut agent = self.agent.clone();
        let moved_to = moved_to.map(ToString::to_string).unwrap_or_default();
        let request = wire::ReleaseSandboxRequest { epoch, id: id.to_string(), moved_to };
        sandbox(call(Call::ReleaseSandbox, UNDO, agent.release_sandbox(request)).await?.sandbox)
    }

    /// Checks the node. Returns the findings and the number of sandboxes checked.
    pub async fn check(&self) -> Result<(Vec<api::Finding>, u32), Error> {
        let mut agent = self.agent.clone();
        let answer = call(Call::Check, CHECK, agent.check(wire::CheckRequest {})).await?;
        Ok((answer.findings, answer.sandboxes))
    }

    /// Runs a command. Readers pull both streams, so that a slow end slows the other.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when the team or the sandbox uses its share of the node's streams.
    pub async fn exec<S>(
        &self,
        epoch: u64,
        whose: &Whose,
        input: S,
    ) -> Result<impl Stream<Item = Result<api::ExecResponse, Error>> + Send + use<S>, Error>
    where
        S: Stream<Item = api::ExecRequest> + Send + 'static,
    {
        let mut lease = self.bulk.lease(whose)?;
        // Unique at the agent: each controller has an epoch of its own.
        let number = self.streams.fetch_add(1, Ordering::Relaxed);
        let stream_id = format!("{epoch}-{number}");
        let mut name = Some(stream_id.clone());
        let input = input.map(move |message| {
            let stream_id = name.take().unwrap_or_default();
            wire::ExecRequest { message: Some(message), stream_id }
        });
        let (input, gone) = output::input(&lease, input);
        let output = call(Call::Exec, START, lease.agent.exec(Request::new(input))).await?;
        let hang_up = HangUp { agent: self.agent.clone(), stream_id, input: gone };
        Ok(Output::new(&lease, output, hang_up).map(|message| match message {
            Ok(message) => Ok(message.message.unwrap_or_default()),
            Err(status) => Err(decode(Call::Exec, &status)),
        }))
    }

    /// Acts on a command from outside its stream. Returns the number of stdin bytes taken by then.
    pub async fn control_exec(
        &self,
        action: wire::control_exec_request::Action,
    ) -> Result<u64, Error> {
        let request = wire::ControlExecRequest { action: Some(action) };
        let mut agent = self.agent.clone();
        call(Call::ControlExec, CONTROL, agent.control_exec(request))
            .await
            .map(|answer| answer.stdin_offset)
    }

    /// Lists the commands of a sandbox.
    pub async fn list_execs(&self, id: &SandboxId) -> Result<Vec<api::ExecInfo>, Error> {
        let request = wire::ListExecsRequest { id: id.to_string() };
        let mut agent = self.agent.clone();
        call(Call::ListExecs, QUICK, agent.list_execs(request)).await.map(|answer| answer.execs)
    }

    /// Runs one file operation. Readers pull both streams. The caller bounds the wait: an upload is
    /// answered when all of it was sent.
    ///
    /// # Errors
    /// As `exec`.
    pub async fn files<S>(
        &self,
        whose: &Whose,
        input: S,
    ) -> Result<impl Stream<Item = Result<files_response::Message, Error>> + Send + use<S>, Error>
    where
        S: Stream<Item = files_request::Message> + Send + 'static,
    {
        let input = input.map(|message| wire::FilesRequest { message: Some(message) });
        let broken = |status: Status| decode(Call::Files, &status);
        let mut lease = self.bulk.lease(whose)?;
        let request = Request::new(lease.hold(input));
        let output = lease.agent.files(request).await.map_err(broken)?;
        Ok(lease.hold(output.into_inner()).map(move |message| match message {
            Ok(message) => message
                .message
                .ok_or_else(|| Error::Nonsense("there is nothing in the answer".into())),
            Err(status) => Err(broken(status)),
        }))
    }

    /// Watches the node: its inventory, then changes and load reports without end.
    pub(super) async fn watch(
        &self,
        journal_id: String,
        revision: u64,
    ) -> Result<tonic::Streaming<wire::WatchResponse>, Error> {
        let mut agent = self.watch.clone();
        call(Call::Watch, QUICK, agent.watch(wire::WatchRequest { journal_id, revision })).await
    }
}

fn duration(wait: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(wait.as_secs()).unwrap_or(i64::MAX);
    let nanos = i32::try_from(wait.subsec_nanos()).unwrap_or_default();
    prost_types::Duration { seconds, nanos }
}

fn sandbox(answer: Option<api::Sandbox>) -> Result<api::Sandbox, Error> {
    answer.ok_or_else(|| Error::Nonsense("there is no sandbox in the answer".into()))
}

async fn call<T>(
    call: Call,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(decode(call, &status)),
        Err(_) => Err(unanswered(call, format!("no answer within {} s", limit.as_secs()))),
    }
}

/// Builds the error of a call without an answer, which may have been carried out.
fn unanswered(call: Call, why: String) -> Error {
    match call.silence() {
        Silence::Agent => Error::Silent(why),
        Silence::Sandbox => Error::Unknown(why),
    }
}

/// Decodes an agent's status. Only a status with our reason is a refusal; all others come from the
/// transport, and then the call may have been carried out, unless the connection was never made.
pub(super) fn decode(call: Call, status: &Status) -> Error {
    let message = status.message().to_owned();
    match daemon::status::reason(status) {
        Some(Reason::OutcomeUnknown) => Error::Unknown(message),
        Some(reason) => {
            Error::Refused { reason, message, retry_after: daemon::status::retry_after(status) }
        }
        None if never_sent(status) => Error::Unreachable(chain(status)),
        None => match status.code() {
            Code::Unimplemented => Error::Refused {
                reason: Reason::Invariant,
                message: "its agent is too old for this call".into(),
                retry_after: None,
            },
            Code::OutOfRange | Code::ResourceExhausted => {
                Error::Refused { reason: Reason::TooLarge, message, retry_after: None }
            }
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::InvalidArgument
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::Unauthenticated => unanswered(call, chain(status)),
        },
    }
}

fn chain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Returns true when the operating system reports that the connection could not be made.
fn never_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::NetworkDown
                    | io::ErrorKind::AddrNotAvailable
            );
        }
        cause = error.source();
    }
    false
}
