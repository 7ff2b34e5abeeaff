//! The callers: their requests, the answers, and what they conclude from these.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use proto::{
    Reason,
    sandbox::v1::{
        CreateSandboxRequest, DeleteSandboxRequest, ExecCommandRequest, ExecStart, ExpiryAction,
        Lifetime, PauseSandboxRequest, Phase, ResumeSandboxRequest, Sandbox, Size,
        StartSandboxRequest, StopSandboxRequest, exec_start,
        sandbox_service_client::SandboxServiceClient,
    },
};
use tokio::time::Instant;
use tonic::{Request, Status, metadata::MetadataValue};

use crate::{
    access::Access,
    cluster::{Cluster, SNAPSHOT},
    lives::Life,
    watch::Watch,
};

/// Prefix of request_ids whose sandboxes delete themselves.
pub(crate) const MORTAL: &str = "mortal";
/// Time to live of these sandboxes.
pub(crate) const TTL: Duration = Duration::from_secs(90);
/// Time to live after an extension: longer than the story.
const EXTENDED: Duration = Duration::from_secs(24 * 3600);

/// Operation of a caller on a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Delete,
    Stop,
    Start,
    Pause,
    PauseOrStop,
    Resume,
    Exec,
    Extend,
    Grow,
    Shrink,
}

/// Knowledge of the caller about one request_id.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// Time of the first request.
    pub(crate) since: Instant,
    /// Id of the sandbox, from an answer.
    pub(crate) id: Option<String>,
    /// Whether an answer said that the sandbox runs.
    pub(crate) acked: bool,
    /// Set once a deletion was requested; true once it was answered.
    pub(crate) deleted: Option<bool>,
    /// Set once an extension was requested; true once it was answered.
    pub(crate) extended: Option<bool>,
    /// Whether an answer said that the sandbox is paused, with no request since.
    pub(crate) paused: bool,
    /// Bounds of who reaches it, and of what it reaches.
    pub(crate) access: Access,
    /// Number of calls in progress.
    pub(crate) calls: u64,
    /// Whether a call had no answer: it may be carried out at any time.
    murky: bool,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            id: None,
            acked: false,
            deleted: None,
            extended: None,
            paused: false,
            access: Access::default(),
            calls: 0,
            murky: false,
        }
    }
}

impl Known {
    /// Returns whether the sandbox is paused and no request can have changed that.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused && !self.murky && self.deleted.is_none()
    }

    /// Records a power cut of a node: nothing is paused there any more, and an answer that is still
    /// in transit describes the time before.
    pub(crate) fn shaken(&mut self) {
        self.paused = false;
        self.murky |= self.calls > 0;
    }

    /// Returns whether a call had no answer.
    pub(crate) fn is_murky(&self) -> bool {
        self.murky
    }

    pub(crate) fn asked(&mut self, verb: Verb) {
        self.paused = false;
        match verb {
            Verb::Delete => self.deleted = Some(false),
            Verb::Extend => self.extended = self.extended.or(Some(false)),
            Verb::Stop
            | Verb::Start
            | Verb::Pause
            | Verb::PauseOrStop
            | Verb::Resume
            | Verb::Grow
            | Verb::Shrink
            | Verb::Exec => {}
        }
    }
}

/// Knowledge of all callers, by request_id.
pub(crate) type Memory = BTreeMap<String, Known>;

/// Returns the sandboxes that their callers know to have started and have not deleted.
pub(crate) fn acked(memory: &Memory) -> Vec<(String, String)> {
    let known = memory.iter().filter(|(_, k)| k.acked && k.deleted.is_none());
    known.filter_map(|(key, k)| Some((key.clone(), k.id.clone()?))).collect()
}

/// Result of a call.
pub(crate) struct Done {
    pub(crate) key: String,
    pub(crate) came_to: CameTo,
}

pub(crate) enum CameTo {
    Created {
        id: String,
        running: bool,
    },
    Deleted,
    Paused,
    Extended,
    Changed,
    /// The call was not carried out, and will not be.
    Refused,
    /// The call may still be carried out.
    Unknown,
}

