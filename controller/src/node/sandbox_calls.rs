//! Calls about one sandbox, or some, that a tenant can make take long. Each needs a place, see `places`.

use std::time::Duration;

use daemon::shares::Place;
use proto::{
    agent::v1::{self as wire, agent_service_client::AgentServiceClient},
    id::SandboxId,
    name::{Port, ServiceName, Team},
    sandbox::v1 as api,
    visibility::Visibility,
};
use tonic::transport::Channel;

use super::{
    Result,
    answer::{MARGIN, QUICK, call, duration, sandbox},
    calls::Call,
};

/// Deadline of a call that acts on a command: its shim may have to be found first.
const CONTROL: Duration = Duration::from_secs(10);

/// Port to expose.
#[derive(Debug, Clone)]
pub struct Exposed {
    /// Name of the service.
    pub name: ServiceName,
    /// The port.
    pub port: Port,
    /// Visibility that is wanted; `None`: as before.
    pub wanted: Option<Visibility>,
    /// Visibility of a port that is not open yet, where none is wanted.
    pub default: Visibility,
}

/// Calls about the sandboxes of a team, for as long as their place is held. Whoever has them makes one at a time.
#[derive(Debug)]
pub struct SandboxCalls {
    agent: AgentServiceClient<Channel>,
    _place: Place<Team>,
}

impl SandboxCalls {
    pub(super) fn new(agent: AgentServiceClient<Channel>, place: Place<Team>) -> Self {
        Self { agent, _place: place }
    }

    fn agent(&self) -> AgentServiceClient<Channel> {
        self.agent.clone()
    }

