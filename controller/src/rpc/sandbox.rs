//! `SandboxService`: converts the request, calls the domain, converts the answer.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt};
use proto::{
    id::Invalid,
    sandbox::v1::{sandbox_service_server::SandboxService, *},
};
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::{
    calls::{self, Call, Made},
    convert,
    subject::Named,
};
use crate::{
    sandbox::{Caller, Error, EventItem, EventQuery, Sandboxes},
    url::Urls,
};

pub(super) type Answer<T> = Result<Response<T>, Status>;
pub(super) type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Implementation of the service.
#[derive(Debug)]
pub(super) struct Rpc {
    pub(super) sandboxes: Arc<Sandboxes>,
    pub(super) urls: Arc<Urls>,
}

impl Rpc {
    fn out(&self, sandbox: Sandbox) -> Option<Sandbox> {
        Some(convert::sandbox(sandbox, &self.urls))
    }
}

/// Splits a request into the caller that the guard has set, and the message, which the audit log is
/// told of; fails without a caller.
pub(super) fn split<T: Named>(request: Request<T>) -> Result<(Caller, T), Status> {
    let (_, extensions, message) = request.into_parts();
    if let Some(call) = extensions.get::<Call>() {
        call.about(&message);
    }
    Ok((caller(&extensions)?, message))
}

/// Splits a request of many messages; the audit log is told of the first.
fn split_stream<T: Named + 'static>(
    request: Request<Streaming<T>>,
) -> Result<(Caller, futures_util::stream::BoxStream<'static, Result<T, Error>>), Status> {
    let (_, extensions, messages) = request.into_parts();
    let caller = caller(&extensions)?;
    let call = extensions.get::<Call>().cloned();
    let messages = messages.map(move |message| {
        if let (Some(call), Ok(message)) = (&call, &message) {
            call.about(message);
        }
        message.map_err(broken)
    });
    Ok((caller, messages.boxed()))
}

fn caller(extensions: &Extensions) -> Result<Caller, Status> {
    let nobody = || Status::internal("a call came past the guard");
    extensions.get::<Caller>().cloned().ok_or_else(nobody)
}

/// Builds the answer of a call that has made a sandbox, which the audit log is told of.
pub(super) fn made<T>(made: Made, answer: T) -> Response<T> {
    let mut response = Response::new(answer);
    response.extensions_mut().insert(made);
    response
}

#[tonic::async_trait]
impl SandboxService for Rpc {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Answer<CreateSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.create(&caller, request).await?;
        let id = Made(sandbox.id.clone());
        Ok(made(id, CreateSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Answer<GetSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.get(&caller.team, &request.id)?;
        Ok(Response::new(GetSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Answer<ListSandboxesResponse> {
        let (caller, ask) = split(request)?;
        let (sandboxes, next_page_token) = self.sandboxes.list(&caller.team, ask)?;
        let sandboxes = sandboxes.into_iter().map(|s| convert::sandbox(s, &self.urls)).collect();
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token }))
    }

    type WatchSandboxesStream = Messages<WatchSandboxesResponse>;

    async fn watch_sandboxes(
        &self,
        request: Request<WatchSandboxesRequest>,
    ) -> Answer<Self::WatchSandboxesStream> {
        let (caller, request) = split(request)?;
        let urls = self.urls.clone();
        let stream = self.sandboxes.watch_many(&caller.team, request.filter)?.map(move |told| {
            let told = told?;
            let sandbox = told.sandbox.map(|sandbox| convert::sandbox(sandbox, &urls));
            Ok(WatchSandboxesResponse { sandbox, ..told })
        });
        Ok(Response::new(stream.boxed()))
    }

    type WatchEventsStream = Messages<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        let (caller, ask) = split(request)?;
        let WatchEventsRequest { after_revision, id, follow, last } = ask;
        let query = EventQuery { team: Some(caller.team), id, after_revision, last, follow };
        let stream = self.sandboxes.events(query).await?.map(|item| {
            let EventItem { event, revision } = item?;
            Ok(WatchEventsResponse { event: event.map(convert::event), revision })
        });
        Ok(Response::new(stream.boxed()))
    }

    type WatchSandboxStream = Messages<WatchSandboxResponse>;

