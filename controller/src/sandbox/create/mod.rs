//! Accepts a creation: checks the request, picks a node, records that, and only then lets a task of
//! its own (`creation`) call the node. The caller waits for that task, and may leave.

mod creation;
mod first_files;
mod place;
mod team_slots;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use data_encoding::HEXLOWER;
use prost::Message;
use proto::{
    Progress, Reason,
    id::{Invalid, SandboxId},
    name::Preset,
    sandbox::v1::{CreateSandboxRequest, EventKind, HttpService, Phase, Sandbox},
    spec::{Egress, Size, Spec},
    time::timestamp,
};
use sha2::{Digest, Sha256};
use tokio::{sync::oneshot, time::Instant};

use self::team_slots::TeamSlot;
pub(super) use self::{creation::Creation, first_files::WRITERS, team_slots::TeamSlots};
use super::{Caller, Error, RETRY, Result, Sandboxes, WAIT_MAX, names::taken, quota::Creator};
use crate::{
    node::{CreateOrder, registry::AttemptHistory},
    sandbox::read::explain,
    store::{Begun, Event, Row, State},
};

/// Longest wait before the answer, whatever wait the caller asked for.
const ANSWER: Duration = Duration::from_secs(19);

/// Result of accepting a request, before any node has received it.
enum Accepted {
    /// A creation that is new.
    New(SandboxId),
    /// The row of an earlier request with the same request_id.
    Taken(Box<Row>),
    /// The sandbox that has the name already.
    Named(SandboxId),
}

/// A checked creation request.
struct Checked {
    caller: Caller,
    request: CreateSandboxRequest,
    spec: Spec,
    digest: String,
    /// Files to write, encoded.
    files: Option<Vec<u8>>,
    /// Whether a sandbox that has the name already is the result.
    or_get: bool,
}

impl Sandboxes {
    /// Creates a sandbox. The same team, request_id and body give the same sandbox. Answers when it
    /// runs or has failed, or with CREATING when the wait ends earlier.
    ///
    /// # Errors
    /// When the request is wrong, no node can take it, or the creation failed within the wait.
    pub async fn create(
        self: &Arc<Self>,
        caller: &Caller,
        request: CreateSandboxRequest,
    ) -> Result<Sandbox> {
        self.create_or(caller, request, false).await
    }

    /// Creates a sandbox as `create` does, or returns the one that has its name already.
    ///
    /// # Errors
    /// As `create`; NAME_TAKEN when the one that has the name was created in another way.
    pub async fn get_or_create(
        self: &Arc<Self>,
        caller: &Caller,
        request: CreateSandboxRequest,
    ) -> Result<Sandbox> {
        if request.name.is_empty() {
            return Err(Invalid::new("create.name", "must be given").into());
        }
        self.create_or(caller, request, true).await
    }