impl Known {
    /// Records the result of a call.
    pub(crate) fn note(&mut self, key: &str, came_to: CameTo) {
        self.calls -= 1;
        match came_to {
            CameTo::Created { id, running } => {
                // I4: one sandbox per request_id, however often it is requested. Another sandbox
                // may follow a failed attempt, but never an acked one.
                if let Some(before) = self.id.as_ref().filter(|_| self.acked) {
                    assert_eq!(before, &id, "I4: {key} is two sandboxes");
                }
                self.acked |= running;
                self.id = Some(id);
            }
            CameTo::Deleted => self.deleted = Some(true),
            // Another call in progress may undo the pause.
            CameTo::Paused => self.paused = self.calls == 0,
            CameTo::Extended => self.extended = Some(true),
            CameTo::Changed | CameTo::Refused => {}
            CameTo::Unknown => self.murky = true,
        }
    }
}

type Api = SandboxServiceClient<tonic::transport::Channel>;

pub(crate) fn authorised<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer {token}")).expect("ascii");
    request.metadata_mut().insert("authorization", value);
    request.set_timeout(Duration::from_secs(60));
    request
}

/// A caller's connection to one controller.
pub(crate) struct Line {
    pub(crate) api: Api,
    token: String,
    pub(crate) watch: Arc<Watch>,
    /// Number of the controller, if it was replaced before this call.
    replaced: Option<u64>,
}

impl Line {
    pub(crate) fn to(cluster: &Cluster, life: &Life) -> Self {
        Self {
            api: Api::new(life.channel()),
            token: cluster.token.clone(),
            watch: cluster.watch.clone(),
            replaced: life.replaced.then_some(life.number),
        }
    }

    /// Connects as another team, which has no sandbox.
    pub(crate) fn of_another_team(cluster: &Cluster, life: &Life) -> Self {
        Self { token: cluster.other_token.clone(), ..Self::to(cluster, life) }
    }

    pub(crate) fn ask<T>(&self, message: T) -> Request<T> {
        authorised(&self.token, message)
    }

    /// Checks I10: a controller that was replaced before the call changes nothing.
    pub(crate) fn obeyed(&self, what: &str) {
        if let Some(number) = self.replaced {
            self.watch.wrong(format!("I10: controller {number} was replaced, and {what}"));
        }
    }

    /// Converts an error to the result of a call.
    pub(crate) fn refused(&self, status: &Status) -> CameTo {
        match daemon::status::reason(status) {
            Some(Reason::Invariant) => {
                self.watch.wrong(format!("I9: a caller was told INVARIANT: {}", status.message()));
                CameTo::Unknown
            }
            Some(why) if why == Reason::StaleEpoch && self.replaced.is_some() => CameTo::Refused,
            Some(_) | None => CameTo::Unknown,
        }
    }
}

/// Creates a sandbox. `new`: no earlier request used this key.
pub(crate) fn create(
    cluster: &Cluster,
    life: &Life,
    key: String,
    new: bool,
) -> impl Future<Output = Done> + Send + use<> {
    let mut line = Line::to(cluster, life);
    async move {
        let request = line.ask(CreateSandboxRequest {
            request_id: key.clone(),
            snapshot_id: SNAPSHOT.into(),
            // Some get a larger disk, which adds a step.
            size: key.ends_with(['3', '7']).then(|| Size { disk_gib: 4, ..Size::default() }),
            lifetime: key.starts_with(MORTAL).then(|| lives_for(TTL)),
            ..CreateSandboxRequest::default()
        });
        let came_to = match line.api.create_sandbox(request).await {
            Ok(answer) => {
                let sandbox = answer.into_inner().sandbox.expect("a sandbox");
                let running = sandbox.phase() == Phase::Running;
                if new && running {
                    line.obeyed(&format!("made {} for {key}", sandbox.id));
                }
                CameTo::Created { id: sandbox.id, running }
            }
            Err(status) => line.refused(&status),
        };
        Done { key, came_to }
    }
}