    async fn watch_sandbox(
        &self,
        request: Request<WatchSandboxRequest>,
    ) -> Answer<Self::WatchSandboxStream> {
        let (caller, request) = split(request)?;
        let urls = self.urls.clone();
        let stream = self.sandboxes.watch(&caller.team, &request.id)?.map(move |sandbox| {
            let sandbox = Some(convert::sandbox(sandbox?, &urls));
            Ok(WatchSandboxResponse { sandbox })
        });
        Ok(Response::new(stream.boxed()))
    }

    async fn start_sandbox(
        &self,
        request: Request<StartSandboxRequest>,
    ) -> Answer<StartSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.start(&caller, &request.id).await?;
        Ok(Response::new(StartSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn stop_sandbox(
        &self,
        request: Request<StopSandboxRequest>,
    ) -> Answer<StopSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.stop(&caller, &request.id, request.grace).await?;
        Ok(Response::new(StopSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Answer<DeleteSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.delete(&caller, &request.id).await?;
        Ok(Response::new(DeleteSandboxResponse { sandbox: self.out(sandbox) }))
    }

    type ExecStream = Messages<ExecResponse>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        let (caller, input) = split_stream(request)?;
        let output = self.sandboxes.exec(&caller.team, input).await?;
        Ok(Response::new(output.map(|message| message.map_err(Status::from)).boxed()))
    }

    async fn exec_command(
        &self,
        request: Request<ExecCommandRequest>,
    ) -> Answer<ExecCommandResponse> {
        let (caller, request) = split(request)?;
        let start = request.start.ok_or_else(|| {
            Status::from(Error::from(Invalid::new("start", "must say what to run")))
        })?;
        let output = self.sandboxes.exec_command(&caller.team, start, request.stdin).await?;
        Ok(Response::new(ExecCommandResponse {
            still_running: output.exit.is_none(),
            exit: output.exit,
            stdout: output.stdout,
            stderr: output.stderr,
            truncated: output.truncated,
            exec_id: output.exec_id,
        }))
    }

    async fn pause_sandbox(
        &self,
        request: Request<PauseSandboxRequest>,
    ) -> Answer<PauseSandboxResponse> {
        let (caller, ask) = split(request)?;
        let sandbox = self.sandboxes.pause(&caller, &ask.id, ask.or_stop).await?;
        Ok(Response::new(PauseSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn resume_sandbox(
        &self,
        request: Request<ResumeSandboxRequest>,
    ) -> Answer<ResumeSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.resume(&caller, &request.id).await?;
        Ok(Response::new(ResumeSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn update_sandbox(
        &self,
        request: Request<UpdateSandboxRequest>,
    ) -> Answer<UpdateSandboxResponse> {
        let (caller, request) = split(request)?;
        let sandbox = self.sandboxes.update(&caller, request).await?;
        Ok(Response::new(UpdateSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn get_or_create_sandbox(
        &self,
        request: Request<GetOrCreateSandboxRequest>,
    ) -> Answer<GetOrCreateSandboxResponse> {
        let (caller, request) = split(request)?;
        let missing = || Error::from(Invalid::new("create", "must be given"));
        let create = request.create.ok_or_else(missing)?;
        let sandbox = self.sandboxes.get_or_create(&caller, create).await?;
        let id = Made(sandbox.id.clone());
        Ok(made(id, GetOrCreateSandboxResponse { sandbox: self.out(sandbox) }))
    }

    async fn prune_sandboxes(
        &self,
        request: Request<PruneSandboxesRequest>,
    ) -> Answer<PruneSandboxesResponse> {
        let witness = calls::witness(&request);
        let (caller, ask) = split(request)?;
        let sandboxes = self.sandboxes.prune(&caller, ask, &witness).await?;
        Ok(Response::new(PruneSandboxesResponse { sandboxes }))
    }

    async fn compare_sandboxes(
        &self,
        request: Request<CompareSandboxesRequest>,
    ) -> Answer<CompareSandboxesResponse> {
        let (caller, ask) = split(request)?;
        let found = self.sandboxes.compare(&caller.team, &ask.known_ids)?;
        Ok(Response::new(CompareSandboxesResponse {
            unlisted: found.unlisted.into_iter().filter_map(|sandbox| self.out(sandbox)).collect(),
            missing: found.missing,
            complete: found.complete,
        }))
    }

    type StreamExecStream = Messages<StreamExecResponse>;

    async fn stream_exec(
        &self,
        request: Request<StreamExecRequest>,
    ) -> Answer<Self::StreamExecStream> {
        let (caller, request) = split(request)?;
        let output = self.sandboxes.stream_exec(&caller.team, request).await?;
        Ok(Response::new(output.map(|m| Ok(StreamExecResponse { message: Some(m?) })).boxed()))
    }

    async fn write_exec_stdin(
        &self,
        request: Request<WriteExecStdinRequest>,
    ) -> Answer<WriteExecStdinResponse> {
        let (caller, request) = split(request)?;
        let offset = self.sandboxes.write_exec_stdin(&caller.team, request).await?;
        Ok(Response::new(WriteExecStdinResponse { offset }))
    }

    async fn resize_exec(&self, request: Request<ResizeExecRequest>) -> Answer<ResizeExecResponse> {
        let (caller, request) = split(request)?;
        self.sandboxes.resize_exec(&caller.team, request).await?;
        Ok(Response::new(ResizeExecResponse {}))
    }

    async fn signal_exec(&self, request: Request<SignalExecRequest>) -> Answer<SignalExecResponse> {
        let (caller, request) = split(request)?;
        self.sandboxes.signal_exec(&caller.team, request).await?;
        Ok(Response::new(SignalExecResponse {}))
    }

    async fn list_execs(&self, request: Request<ListExecsRequest>) -> Answer<ListExecsResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(self.sandboxes.list_execs(&caller.team, &request).await?))
    }

    async fn write_files(&self, request: Request<WriteFilesRequest>) -> Answer<WriteFilesResponse> {
        let (caller, request) = split(request)?;
        let written = self.sandboxes.write_files(&caller.team, request).await?;
        Ok(Response::new(WriteFilesResponse { written }))
    }

    type ReadFileStream = Messages<ReadFileResponse>;

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Answer<Self::ReadFileStream> {
        let (caller, request) = split(request)?;
        let pieces = self.sandboxes.read_file(&caller.team, request).await?;
        Ok(Response::new(pieces.map(|piece| Ok(convert::piece_of_file(piece?))).boxed()))
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Answer<StatFileResponse> {
        let (caller, request) = split(request)?;
        let file = self.sandboxes.stat_file(&caller.team, request).await?;
        Ok(Response::new(StatFileResponse { file: Some(file) }))
    }

    async fn list_dir(&self, request: Request<ListDirRequest>) -> Answer<ListDirResponse> {
        let (caller, request) = split(request)?;
        Ok(Response::new(self.sandboxes.list_dir(&caller.team, request).await?))
    }

    async fn remove_file(&self, request: Request<RemoveFileRequest>) -> Answer<RemoveFileResponse> {
        let (caller, request) = split(request)?;
        let existed = self.sandboxes.remove_file(&caller.team, request).await?;
        Ok(Response::new(RemoveFileResponse { existed }))
    }

    async fn upload_archive(
        &self,
        request: Request<Streaming<UploadArchiveRequest>>,
    ) -> Answer<UploadArchiveResponse> {
        let (caller, input) = split_stream(request)?;
        let entries = self.sandboxes.upload_archive(&caller.team, input).await?;
        Ok(Response::new(UploadArchiveResponse { entries }))
    }

    type DownloadArchiveStream = Messages<DownloadArchiveResponse>;

    async fn download_archive(
        &self,
        request: Request<DownloadArchiveRequest>,
    ) -> Answer<Self::DownloadArchiveStream> {
        let (caller, request) = split(request)?;
        let pieces = self.sandboxes.download_archive(&caller.team, request).await?;
        Ok(Response::new(pieces.map(|piece| Ok(convert::piece_of_archive(piece?))).boxed()))
    }

    async fn get_usage(&self, request: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        let (caller, request) = split(request)?;
        let (usages, next_page_token) = self.sandboxes.usage(&caller.team, &request).await?;
        Ok(Response::new(GetUsageResponse { usages, next_page_token }))
    }

    async fn expose_http_service(
        &self,
        request: Request<ExposeHttpServiceRequest>,
    ) -> Answer<ExposeHttpServiceResponse> {
        let (caller, ask) = split(request)?;
        let (sandbox, name) = self.sandboxes.expose(&caller, &ask).await?;
        let url = self.urls.of(&sandbox, ask.port);
        let same_port = sandbox.services.iter().find(|service| service.port == ask.port);
        let service = HttpService {
            name: name.to_string(),
            port: ask.port,
            url: url.text,
            no_url: url.missing,
            visibility: same_port.map(|service| service.visibility).unwrap_or_default(),
            bypasses_access: url.bypasses_access,
        };
        Ok(Response::new(ExposeHttpServiceResponse { service: Some(service) }))
    }

    async fn hide_http_service(
        &self,
        request: Request<HideHttpServiceRequest>,
    ) -> Answer<HideHttpServiceResponse> {
        let (caller, request) = split(request)?;
        let (sandbox, closed) = self.sandboxes.hide(&caller, &request.id, &request.name).await?;
        Ok(Response::new(HideHttpServiceResponse { sandbox: self.out(sandbox), closed }))
    }

    async fn create_access_link(
        &self,
        request: Request<CreateAccessLinkRequest>,
    ) -> Answer<CreateAccessLinkResponse> {
        let (caller, request) = split(request)?;
        let (sandbox, made) = self.sandboxes.create_access_link(&caller, &request).await?;
        let url = self.urls.of(&sandbox, made.port);
        Ok(Response::new(convert::access_link(made, &url)))
    }

    async fn revoke_access(
        &self,
        request: Request<RevokeAccessRequest>,
    ) -> Answer<RevokeAccessResponse> {
        let (caller, request) = split(request)?;
        let (sandbox, port) = self.sandboxes.revoke_access(&caller, &request).await?;
        Ok(Response::new(RevokeAccessResponse { sandbox: self.out(sandbox), port: port.into() }))
    }

    type ForwardStream = Messages<ForwardResponse>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Answer<Self::ForwardStream> {
        let (caller, input) = split_stream(request)?;
        let output = self.sandboxes.forward_stream(&caller.team, input).await?;
        Ok(Response::new(output.map(|message| message.map_err(Status::from)).boxed()))
    }

    type ForwardListenStream = Messages<ForwardListenResponse>;

    async fn forward_listen(
        &self,
        request: Request<ForwardListenRequest>,
    ) -> Answer<Self::ForwardListenStream> {
        let (caller, request) = split(request)?;
        let accepted = self.sandboxes.forward_listen(&caller.team, &request).await?;
        Ok(Response::new(accepted.map(|message| message.map_err(Status::from)).boxed()))
    }

    async fn list_ports(&self, request: Request<ListPortsRequest>) -> Answer<ListPortsResponse> {
        let (caller, request) = split(request)?;
        let (mut ports, sandbox) = self.sandboxes.ports(&caller.team, &request.id).await?;
        let services = convert::sandbox(sandbox, &self.urls).services;
        for port in &mut ports {
            let of_it = services.iter().filter(|service| service.port == port.port);
            port.services = of_it.cloned().collect();
        }
        Ok(Response::new(ListPortsResponse { ports }))
    }

    async fn list_snapshots(
        &self,
        _request: Request<ListSnapshotsRequest>,
    ) -> Answer<ListSnapshotsResponse> {
        Ok(Response::new(ListSnapshotsResponse { snapshots: self.sandboxes.snapshots() }))
    }

    async fn explain_placement(
        &self,
        request: Request<ExplainPlacementRequest>,
    ) -> Answer<ExplainPlacementResponse> {
        let (caller, request) = split(request)?;
        let decision = match request.subject {
            Some(explain_placement_request::Subject::Id(id)) => {
                self.sandboxes.explain(&caller.team, &id).await?
            }
            Some(explain_placement_request::Subject::DryRun(request)) => {
                self.sandboxes.dry_run(&caller.team, request)?
            }
            None => {
                let missing = Invalid::new("subject", "must be an id or a dry run");
                return Err(Error::from(missing).into());
            }
        };
        let decision = Some(convert::decision(decision));
        Ok(Response::new(ExplainPlacementResponse { decision }))
    }
}

/// Builds the error of a stream that the caller broke: by a large message, or by going away.
fn broken(status: Status) -> Error {
    let status = super::status::completed(&status).unwrap_or(status);
    let reason = daemon::status::reason(&status);
    Error::new(reason.unwrap_or(proto::Reason::ExecFailed), status.message())
}
