//! The fake's service for users of sandboxes.

use std::sync::atomic::Ordering;

use proto::{
    Progress, Reason,
    sandbox::v1::{sandbox_service_server::SandboxService, *},
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, ID, Service, Streamed, known, refuse, sandbox};
use crate::session;

#[tonic::async_trait]
impl SandboxService for Service {
    async fn create_sandbox(
        &self,
        request: Request<CreateSandboxRequest>,
    ) -> Answer<CreateSandboxResponse> {
        self.0.creates.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        let unknown = &self.0.unknown;
        if unknown
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok()
        {
            return Err(refuse(Reason::OutcomeUnknown));
        }
        let mut made = sandbox(Phase::Creating, Progress::Clone);
        made.request_id = request.request_id;
        made.snapshot_id = request.snapshot_id;
        Ok(Response::new(CreateSandboxResponse { sandbox: Some(made) }))
    }

    async fn get_sandbox(&self, request: Request<GetSandboxRequest>) -> Answer<GetSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(GetSandboxResponse { sandbox }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<ListSandboxesRequest>,
    ) -> Answer<ListSandboxesResponse> {
        self.0.lists.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        self.0.filters.lock().expect("no panic").extend(request.filter.clone());
        let (phase, next) = match request.page_token.as_str() {
            "" => (Phase::Running, "second"),
            _ => (Phase::Creating, ""),
        };
        let mut sandboxes = vec![sandbox(phase, Progress::Clone)];
        let phases = request.filter.unwrap_or_default().phases;
        sandboxes.retain(|one| phases.is_empty() || phases.contains(&one.phase));
        Ok(Response::new(ListSandboxesResponse { sandboxes, next_page_token: next.into() }))
    }