    /// Boots a sandbox; answers after `wait` at the latest.
    pub async fn start(&self, epoch: u64, id: &SandboxId, wait: Duration) -> Result<api::Sandbox> {
        let request = wire::StartSandboxRequest { epoch, id: id.to_string(), wait: duration(wait) };
        let answer =
            call(Call::StartSandbox, wait + MARGIN, self.agent().start_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Stops a sandbox, with `grace` to shut down by itself; answers after `wait` at the latest.
    pub async fn stop(
        &self,
        epoch: u64,
        id: &SandboxId,
        grace: Option<Duration>,
        wait: Duration,
    ) -> Result<api::Sandbox> {
        let (id, wait_for, grace) = (id.to_string(), duration(wait), grace.and_then(duration));
        let request = wire::StopSandboxRequest { epoch, id, wait: wait_for, grace };
        let answer =
            call(Call::StopSandbox, wait + MARGIN, self.agent().stop_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Freezes a sandbox; answers after `wait` at the latest.
    pub async fn pause(
        &self,
        epoch: u64,
        id: &SandboxId,
        or_stop: bool,
        wait: Duration,
    ) -> Result<api::Sandbox> {
        let (id, wait_for) = (id.to_string(), duration(wait));
        let request = wire::PauseSandboxRequest { epoch, id, or_stop, wait: wait_for };
        let answer =
            call(Call::PauseSandbox, wait + MARGIN, self.agent().pause_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Thaws a sandbox; answers after `wait` at the latest.
    pub async fn resume(&self, epoch: u64, id: &SandboxId, wait: Duration) -> Result<api::Sandbox> {
        let request =
            wire::ResumeSandboxRequest { epoch, id: id.to_string(), wait: duration(wait) };
        let answer =
            call(Call::ResumeSandbox, wait + MARGIN, self.agent().resume_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Changes the fields of a sandbox that the request names; answers after `wait` at the latest.
    pub async fn update(
        &self,
        epoch: u64,
        id: &SandboxId,
        update: api::UpdateSandboxRequest,
        wait: Duration,
    ) -> Result<api::Sandbox> {
        let (id, update) = (id.to_string(), Some(update));
        let request = wire::UpdateSandboxRequest { epoch, id, update, wait: duration(wait) };
        let answer =
            call(Call::UpdateSandbox, wait + MARGIN, self.agent().update_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Returns the resource usage of those of the sandboxes that run on this node.
    pub async fn usage(&self, ids: &[SandboxId]) -> Result<Vec<api::Usage>> {
        let request = wire::GetUsageRequest { ids: ids.iter().map(ToString::to_string).collect() };
        Ok(call(Call::GetUsage, QUICK, self.agent().get_usage(request)).await?.usages)
    }

    /// Deletes a sandbox; answers after `wait` at the latest.
    pub async fn delete(&self, epoch: u64, id: &SandboxId, wait: Duration) -> Result<api::Sandbox> {
        let request =
            wire::DeleteSandboxRequest { epoch, id: id.to_string(), wait: duration(wait) };
        let answer =
            call(Call::DeleteSandbox, wait + MARGIN, self.agent().delete_sandbox(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Exposes a port.
    pub async fn expose(
        &self,
        epoch: u64,
        id: &SandboxId,
        service: &Exposed,
    ) -> Result<api::Sandbox> {
        let Exposed { name, port, wanted, default } = service;
        let wanted = wanted.map(api::Visibility::from).unwrap_or_default();
        let service = api::HttpService {
            name: name.to_string(),
            port: (*port).into(),
            visibility: wanted.into(),
            ..api::HttpService::default()
        };
        let request = wire::ExposeHttpServiceRequest {
            epoch,
            id: id.to_string(),
            service: Some(service),
            default_visibility: api::Visibility::from(*default).into(),
        };
        let answer =
            call(Call::ExposeHttpService, QUICK, self.agent().expose_http_service(request)).await?;
        sandbox(answer.sandbox)
    }

    /// Closes a port. Returns the sandbox and the services that were closed.
    pub async fn hide(
        &self,
        epoch: u64,
        id: &SandboxId,
        name: &ServiceName,
    ) -> Result<(api::Sandbox, Vec<api::HttpService>)> {
        let request =
            wire::HideHttpServiceRequest { epoch, id: id.to_string(), name: name.to_string() };
        let answer =
            call(Call::HideHttpService, QUICK, self.agent().hide_http_service(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.closed))
    }

    /// Makes a credential for an open port. Returns the sandbox and the whole answer.
    pub async fn create_access_link(
        &self,
        request: wire::CreateAccessLinkRequest,
    ) -> Result<(api::Sandbox, wire::CreateAccessLinkResponse)> {
        let mut answer =
            call(Call::CreateAccessLink, QUICK, self.agent().create_access_link(request)).await?;
        Ok((sandbox(answer.sandbox.take())?, answer))
    }

    /// Makes all credentials of a port void. Returns the sandbox and the port.
    pub async fn revoke_access(
        &self,
        epoch: u64,
        id: &SandboxId,
        service: String,
    ) -> Result<(api::Sandbox, u32)> {
        let request = wire::RevokeAccessRequest { epoch, id: id.to_string(), service };
        let answer = call(Call::RevokeAccess, QUICK, self.agent().revoke_access(request)).await?;
        Ok((sandbox(answer.sandbox)?, answer.port))
    }

    /// Acts on a command from outside its stream. Returns the number of stdin bytes taken by then.
    pub async fn control_exec(&self, action: wire::control_exec_request::Action) -> Result<u64> {
        let request = wire::ControlExecRequest { action: Some(action) };
        call(Call::ControlExec, CONTROL, self.agent().control_exec(request))
            .await
            .map(|answer| answer.stdin_offset)
    }

    /// Lists the commands of a sandbox.
    pub async fn list_execs(&self, id: &SandboxId) -> Result<Vec<api::ExecInfo>> {
        let request = wire::ListExecsRequest { id: id.to_string() };
        call(Call::ListExecs, QUICK, self.agent().list_execs(request))
            .await
            .map(|answer| answer.execs)
    }

    /// Lists the ports that something in a sandbox listens on.
    pub async fn list_ports(&self, id: &SandboxId) -> Result<Vec<api::ListeningPort>> {
        let request = wire::ListPortsRequest { id: id.to_string() };
        let answer = call(Call::ListPorts, QUICK, self.agent().list_ports(request)).await?;
        Ok(answer.ports)
    }
}