    async fn create_or(
        self: &Arc<Self>,
        caller: &Caller,
        mut request: CreateSandboxRequest,
        or_get: bool,
    ) -> Result<Sandbox> {
        let spec = check(&request)?;
        let deadline = Instant::now() + wait(request.wait.as_ref())?.min(ANSWER);
        let digest_of_it = digest(&request);
        let files = first_files::take(&mut request)?;
        let mut checked =
            Checked { caller: caller.clone(), digest: digest_of_it, request, spec, files, or_get };
        if let Some(row) = self.store.by_request(&caller.team, &checked.spec.request_id).await? {
            return self.replay(&row, &checked.digest, deadline).await;
        }
        if self.nodes.epoch.behind() {
            self.all_synced().await?;
            let row = self.store.by_request(&caller.team, &checked.spec.request_id).await?;
            if let Some(row) = row {
                return self.replay(&row, &checked.digest, deadline).await;
            }
        }
        let checked = Checked { spec: self.sized(&mut checked.request)?, ..checked };
        self.may_change()?;
        let slot = self.creates.take(&caller.team).ok_or_else(|| {
            let message = "too many creations of this team, or of all teams, are under way";
            Error::new(Reason::TooManyCalls, message).retry(RETRY)
        })?;
        // A separate task from here: if the caller's hang-up dropped this between the record and
        // the task that carries it out, nobody would make the recorded creation.
        let digest = checked.digest.clone();
        let (answer, accepted) = oneshot::channel();
        let (this, stop) = (self.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let work = Box::pin(this.accept_and_make(checked, slot, answer));
            stop.run_until_cancelled_owned(work).await;
        });
        match accepted.await {
            Ok(Ok(Accepted::New(id))) => self.settled(&id, deadline).await,
            Ok(Ok(Accepted::Taken(row))) => self.replay(&row, &digest, deadline).await,
            Ok(Ok(Accepted::Named(id))) => self.settled(&id, deadline).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(super::stopping()),
        }
    }

    /// Returns `Ok` when the store contains all that the nodes have. With a lost or old store, an
    /// unknown request_id may belong to a sandbox on a node whose inventory has not arrived yet.
    async fn all_synced(&self) -> Result<()> {
        if let Some(node) = self.nodes.unsynced() {
            let message = format!(
                "the controller's store knows less than its nodes do, and node {node} was not heard \
                 yet: what is asked for may be there"
            );
            return Err(Error::new(Reason::NodeUnreachable, message).retry(RETRY));
        }
        Ok(self.log().flushed().await?)
    }

    async fn accept_and_make(
        self: Arc<Self>,
        checked: Checked,
        slot: TeamSlot,
        answer: oneshot::Sender<Result<Accepted>>,
    ) {
        let (accepted, creation) = match self.accept(checked).await {
            Ok((accepted, creation)) => (Ok(accepted), creation),
            Err(error) => (Err(error), None),
        };
        // The caller may have gone; an accepted creation is made all the same.
        drop(answer.send(accepted));
        if let Some(creation) = creation {
            self.make(creation).await;
        }
        drop(slot);
    }

    /// Places and records a creation. The returned creation does the rest.
    async fn accept(&self, checked: Checked) -> Result<(Accepted, Option<Creation>)> {
        // Held until the creation is recorded: of several calls with one request_id one is admitted.
        let _request = self.lock_request(&checked.caller.team, &checked.spec.request_id).await;
        // Held until the cache has the new sandbox: nobody else takes the name meanwhile.
        let name = match &checked.spec.name {
            Some(name) => Some(self.lock_name(&checked.caller.team, name).await),
            None => None,
        };
        if let Some(accepted) = self.named_already(&checked).await? {
            return Ok((accepted, None));
        }
        let Checked { caller, mut request, mut spec, digest, files, or_get: _ } = checked;
        let Caller { team, token, user, scopes: _, permit: _ } = caller;
        // What is repeated does not count again, also where the first call is a moment older.
        if self.quotas.is_limited(&team)
            && let Some(row) = self.store.by_request(&team, &spec.request_id).await?
        {
            return Ok((Accepted::Taken(Box::new(row)), None));
        }
        self.options.exposure.complete(&mut request, &mut spec)?;
        let egress = self.egress(&team, spec.egress)?;
        request.set_egress((&egress).into());
        (request.egress_names, spec.egress) = (egress.names(), Some(egress));
        let has_files = files.is_some();
        let created_ms = self.clock.now_ms();
        let id = self.new_id(created_ms);
        let size = spec.size.or(self.nodes.default_size(&spec.snapshot));
        let creator = Creator { team: &team, user: user.as_ref(), at_ms: created_ms };
        let admitted = self.quotas.admit_creation(&self.nodes.cache, creator, (id, size))?;
        let decision = self.place(id, &team, &spec, 1, &AttemptHistory::default()).await;
        if decision.node().is_none()
            && let Some(error) = self.reason_not_to_wait(&decision, &spec)
        {
            return Err(error);
        }
        let node = decision.node().cloned();
        let attempt = u32::from(node.is_some());
        let mut row = Row {
            id,
            team: team.clone(),
            user: user.clone(),
            request_id: spec.request_id.clone(),
            digest: digest.clone(),
            request: request.encode_to_vec().into(),
            state: State::Placing,
            node: node.clone(),
            attempt,
            decision: explain::encode(&decision),
            cancelled: false,
            released: false,
            created_ms,
            ended_ms: 0,
            last: Vec::new(),
        };
        // Cores and memory of the snapshot count towards the limits of the team, so the placeholder has them. A disk
        // that was not asked for stays 0: the inventory counts the disk of the snapshot for it.
        let counted = Size { disk_gib: spec.size.disk_gib, ..size };
        let placeholder = Sandbox { size: Some(counted.into()), ..placeholder(&row, &request) };
        row.last = placeholder.encode_to_vec();
        let by = user.as_ref().map(|user| format!(", by {user}")).unwrap_or_default();
        let asked = Event {
            sandbox: Some(id),
            team: Some(team.clone()),
            node: node.clone(),
            detail: format!("from {}{by}", spec.snapshot),
            ..self.log().event(EventKind::CreateAsked, &token)
        };
        let begun =
            self.store.begin(row, files, asked).await.inspect_err(|_| self.nodes.release(&id))?;
        match begun {
            Begun::Full => {
                self.nodes.release(&id);
                let message = "creations under way bring too many files already";
                return Err(Error::new(Reason::TooManyCalls, message).retry(RETRY));
            }
            Begun::New(revision) => self.log().reached(revision),
            Begun::Taken(row) => {
                self.nodes.release(&id);
                return Ok((Accepted::Taken(row), None));
            }
        }
        self.log().ask(id, &[EventKind::Created], &token);
        tracing::info!(sandbox_id = %id, %team, request_id = %spec.request_id,
            node = node.as_ref().map(tracing::field::display), "creation accepted");
        self.nodes.cache.begin(id, team.clone(), placeholder);
        admitted.made();
        drop(name);
        let (team_name, port_rules) = (team.to_string(), self.options.exposure.port_rules());
        let order = CreateOrder { id, team: team_name, attempt, digest, request, port_rules };
        let creation = Creation::new(order, team, Ok(spec), node).with_files(has_files);
        self.creations.lock().insert(id, creation.cancel.clone());
        Ok((Accepted::New(id), Some(creation)))
    }

    /// Looks whether a living sandbox has the name of a creation; if so, returns the answer.
    ///
    /// # Errors
    /// NAME_TAKEN when that sandbox is not the result of this request, or of one like it.
    async fn named_already(&self, checked: &Checked) -> Result<Option<Accepted>> {
        let Checked { caller, request, spec, or_get, .. } = checked;
        let Some(name) = &spec.name else { return Ok(None) };
        let named = self.nodes.cache.named(&caller.team, name);
        let Some(id) = named.first().copied() else { return Ok(None) };
        let row = self.store.get(&id).await?.map(Box::new);
        if let Some(row) = row.as_ref().filter(|row| row.request_id == spec.request_id) {
            return Ok(Some(Accepted::Taken(row.clone())));
        }
        if !or_get || named.len() > 1 {
            return Err(taken(name, &id, "give another name, or use that one"));
        }
        if self.view(&id).is_some_and(|sandbox| sandbox.phase() == Phase::Deleting) {
            return Err(taken(name, &id, "and is being deleted: try again").retry(RETRY));
        }
        let known = row.and_then(|row| CreateSandboxRequest::decode(row.request.as_slice()).ok());
        let differ = match known.filter(|known| !known.request_id.is_empty()) {
            Some(known) => Some(differences(&known, request)),
            // Its row was rebuilt from its node.
            None => self.view(&id).map(|sandbox| known_differences(&sandbox, request)),
        };
        match differ {
            Some(fields) if !fields.is_empty() => {
                let what = format!("it was created with another {}", fields.join(", "));
                Err(taken(name, &id, &what))
            }
            Some(_) | None => Ok(Some(Accepted::Named(id))),
        }
    }

    /// Answers a repeated request.
    async fn replay(&self, row: &Row, digest: &str, deadline: Instant) -> Result<Sandbox> {
        // A row that was rebuilt from a node has no digest to compare.
        if !row.digest.is_empty() && row.digest != digest {
            let message = format!(
                "request_id {} was used with another body for {}; use a new one",
                row.request_id, row.id
            );
            let mut error = Error::new(Reason::RequestIdReused, message);
            error.sandbox_id = Some(row.id.to_string());
            return Err(error);
        }
        self.settled(&row.id, deadline).await
    }

    /// Waits until a creation is over, at most until `deadline`.
    async fn settled(&self, id: &SandboxId, deadline: Instant) -> Result<Sandbox> {
        let mut changes = self.nodes.cache.watch(*id);
        loop {
            changes.mark_unchanged();
            let name = proto::id::SandboxRef::Id(*id);
            let Some(entry) = self.nodes.cache.get(&name) else {
                self.may_change()?;
                let message = format!("{id} is made by another controller; ask again");
                return Err(Error::new(Reason::OutcomeUnknown, message).retry(RETRY));
            };
            if !entry.creating {
                return outcome(self.nodes.cache.view(&entry));
            }
            let changed = tokio::select! {
                changed = tokio::time::timeout_at(deadline, changes.changed()) => changed.is_ok(),
                // The controller in charge continues the creation.
                () = self.nodes.epoch.replaced() => return Err(super::replaced()),
                () = self.stop.cancelled() => false,
            };
            if !changed {
                return Ok(self.nodes.cache.view(&entry));
            }
        }
    }

    /// Replaces the name of a preset by its size. Not before the digest: a retry sends the name.
    pub(super) fn sized(&self, request: &mut CreateSandboxRequest) -> Result<Spec, Invalid> {
        if !request.size_preset.is_empty() {
            let name: Preset = std::mem::take(&mut request.size_preset).parse()?;
            let preset = self.options.sizes.get(&name).ok_or_else(|| {
                let known: Vec<_> = self.options.sizes.keys().map(Preset::as_str).collect();
                let why = format!("must be one of the controller's: {}", known.join(", "));
                Invalid::new("size_preset", why)
            })?;
            let asked = Size::from(request.size.unwrap_or_default());
            request.size = Some(asked.or(*preset).into());
        }
        check(request)
    }

    pub(super) fn new_id(&self, now_ms: u64) -> SandboxId {
        let mut random = [0; 10];
        self.random.fill(&mut random);
        SandboxId::new(now_ms, &random)
    }
}