    type WatchEventsStream = Streamed<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        let WatchEventsRequest { after_revision, id, follow, last } = request.into_inner();
        if !id.is_empty() {
            known(&id, Phase::Running)?;
        }
        let said = self.0.events.say(after_revision, last, follow)?;
        let said = said.into_iter().map(|said| {
            let (event, revision) = said?;
            Ok(WatchEventsResponse { event, revision })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(said.collect::<Vec<_>>()))))
    }

    type WatchSandboxesStream = Streamed<WatchSandboxesResponse>;

    async fn watch_sandboxes(
        &self,
        request: Request<WatchSandboxesRequest>,
    ) -> Answer<Self::WatchSandboxesStream> {
        self.0.filters.lock().expect("no panic").extend(request.into_inner().filter);
        let first = self.0.watches.fetch_add(1, Ordering::SeqCst) == 0;
        let told = |phase, revision, gone| {
            let sandbox = Some(Sandbox { revision, ..sandbox(phase, Progress::Done) });
            Ok(WatchSandboxesResponse { sandbox, gone, synced: false })
        };
        let synced = Ok(WatchSandboxesResponse { synced: true, ..Default::default() });
        if !self.0.watch_breaks {
            let told = tokio_stream::iter([told(Phase::Running, 7, false), synced]);
            return Ok(Response::new(Box::pin(told.chain(tokio_stream::pending()))));
        }
        // The first watch breaks; the second one goes on.
        if first {
            let broken = Err(Status::unavailable("the connection broke"));
            let told =
                [told(Phase::Running, 7, false), synced, told(Phase::Paused, 8, false), broken];
            return Ok(Response::new(Box::pin(tokio_stream::iter(told))));
        }
        let told = [told(Phase::Paused, 8, false), synced, told(Phase::Stopped, 9, true)];
        Ok(Response::new(Box::pin(tokio_stream::iter(told).chain(tokio_stream::pending()))))
    }

    type WatchSandboxStream = Streamed<WatchSandboxResponse>;

    async fn watch_sandbox(
        &self,
        request: Request<WatchSandboxRequest>,
    ) -> Answer<Self::WatchSandboxStream> {
        known(&request.into_inner().id, Phase::Running)?;
        let mut last = sandbox(Phase::Running, Progress::Done);
        if self.0.create_fails {
            last.set_phase(Phase::Failed);
            last.failure = Some(Failure {
                reason: Reason::PctFailed.into(),
                message: "start failed: no such device".into(),
                rollback: "the container was destroyed".into(),
            });
        }
        if self.0.create_hangs {
            let creating = Ok(WatchSandboxResponse {
                sandbox: Some(sandbox(Phase::Creating, Progress::Clone)),
            });
            let creating = tokio_stream::once(creating).chain(tokio_stream::pending());
            return Ok(Response::new(Box::pin(creating)));
        }
        let changes = [sandbox(Phase::Creating, Progress::Start), last];
        let changes = changes.map(|sandbox| Ok(WatchSandboxResponse { sandbox: Some(sandbox) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(changes))))
    }

    async fn start_sandbox(
        &self,
        request: Request<StartSandboxRequest>,
    ) -> Answer<StartSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Starting)?;
        Ok(Response::new(StartSandboxResponse { sandbox }))
    }

    async fn stop_sandbox(
        &self,
        request: Request<StopSandboxRequest>,
    ) -> Answer<StopSandboxResponse> {
        self.reached()?;
        let sandbox = known(&request.into_inner().id, Phase::Stopped)?;
        Ok(Response::new(StopSandboxResponse { sandbox }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<DeleteSandboxRequest>,
    ) -> Answer<DeleteSandboxResponse> {
        self.reached()?;
        self.0.deletes.fetch_add(1, Ordering::SeqCst);
        let sandbox = known(&request.into_inner().id, Phase::Deleted)?;
        Ok(Response::new(DeleteSandboxResponse { sandbox }))
    }

    type ExecStream = Streamed<ExecResponse>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Answer<Self::ExecStream> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|request| request.message);
        let (session, from) = match first {
            Some(exec_request::Message::Start(start)) => {
                self.reached()?;
                known(&start.id, Phase::Running)?;
                (self.0.sessions.start(start), [0, 0])
            }
            Some(exec_request::Message::Attach(attach)) => {
                known(&attach.id, Phase::Running)?;
                let from = [attach.stdout_offset, attach.stderr_offset];
                (self.0.sessions.get(&attach.exec_id)?, from)
            }
            other => panic!("no start: {other:?}"),
        };
        let cut = self.0.cuts.lock().expect("no panic").pop_front();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(session::feed(session.clone(), messages));
        tokio::spawn(session::relay(session, from, sender, cut));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// Plays a sandbox in which something listens on port 8000, and on 8001 of the loopback address.
    async fn exec_command(&self, _: Request<ExecCommandRequest>) -> Answer<ExecCommandResponse> {
        let stdout = "0: 00000000:1F40 00000000:0000 0A\n1: 0100007F:1F41 00000000:0000 0A\n";
        Ok(Response::new(ExecCommandResponse {
            exit: Some(ExecExit::default()),
            stdout: stdout.into(),
            ..ExecCommandResponse::default()
        }))
    }

    async fn pause_sandbox(
        &self,
        request: Request<PauseSandboxRequest>,
    ) -> Answer<PauseSandboxResponse> {
        self.reached()?;
        let PauseSandboxRequest { id, or_stop } = request.into_inner();
        let sandbox = known(&id, if or_stop { Phase::Stopped } else { Phase::Paused })?;
        Ok(Response::new(PauseSandboxResponse { sandbox }))
    }

    async fn resume_sandbox(
        &self,
        request: Request<ResumeSandboxRequest>,
    ) -> Answer<ResumeSandboxResponse> {
        let sandbox = known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(ResumeSandboxResponse { sandbox }))
    }

    async fn update_sandbox(
        &self,
        request: Request<UpdateSandboxRequest>,
    ) -> Answer<UpdateSandboxResponse> {
        let request = request.into_inner();
        let bad = |_| Status::invalid_argument("update_mask");
        let update = proto::update::Update::try_from(&request).map_err(bad)?;
        let new = request.sandbox.unwrap_or_default();
        let sandbox = known(&new.id, Phase::Running)?.map(|mut old| {
            if let (Some(on), asked) = (&mut old.wake_on, update.wake_on) {
                on.http = asked.http.unwrap_or(on.http);
                on.ssh = asked.ssh.unwrap_or(on.ssh);
                on.exec = asked.exec.unwrap_or(on.exec);
            }
            old.lifetime = new.lifetime.or(old.lifetime);
            let before = old.size.unwrap_or_default();
            old.size = update.size.map(|size| size.or(before.into()).into()).or(old.size);
            old.metadata = update.metadata_of(&old.metadata).unwrap_or_default();
            if update.egress.is_some() {
                (old.egress, old.egress_names) = (new.egress, new.egress_names);
            }
            if let Some(name) = update.name {
                old.name = name.map(String::from).unwrap_or_default();
            }
            old
        });
        Ok(Response::new(UpdateSandboxResponse { sandbox }))
    }

    async fn get_or_create_sandbox(
        &self,
        _: Request<GetOrCreateSandboxRequest>,
    ) -> Answer<GetOrCreateSandboxResponse> {
        Err(Status::unimplemented("no verb calls it"))
    }

    async fn prune_sandboxes(
        &self,
        request: Request<PruneSandboxesRequest>,
    ) -> Answer<PruneSandboxesResponse> {
        let PruneSandboxesRequest { older_than, dry_run, .. } = request.into_inner();
        // The only sandbox was stopped a week ago.
        let old = older_than.is_some_and(|age| age.seconds < 7 * 24 * 3600);
        let one = PrunedSandbox {
            sandbox: known(ID, Phase::Stopped)?,
            deleted: !dry_run,
            error: String::new(),
        };
        let sandboxes = if old { vec![one] } else { Vec::new() };
        Ok(Response::new(PruneSandboxesResponse { sandboxes }))
    }

    async fn compare_sandboxes(
        &self,
        request: Request<CompareSandboxesRequest>,
    ) -> Answer<CompareSandboxesResponse> {
        let known_ids = request.into_inner().known_ids;
        let listed = known_ids.iter().any(|id| id == ID);
        let unlisted = if listed { None } else { known(ID, Phase::Running)? };
        Ok(Response::new(CompareSandboxesResponse {
            unlisted: unlisted.into_iter().collect(),
            missing: known_ids.into_iter().filter(|id| id != ID).collect(),
            complete: true,
        }))
    }

    type StreamExecStream = ReceiverStream<Result<StreamExecResponse, Status>>;

    async fn stream_exec(&self, _: Request<StreamExecRequest>) -> Answer<Self::StreamExecStream> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn write_exec_stdin(
        &self,
        request: Request<WriteExecStdinRequest>,
    ) -> Answer<WriteExecStdinResponse> {
        let request = request.into_inner();
        let session = self.0.sessions.get(&request.exec_id)?;
        session.input(exec_request::Message::StdinEof(request.eof));
        Ok(Response::new(WriteExecStdinResponse { offset: request.offset }))
    }

    async fn resize_exec(&self, _: Request<ResizeExecRequest>) -> Answer<ResizeExecResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn signal_exec(&self, request: Request<SignalExecRequest>) -> Answer<SignalExecResponse> {
        let request = request.into_inner();
        self.0.sessions.get(&request.exec_id)?.signal(request.signal);
        Ok(Response::new(SignalExecResponse {}))
    }

    async fn list_execs(&self, request: Request<ListExecsRequest>) -> Answer<ListExecsResponse> {
        known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(ListExecsResponse { execs: self.0.sessions.list(), ..Default::default() }))
    }

    async fn write_files(&self, _: Request<WriteFilesRequest>) -> Answer<WriteFilesResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    type ReadFileStream = ReceiverStream<Result<ReadFileResponse, Status>>;

    async fn read_file(&self, _: Request<ReadFileRequest>) -> Answer<Self::ReadFileStream> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Answer<StatFileResponse> {
        let file = self.0.files.stat(&request.into_inner().path)?;
        Ok(Response::new(StatFileResponse { file: Some(file) }))
    }

    async fn list_dir(&self, _: Request<ListDirRequest>) -> Answer<ListDirResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn remove_file(&self, _: Request<RemoveFileRequest>) -> Answer<RemoveFileResponse> {
        Err(Status::unimplemented("sandboxctl does not call this here"))
    }

    async fn upload_archive(
        &self,
        request: Request<Streaming<UploadArchiveRequest>>,
    ) -> Answer<UploadArchiveResponse> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|request| request.message);
        let Some(upload_archive_request::Message::Start(start)) = first else {
            panic!("no start: {first:?}")
        };
        known(&start.id, Phase::Running)?;
        let mut archive = Vec::new();
        while let Some(message) = messages.message().await? {
            match message.message {
                Some(upload_archive_request::Message::Data(bytes)) => archive.extend(bytes),
                other => panic!("not data: {other:?}"),
            }
        }
        let entries = self.0.files.unpack(&start, &archive)?;
        Ok(Response::new(UploadArchiveResponse { entries }))
    }

    type DownloadArchiveStream = Streamed<DownloadArchiveResponse>;

    async fn download_archive(
        &self,
        request: Request<DownloadArchiveRequest>,
    ) -> Answer<Self::DownloadArchiveStream> {
        let mut archive = self.0.files.pack(&request.into_inner().path)?;
        if self.0.archives_stall {
            archive.truncate(archive.len() / 2);
        }
        let pieces: Vec<_> = archive
            .chunks(1000)
            .map(|part| Ok(DownloadArchiveResponse { data: part.to_vec().into() }))
            .collect();
        let pieces = tokio_stream::iter(pieces);
        Ok(Response::new(match self.0.archives_stall {
            true => Box::pin(pieces.chain(tokio_stream::pending())),
            false => Box::pin(pieces),
        }))
    }

    /// Reports half a core of usage since the reading before.
    async fn get_usage(&self, _: Request<GetUsageRequest>) -> Answer<GetUsageResponse> {
        let readings = u64::from(self.0.readings.fetch_add(1, Ordering::SeqCst));
        let usage = Usage {
            id: ID.into(),
            cpu_us: readings * 500_000,
            at_ns: readings * 1_000_000_000,
            memory_bytes: 64 << 20,
            memory_max_bytes: 512 << 20,
            pids: 3,
            psi_cpu: 1.5,
            ..Usage::default()
        };
        Ok(Response::new(GetUsageResponse { usages: vec![usage], ..Default::default() }))
    }

    type ForwardStream = Streamed<ForwardResponse>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Answer<Self::ForwardStream> {
        let messages = crate::forward::serve(&self.0.listeners, request.into_inner()).await?;
        Ok(Response::new(Box::pin(messages)))
    }

    type ForwardListenStream = Streamed<ForwardListenResponse>;

    async fn forward_listen(
        &self,
        request: Request<ForwardListenRequest>,
    ) -> Answer<Self::ForwardListenStream> {
        known(&request.into_inner().id, Phase::Running)?;
        Ok(Response::new(Box::pin(crate::forward::listen(&self.0.listeners))))
    }

    async fn list_ports(&self, request: Request<ListPortsRequest>) -> Answer<ListPortsResponse> {
        known(&request.into_inner().id, Phase::Running)?;
        let url = "http://port-8080.sandbox.localhost".to_owned();
        let web = HttpService {
            name: "web".into(),
            port: 8080,
            url,
            visibility: Visibility::Public.into(),
            ..HttpService::default()
        };
        let port = |port, address: &str, services| ListeningPort {
            port,
            address: address.into(),
            services,
        };
        let ports = vec![port(22, "127.0.0.1", Vec::new()), port(8080, "0.0.0.0", vec![web])];
        Ok(Response::new(ListPortsResponse { ports }))
    }

    async fn expose_http_service(
        &self,
        request: Request<ExposeHttpServiceRequest>,
    ) -> Answer<ExposeHttpServiceResponse> {
        let ExposeHttpServiceRequest { id, name, port, visibility } = request.into_inner();
        known(&id, Phase::Running)?;
        let url = format!("http://port-{port}-{id}.sandbox.localhost");
        let name = if name.is_empty() { format!("port-{port}") } else { name };
        Ok(Response::new(ExposeHttpServiceResponse {
            service: Some(HttpService {
                name,
                port,
                url,
                visibility: visibility.max(1),
                ..HttpService::default()
            }),
        }))
    }

    async fn hide_http_service(
        &self,
        request: Request<HideHttpServiceRequest>,
    ) -> Answer<HideHttpServiceResponse> {
        let HideHttpServiceRequest { id, name } = request.into_inner();
        if name != "web" {
            return Err(refuse(Reason::ServiceNotFound));
        }
        let sandbox = known(&id, Phase::Running)?;
        let named =
            |name: &str| HttpService { name: name.into(), port: 8080, ..HttpService::default() };
        let closed = vec![named("web"), named("www")];
        Ok(Response::new(HideHttpServiceResponse { sandbox, closed }))
    }

    async fn create_access_link(
        &self,
        request: Request<CreateAccessLinkRequest>,
    ) -> Answer<CreateAccessLinkResponse> {
        let CreateAccessLinkRequest { id, service, kind, ttl: _ } = request.into_inner();
        known(&id, Phase::Running)?;
        if service != "8080" {
            return Err(refuse(Reason::ServiceNotFound));
        }
        let (parameter, credential) = match AccessKind::try_from(kind) {
            Ok(AccessKind::Token) => ("sbx_token", "sbxt1_x"),
            _ => ("sbx_link", "sbxl1_x"),
        };
        Ok(Response::new(CreateAccessLinkResponse {
            url: format!("http://port-8080-{id}.sandbox.localhost/?{parameter}={credential}"),
            credential: credential.into(),
            kind,
            expires_at: None,
            port: 8080,
        }))
    }

    async fn revoke_access(
        &self,
        request: Request<RevokeAccessRequest>,
    ) -> Answer<RevokeAccessResponse> {
        let RevokeAccessRequest { id, service } = request.into_inner();
        if service != "8080" {
            return Err(refuse(Reason::ServiceNotFound));
        }
        Ok(Response::new(RevokeAccessResponse { sandbox: known(&id, Phase::Running)?, port: 8080 }))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Answer<ListSnapshotsResponse> {
        let snapshot = |id: &&str| Snapshot {
            id: (*id).to_owned(),
            size: Some(Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 }),
            nodes: vec!["node1".into(), "node2".into()],
            services: vec![HttpService {
                name: "vscode".into(),
                port: 39_378,
                visibility: Visibility::Team.into(),
                ..HttpService::default()
            }],
            expose_on_listen: *id == "listening",
            differing_nodes: if *id == "uneven" { vec!["node2".into()] } else { Vec::new() },
        };
        let snapshots = self.0.snapshots.iter().map(snapshot).collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots }))
    }

    async fn explain_placement(
        &self,
        _: Request<ExplainPlacementRequest>,
    ) -> Answer<ExplainPlacementResponse> {
        let fits = NodeVerdict {
            node: "node2".into(),
            score: 0.25,
            parts: vec![
                ScorePart { kind: ScorePartKind::Cpu.into(), value: 0.125 },
                ScorePart { kind: ScorePartKind::Memory.into(), value: 0.125 },
            ],
            ..NodeVerdict::default()
        };
        let out = NodeVerdict {
            node: "node1".into(),
            filtered: Filtered::MemorySum.into(),
            detail: "512 MiB wanted, 100 MiB left".into(),
            ..NodeVerdict::default()
        };
        let decision = PlacementDecision {
            node: "node2".into(),
            decided_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            nodes: vec![fits, out],
            attempt: 1,
            holders: 2,
        };
        Ok(Response::new(ExplainPlacementResponse { decision: Some(decision) }))
    }
}