fn lives_for(ttl: Duration) -> Lifetime {
    Lifetime {
        ttl: prost_types::Duration::try_from(ttl).ok(),
        ttl_action: ExpiryAction::Delete.into(),
        ..Lifetime::default()
    }
}

pub(crate) fn change(
    cluster: &Cluster,
    life: &Life,
    key: String,
    id: String,
    verb: Verb,
) -> impl Future<Output = Done> + Send + use<> {
    let line = Line::to(cluster, life);
    async move {
        let came_to = match changed(&line, id, verb).await {
            Err(status) => line.refused(&status),
            Ok(sandbox) => {
                // Any controller may answer that a deleted sandbox is gone, and commands have no
                // epoch.
                if !matches!(verb, Verb::Delete | Verb::Exec) {
                    line.obeyed(&format!("did {verb:?} to {key}"));
                }
                match (verb, sandbox.map(|sandbox| sandbox.phase())) {
                    (Verb::Delete, Some(Phase::Deleted)) => CameTo::Deleted,
                    (Verb::Pause | Verb::PauseOrStop, Some(Phase::Paused)) => CameTo::Paused,
                    (Verb::Extend, Some(_)) => CameTo::Extended,
                    _ => CameTo::Changed,
                }
            }
        };
        Done { key, came_to }
    }
}

async fn changed(line: &Line, id: String, verb: Verb) -> Result<Option<Sandbox>, Status> {
    let mut api = line.api.clone();
    Ok(match verb {
        Verb::Delete => {
            api.delete_sandbox(line.ask(DeleteSandboxRequest { id })).await?.into_inner().sandbox
        }
        Verb::Pause | Verb::PauseOrStop => {
            let request = PauseSandboxRequest { id, or_stop: verb == Verb::PauseOrStop };
            api.pause_sandbox(line.ask(request)).await?.into_inner().sandbox
        }
        Verb::Resume => {
            api.resume_sandbox(line.ask(ResumeSandboxRequest { id })).await?.into_inner().sandbox
        }
        Verb::Stop => {
            api.stop_sandbox(line.ask(StopSandboxRequest { id, grace: None }))
                .await?
                .into_inner()
                .sandbox
        }
        Verb::Start => {
            api.start_sandbox(line.ask(StartSandboxRequest { id })).await?.into_inner().sandbox
        }
        Verb::Extend => {
            let lifetime = Some(lives_for(EXTENDED));
            let change = Sandbox { id, lifetime, ..Sandbox::default() };
            let fields = ["lifetime.ttl", "lifetime.ttl_action"];
            let request = proto::update::request(change, &fields);
            api.update_sandbox(line.ask(request)).await?.into_inner().sandbox
        }
        Verb::Grow | Verb::Shrink => {
            let (cpu_cores, memory_mib, disk_gib) =
                if verb == Verb::Grow { (3, 2048, 9) } else { (1, 320, 0) };
            let size = Some(Size { cpu_cores, memory_mib, disk_gib });
            let change = Sandbox { id, size, ..Sandbox::default() };
            let request = proto::update::request(change, &["size"]);
            api.update_sandbox(line.ask(request)).await?.into_inner().sandbox
        }
        Verb::Exec => {
            let number = line.watch.command();
            let command = exec_start::Command::Shell(format!("run {number}"));
            let start = ExecStart { id, command: Some(command), ..ExecStart::default() };
            let request = ExecCommandRequest { start: Some(start), ..Default::default() };
            let ran = api.exec_command(line.ask(request)).await;
            let reason = ran.as_ref().err().and_then(daemon::status::reason);
            let may_run = [Reason::OutcomeUnknown, Reason::ExecLost];
            if let Some(reason) = reason.filter(|reason| !may_run.contains(reason)) {
                line.watch.denied(number, reason);
            }
            ran?;
            None
        }
    })
}