/// Returns the fields in which two requests for a sandbox differ, those of a repetition apart.
fn differences(one: &CreateSandboxRequest, other: &CreateSandboxRequest) -> Vec<&'static str> {
    let fields = [
        ("snapshot_id", one.snapshot_id != other.snapshot_id),
        ("size", one.size.unwrap_or_default() != other.size.unwrap_or_default()),
        ("metadata", one.metadata != other.metadata),
        ("env", one.env != other.env),
        ("network", one.network != other.network),
        ("services", exposes_otherwise(&one.services, &other.services)),
        ("no_default_services", one.no_default_services != other.no_default_services),
        ("expose_on_listen", one.expose_on_listen != other.expose_on_listen),
        ("egress", reaches_otherwise((one.egress, &one.egress_names), other)),
        ("node", one.node != other.node),
        ("lifetime", one.lifetime.unwrap_or_default() != other.lifetime.unwrap_or_default()),
        (
            "placement",
            one.placement.clone().unwrap_or_default()
                != other.placement.clone().unwrap_or_default(),
        ),
    ];
    fields.into_iter().filter(|(_, differ)| *differ).map(|(field, _)| field).collect()
}

/// Returns the fields in which a sandbox differs from a request, as far as the sandbox shows them.
fn known_differences(sandbox: &Sandbox, request: &CreateSandboxRequest) -> Vec<&'static str> {
    let (has, wants) = (
        Size::from(sandbox.size.unwrap_or_default()),
        Size::from(request.size.unwrap_or_default()),
    );
    let fields = [
        ("snapshot_id", sandbox.snapshot_id != request.snapshot_id),
        ("size", wants.or(has) != has),
        ("metadata", sandbox.metadata != request.metadata),
        ("egress", reaches_otherwise((sandbox.egress, &sandbox.egress_names), request)),
        ("node", !request.node.is_empty() && sandbox.node != request.node),
    ];
    fields.into_iter().filter(|(_, differ)| *differ).map(|(field, _)| field).collect()
}

