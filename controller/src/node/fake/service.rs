//! `agent.v1` of the fake agent.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt};
use proto::{
    Reason,
    agent::v1::{agent_service_server::AgentService, *},
    sandbox::v1::{self as api, Failure, Phase},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Cut, FakeAgent,
    answers::{parse, refuse},
};

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Implementation of the service.
#[derive(Debug)]
pub(super) struct Service(pub(super) Arc<FakeAgent>);

#[tonic::async_trait]
impl AgentService for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        let epoch = request.into_inner().epoch;
        if epoch > 0 {
            self.0.check_epoch(epoch)?;
        }
        let world = self.0.world.lock();
        Ok(Response::new(HelloResponse {
            node: self.0.name.to_string(),
            version: "fake".into(),
            journal_id: world.journal_id.clone(),
            epoch: world.epoch,
            members: world.members.clone(),
            vmid_first: world.vmids.0,
            vmid_last: world.vmids.1,
            closes_egress: !world.faults.isolates_nothing,
            filters_egress: !world.faults.filters_nothing,
            guards_ports: !world.faults.guards_nothing,
        }))
    }

    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Answer<CreateSandboxResponse> {
        let order = request.into_inner();
        self.0.check_epoch(order.epoch)?;
        let faults = self.0.world.lock().faults.clone();
        if faults.hang {
            std::future::pending::<()>().await;
        }
        if faults.cut == Some(Cut::Before) {
            self.0.net.cut(&self.0.name);
            std::future::pending::<()>().await;
        }
        let admitted = self.0.admit(&order, &faults)?;
        let begun =
            admitted.phase() == Phase::Creating && admitted.progress() == api::Progress::Clone;
        if begun && faults.at_once {
            self.0.complete(&admitted, &faults);
        } else if begun {
            let (agent, admitted, faults) = (self.0.clone(), admitted.clone(), faults.clone());
            tokio::spawn(async move {
                tokio::time::sleep(faults.boot).await;
                agent.complete(&admitted, &faults);
            });
        }
        if faults.cut == Some(Cut::After) {
            self.0.net.cut(&self.0.name);
            std::future::pending::<()>().await;
        }
        let wait = order.wait.unwrap_or_default();
        let wait = proto::duration::read(wait).unwrap_or_default();
        self.0.until_created(&order.sandbox_id, wait).await;
        let sandbox = Some(self.0.get(&order.sandbox_id)?);
        Ok(Response::new(CreateSandboxResponse { sandbox, load: Some(self.0.report()) }))
    }

    async fn cancel_create(
        &self,
        request: Request<CancelCreateRequest>,
    ) -> Answer<CancelCreateResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let id = parse(&request.sandbox_id)?;
        {
            let mut world = self.0.world.lock();
            let off = world.cancelled.entry(id).or_default();
            *off = (*off).max(request.attempt);
        }
        let mut held = self.0.get(&request.sandbox_id).ok();
        if let Some(sandbox) = &mut held
            && sandbox.attempt <= request.attempt
        {
            let ended = matches!(sandbox.phase(), Phase::Failed | Phase::Deleted);
            if !ended {
                sandbox.set_phase(Phase::Failed);
                sandbox.failure =
                    Some(Failure { reason: Reason::CreateCancelled.into(), ..Failure::default() });
                *sandbox = self.0.put(sandbox.clone());
            }
        }
        Ok(Response::new(CancelCreateResponse { sandbox: held }))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Answer<GetSandboxResponse> {
        let sandbox = Some(self.0.get(&request.into_inner().id)?);
        Ok(Response::new(GetSandboxResponse { sandbox }))
    }

    async fn list_sandboxes(
        &self,
        _request: Request<ListSandboxesRequest>,
    ) -> Answer<ListSandboxesResponse> {
        let sandboxes = self.0.sandboxes();
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token: String::new() }))
    }

    async fn start_sandbox(
        &self,
        request: Request<StartSandboxRequest>,
    ) -> Answer<StartSandboxResponse> {
        let request = request.into_inner();
        let sandbox = self.0.turn(request.epoch, &request.id, Phase::Running).await?;
        Ok(Response::new(StartSandboxResponse { sandbox }))
    }

    async fn stop_sandbox(
        &self,
        request: Request<StopSandboxRequest>,
    ) -> Answer<StopSandboxResponse> {
        let request = request.into_inner();
        let sandbox = self.0.turn(request.epoch, &request.id, Phase::Stopped).await?;
        Ok(Response::new(StopSandboxResponse { sandbox }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Answer<DeleteSandboxResponse> {
        let request = request.into_inner();
        let sandbox = self.0.turn(request.epoch, &request.id, Phase::Deleted).await?;
        Ok(Response::new(DeleteSandboxResponse { sandbox }))
    }

    type ExecStream = Messages<ExecResponse>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        let answer = self.0.exec(request.into_inner()).await?;
        let wrap = |(message, stdin_offset)| {
            let message = Some(api::ExecResponse { message: Some(message) });
            Ok(ExecResponse { message, stdin_offset })
        };
        Ok(Response::new(ReceiverStream::new(answer).map(wrap).boxed()))
    }

    /// Only a running sandbox freezes.
    async fn pause_sandbox(
        &self,
        request: Request<PauseSandboxRequest>,
    ) -> Answer<PauseSandboxResponse> {
        let request = request.into_inner();
        let runs = matches!(self.0.get(&request.id)?.phase(), Phase::Running | Phase::Paused);
        if !runs && !request.or_stop {
            return refuse(Reason::FreezeFailed, "not frozen");
        }
        let phase = if runs { Phase::Paused } else { Phase::Stopped };
        let sandbox = self.0.turn(request.epoch, &request.id, phase).await?;
        Ok(Response::new(PauseSandboxResponse { sandbox }))
    }

    async fn resume_sandbox(
        &self,
        request: Request<ResumeSandboxRequest>,
    ) -> Answer<ResumeSandboxResponse> {
        let request = request.into_inner();
        let sandbox = self.0.turn(request.epoch, &request.id, Phase::Running).await?;
        Ok(Response::new(ResumeSandboxResponse { sandbox }))
    }

    async fn update_sandbox(
        &self,
        request: Request<UpdateSandboxRequest>,
    ) -> Answer<UpdateSandboxResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let mut sandbox = self.0.get(&request.id)?;
        let asked = request.update.unwrap_or_default();
        let update =
            proto::update::Update::try_from(&asked).map_err(daemon::status::Refusal::from)?;
        let new = asked.sandbox.unwrap_or_default();
        if let Some(name) = &update.name {
            sandbox.name = name.as_ref().map(ToString::to_string).unwrap_or_default();
        }
        if let Some(size) = update.size {
            sandbox.size = Some(size.or(sandbox.size.unwrap_or_default().into()).into());
        }
        let metadata = update.metadata_of(&sandbox.metadata);
        sandbox.metadata = metadata.map_err(daemon::status::Refusal::from)?;
        // Whole messages: the fake keeps no rules.
        sandbox.lifetime = new.lifetime.or(sandbox.lifetime);
        sandbox.wake_on = new.wake_on.or(sandbox.wake_on);
        if update.egress.is_some() {
            (sandbox.egress, sandbox.egress_names) = (new.egress, new.egress_names);
        }
        Ok(Response::new(UpdateSandboxResponse { sandbox: Some(self.0.put(sandbox)) }))
    }

    async fn control_exec(
        &self,
        request: Request<ControlExecRequest>,
    ) -> Answer<ControlExecResponse> {
        let stdin_offset = self.0.control(request.into_inner())?;
        Ok(Response::new(ControlExecResponse { stdin_offset }))
    }

    async fn list_execs(&self, request: Request<ListExecsRequest>) -> Answer<ListExecsResponse> {
        let execs = self.0.execs(&request.into_inner().id)?;
        Ok(Response::new(ListExecsResponse { execs }))
    }

    type FilesStream = Messages<FilesResponse>;

    async fn files(&self, request: Request<Streaming<FilesRequest>>) -> Answer<Self::FilesStream> {
        let said = self.0.files(request.into_inner()).await?;
        let said = said.into_iter().map(|message| Ok(FilesResponse { message: Some(message) }));
        Ok(Response::new(futures_util::stream::iter(said).boxed()))
    }

    type ForwardStream = Messages<ForwardResponse>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Answer<Self::ForwardStream> {
        let answer = self.0.forward(request.into_inner()).await?;
        let wrap = |message| ForwardResponse {
            message: Some(api::ForwardResponse { message: Some(message) }),
        };
        Ok(Response::new(ReceiverStream::new(answer).map(move |m| m.map(wrap)).boxed()))
    }

    type ForwardListenStream = Messages<ForwardListenResponse>;

    async fn forward_listen(
        &self,
        request: Request<ForwardListenRequest>,
    ) -> Answer<Self::ForwardListenStream> {
        let answer = self.0.forward_listen(&request.into_inner())?;
        let wrap = |message| ForwardListenResponse {
            message: Some(api::ForwardListenResponse { message: Some(message) }),
        };
        Ok(Response::new(ReceiverStream::new(answer).map(move |m| m.map(wrap)).boxed()))
    }

    async fn list_ports(&self, request: Request<ListPortsRequest>) -> Answer<ListPortsResponse> {
        self.0.get(&request.into_inner().id)?;
        let ports = [(7, "127.0.0.1"), (8000, "0.0.0.0")].map(|(port, address)| {
            api::ListeningPort { port, address: address.into(), services: Vec::new() }
        });
        Ok(Response::new(ListPortsResponse { ports: ports.into() }))
    }

    async fn get_usage(&self, request: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        let ids = request.into_inner().ids;
        let here = ids.iter().filter_map(|id| self.0.get(id).ok());
        let up = here.filter(|s| matches!(s.phase(), Phase::Running | Phase::Paused));
        let usages = up.map(|sandbox| api::Usage {
            frozen: sandbox.phase() == Phase::Paused,
            memory_bytes: 64 << 20,
            id: sandbox.id,
            ..api::Usage::default()
        });
        Ok(Response::new(GetUsageResponse { usages: usages.collect() }))
    }

    async fn expose_http_service(
        &self,
        request: Request<ExposeHttpServiceRequest>,
    ) -> Answer<ExposeHttpServiceResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let mut sandbox = self.0.get(&request.id)?;
        let default = request.default_visibility;
        if let Some(mut service) = request.service {
            let mut of_port = sandbox.services.iter_mut().filter(|s| s.port == service.port);
            if service.visibility == 0 {
                service.visibility = of_port.next().map_or(default, |known| known.visibility);
            } else {
                of_port.for_each(|known| known.visibility = service.visibility);
            }
            if self.0.world.lock().faults.forgets_visibility {
                service.visibility = 0;
            }
            sandbox.services.retain(|known| known.name != service.name);
            sandbox.services.push(service);
        }
        let sandbox = Some(self.0.put(sandbox));
        self.0.answer_unless_mute().await;
        Ok(Response::new(ExposeHttpServiceResponse { sandbox }))
    }

    async fn hide_http_service(
        &self,
        request: Request<HideHttpServiceRequest>,
    ) -> Answer<HideHttpServiceResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let mut sandbox = self.0.get(&request.id)?;
        let named = |service: &&api::HttpService| service.name == request.name;
        let Some(port) = sandbox.services.iter().find(named).map(|service| service.port) else {
            return refuse(Reason::ServiceNotFound, "no such service");
        };
        let closed = sandbox.services.extract_if(.., |service| service.port == port).collect();
        let sandbox = Some(self.0.put(sandbox));
        Ok(Response::new(HideHttpServiceResponse { sandbox, closed }))
    }

    async fn create_access_link(
        &self,
        request: Request<CreateAccessLinkRequest>,
    ) -> Answer<CreateAccessLinkResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let sandbox = self.0.get(&request.id)?;
        let of_port = |service: &&api::HttpService| {
            service.name == request.service || service.port.to_string() == request.service
        };
        let Some(service) = sandbox.services.iter().find(of_port).cloned() else {
            return refuse(Reason::ServiceNotFound, "no such service");
        };
        let kind = match service.visibility() {
            api::Visibility::Team => api::AccessKind::Link,
            api::Visibility::Token => api::AccessKind::Token,
            api::Visibility::Unspecified | api::Visibility::Public | api::Visibility::Private => {
                return refuse(Reason::AccessKind, "it takes no credential");
            }
        };
        Ok(Response::new(CreateAccessLinkResponse {
            sandbox: Some(sandbox),
            credential: format!("credential-of-{}", request.user),
            kind: kind.into(),
            expires_at: None,
            port: service.port,
        }))
    }

    async fn revoke_access(
        &self,
        request: Request<RevokeAccessRequest>,
    ) -> Answer<RevokeAccessResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let sandbox = self.0.get(&request.id)?;
        let named = sandbox.services.iter().find(|service| service.name == request.service);
        match named.map(|service| service.port) {
            Some(port) => Ok(Response::new(RevokeAccessResponse { sandbox: Some(sandbox), port })),
            None => refuse(Reason::ServiceNotFound, "no such service"),
        }
    }

    async fn get_load(&self, _request: Request<GetLoadRequest>) -> Answer<GetLoadResponse> {
        Ok(Response::new(GetLoadResponse { load: Some(self.0.report()) }))
    }

    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let (out, messages) = mpsc::channel(16);
        tokio::spawn(self.0.clone().watch(request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn collect_garbage(
        &self,
        _request: Request<CollectGarbageRequest>,
    ) -> Answer<CollectGarbageResponse> {
        let garbage = self.0.world.lock().faults.garbage.clone();
        let (takes, items) = garbage.unwrap_or_default();
        tokio::time::sleep(takes).await;
        Ok(Response::new(CollectGarbageResponse { items }))
    }

    async fn recover_sandbox(
        &self,
        _request: Request<RecoverSandboxRequest>,
    ) -> Answer<RecoverSandboxResponse> {
        match self.0.world.lock().faults.recovers.clone() {
            Some(sandbox) => Ok(Response::new(RecoverSandboxResponse { sandbox: Some(sandbox) })),
            None => refuse(Reason::NotOurs, "it carries no mark"),
        }
    }

    async fn set_scheduling(
        &self,
        _request: Request<SetSchedulingRequest>,
    ) -> Answer<SetSchedulingResponse> {
        Ok(Response::new(SetSchedulingResponse::default()))
    }

    async fn reserve(&self, request: Request<ReserveRequest>) -> Answer<ReserveResponse> {
        let request = request.into_inner();
        self.0.check_epoch(request.epoch)?;
        let faults = self.0.world.lock().faults.clone();
        if let Some(reason) = faults.refuse {
            return refuse(reason, "refused on purpose");
        }
        if faults.hang {
            std::future::pending::<()>().await;
        }
        self.0.world.lock().reservations.insert(parse(&request.sandbox_id)?);
        Ok(Response::new(ReserveResponse { load: Some(self.0.report()) }))
    }

    async fn cancel_reservation(
        &self,
        request: Request<CancelReservationRequest>,
    ) -> Answer<CancelReservationResponse> {
        self.0.world.lock().reservations.remove(&parse(&request.into_inner().sandbox_id)?);
        Ok(Response::new(CancelReservationResponse {}))
    }

    async fn export_sandbox(
        &self,
        _request: Request<ExportSandboxRequest>,
    ) -> Answer<ExportSandboxResponse> {
        refuse(Reason::NotMovable, "its disk is this node's alone")
    }

    async fn import_sandbox(
        &self,
        _request: Request<ImportSandboxRequest>,
    ) -> Answer<ImportSandboxResponse> {
        refuse(Reason::NotOurs, "it is not here")
    }

    async fn adopt_sandbox(
        &self,
        _request: Request<AdoptSandboxRequest>,
    ) -> Answer<AdoptSandboxResponse> {
        refuse(Reason::ContainerUnfit, "it is privileged")
    }

    async fn release_sandbox(
        &self,
        _request: Request<ReleaseSandboxRequest>,
    ) -> Answer<ReleaseSandboxResponse> {
        refuse(Reason::NotAdopted, "it was made for it")
    }

    async fn check(&self, _request: Request<CheckRequest>) -> Answer<CheckResponse> {
        let sandboxes = u32::try_from(self.0.living().len()).unwrap_or(u32::MAX);
        Ok(Response::new(CheckResponse { findings: Vec::new(), sandboxes }))
    }
}