/// Returns true when a request asks for other ports than a sandbox was created with, or for others to reach them.
/// Older ones had public ports alone.
fn exposes_otherwise(has: &[HttpService], wants: &[HttpService]) -> bool {
    let differ = |(has, wants): (&HttpService, &HttpService)| {
        let reach = wants.visibility != 0 && wants.visibility().word() != has.visibility().word();
        reach || (&has.name, has.port) != (&wants.name, wants.port)
    };
    has.len() != wants.len() || has.iter().zip(wants).any(differ)
}

/// Returns true when a request asks for an egress that a sandbox was not created with. Older
/// sandboxes have OPEN.
fn reaches_otherwise((has, names): (i32, &[String]), wants: &CreateSandboxRequest) -> bool {
    let has = Egress::read(has, names, "egress").map(Option::unwrap_or_default);
    match Egress::read(wants.egress, &wants.egress_names, "egress") {
        Ok(None) => false,
        Ok(Some(wants)) => has != Ok(wants),
        Err(_) => true,
    }
}

/// Turns a creation's result into an answer: its failure is an error, the sandbox's later life not.
fn outcome(sandbox: Sandbox) -> Result<Sandbox> {
    let Some(failure) = &sandbox.failure else { return Ok(sandbox) };
    let cancelled = failure.reason() == Reason::CreateCancelled;
    match sandbox.phase() {
        Phase::Failed => Err(Error::from_failure(&sandbox, failure)),
        Phase::Deleted if cancelled => Err(Error::from_failure(&sandbox, failure)),
        Phase::Unspecified
        | Phase::Creating
        | Phase::Running
        | Phase::Paused
        | Phase::Starting
        | Phase::Stopping
        | Phase::Stopped
        | Phase::Deleting
        | Phase::Deleted
        | Phase::Unreachable => Ok(sandbox),
    }
}

/// Builds the sandbox that callers see before any node has it.
pub(super) fn placeholder(row: &Row, request: &CreateSandboxRequest) -> Sandbox {
    let mut sandbox = Sandbox {
        id: row.id.to_string(),
        node: row.node.as_ref().map(ToString::to_string).unwrap_or_default(),
        team: row.team.to_string(),
        snapshot_id: request.snapshot_id.clone(),
        size: request.size,
        egress: request.egress,
        egress_names: request.egress_names.clone(),
        metadata: request.metadata.clone(),
        created_at: Some(timestamp(row.created_ms)),
        attempt: row.attempt,
        request_id: row.request_id.to_string(),
        name: request.name.clone(),
        progress: if row.node.is_some() { Progress::Placing } else { Progress::Queued }.into(),
        ..Sandbox::default()
    };
    sandbox.set_phase(Phase::Creating);
    sandbox
}

/// Returns the request of a sandbox, as far as the sandbox shows it.
pub(super) fn shown(sandbox: Sandbox) -> CreateSandboxRequest {
    CreateSandboxRequest {
        name: sandbox.name,
        snapshot_id: sandbox.snapshot_id,
        size: sandbox.size,
        egress: sandbox.egress,
        egress_names: sandbox.egress_names,
        metadata: sandbox.metadata,
        ..CreateSandboxRequest::default()
    }
}

pub(super) fn check(request: &CreateSandboxRequest) -> Result<Spec, Invalid> {
    let spec = Spec::try_from(request)?;
    if let Some(index) = request.services.iter().position(|service| !service.url.is_empty()) {
        let field = format!("services[{index}].url");
        return Err(Invalid::new(field, "must be empty; the controller sets it"));
    }
    let mut ports = BTreeSet::new();
    if let Some(twice) = request.services.iter().position(|service| !ports.insert(service.port)) {
        let field = format!("services[{twice}].port");
        return Err(Invalid::new(field, "must not be given twice"));
    }
    Ok(spec)
}

fn wait(wait: Option<&prost_types::Duration>) -> Result<Duration, Invalid> {
    let Some(wait) = wait else { return Ok(WAIT_MAX) };
    proto::duration::read(*wait)
        .filter(|wait| *wait <= WAIT_MAX)
        .ok_or_else(|| Invalid::new("wait", "must be 0 to 20 s"))
}

/// SHA-256 of all fields that define the sandbox, hex. The caller's wait is not one of them.
fn digest(request: &CreateSandboxRequest) -> String {
    let body = CreateSandboxRequest { wait: None, ..request.clone() };
    // Maps are ordered, so equal bodies have equal bytes.
    HEXLOWER.encode(&Sha256::digest(body.encode_to_vec()))
}
