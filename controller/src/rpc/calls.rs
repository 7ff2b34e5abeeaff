//! Entries of calls in the audit log. A call has one entry, at its end; a stream has one more at its
//! begin, so that a crash loses none that has entered a sandbox. A call that changes many sandboxes has one
//! more for each. Calls of a team that have changed nothing and are about no sandbox of its own are counted.

use std::sync::{Arc, OnceLock};

use daemon::audit::{Kind, Record, bounded, code_name};
use proto::{
    Reason,
    id::SandboxId,
    name::Team,
    sandbox::v1::{GarbageAction, GarbageItem},
};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{
    scope::{Method, Need, Shape},
    subject::{Named, Subject},
};
use crate::{
    access::Access,
    audit::Audit,
    sandbox::{Caller, Outcome, Sandboxes},
};

/// Kind of an object that should be a sandbox, and is none.
const UNKNOWN: &str = "sandbox:";
/// Key of the metadata of an error with the sandbox that it is about.
const SANDBOX_ID: &str = "sandbox_id";

/// Makes entries.
#[derive(Debug)]
pub(super) struct Recorder {
    audit: Audit,
    access: Arc<Access>,
    sandboxes: Arc<Sandboxes>,
}

/// Sandbox that a call has made, in the extensions of its answer.
#[derive(Debug, Clone)]
pub(super) struct Made(pub(super) String);

impl Recorder {
    pub(super) fn new(audit: Audit, access: Arc<Access>, sandboxes: Arc<Sandboxes>) -> Self {
        Self { audit, access, sandboxes }
    }

    /// Counts a call that is refused before its caller is known.
    pub(super) fn count_refused(&self) {
        self.audit.count_refused();
    }

    /// Begins an entry; `None` for a call that is not recorded.
    pub(super) fn begin(
        self: &Arc<Self>,
        method: Method,
        caller: Option<&Caller>,
        peer: Option<std::net::SocketAddr>,
    ) -> Option<Call> {
        if !method.is_recorded() {
            return None;
        }
        let mut record = Record::new(Kind::Call, 0);
        record.call = self.audit.number();
        record.method = method.name.to_owned();
        record.peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
        if let Some(caller) = caller {
            record.team = caller.team.to_string();
            record.token.clone_from(&caller.token);
            record.user = caller.user.as_ref().map(ToString::to_string).unwrap_or_default();
        }
        let own = method.need != Need::Scope(proto::scope::Scope::Admin);
        let team = caller.filter(|_| own).map(|caller| caller.team.clone());
        Some(Call(Arc::new(Inner {
            recorder: self.clone(),
            record,
            team,
            shape: method.shape,
            started: Instant::now(),
            about: OnceLock::new(),
        })))
    }

    /// Adds the entry of a call that is refused to a known caller, or counts it with others like it.
    pub(super) fn refuse(
        self: &Arc<Self>,
        method: Method,
        caller: &Caller,
        peer: Option<std::net::SocketAddr>,
        status: &Status,
    ) {
        if let Some(call) = self.begin(method, Some(caller), peer) {
            let reason = daemon::status::reason(status);
            self.audit.refuse(call.ended(status.code(), reason, None));
        }
    }

    /// Finds the sandbox that a subject names, and whose it is.
    fn look_up(&self, call: &Inner, subject: Subject) -> About {
        let Subject { sandbox, mut object, mut owner, request_id, token } = subject;
        let found = Some(sandbox.as_str()).filter(|text| !text.is_empty());
        let found = found.map(|text| self.sandboxes.identify(call.team.as_ref(), text));
        let mut id = String::new();
        match found {
            Some(Some((known, team))) => {
                id = known.to_string();
                owner = team.to_string();
            }
            Some(None) => object = format!("{UNKNOWN}{sandbox}"),
            None => {}
        }
        if owner == call.record.team {
            owner.clear();
        }
        About { sandbox: id, object, owner, request_id, token }
    }
}

/// Object of a call.
#[derive(Debug, Clone, Default)]
struct About {
    sandbox: String,
    object: String,
    owner: String,
    request_id: String,
    token: String,
}

/// Call that is under way, in the extensions of its request.
#[derive(Debug, Clone)]
pub(super) struct Call(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    recorder: Arc<Recorder>,
    record: Record,
    /// Team whose sandboxes the call may name; `None`: those of all, so it is an operator's, or has no caller yet.
    team: Option<proto::name::Team>,
    shape: Shape,
    started: Instant,
    about: OnceLock<About>,
}

impl Call {
    /// Notes what the call is about. Only the first message of a stream counts.
    pub(super) fn about(&self, request: &impl Named) {
        let inner = &*self.0;
        if inner.about.get().is_some() {
            return;
        }
        let about = inner.recorder.look_up(inner, request.subject());
        // Into nothing, nobody enters.
        let is_told = inner.team.is_none() || !about.sandbox.is_empty();
        if inner.about.set(about).is_ok() && inner.shape == Shape::Stream && is_told {
            let mut record = self.filled();
            record.kind = Kind::Begun;
            self.add(record);
        }
    }

    /// Adds an entry: one of an operator whatever its team has done before.
    fn add(&self, record: Record) {
        match self.0.team {
            Some(_) => self.0.recorder.audit.record(record),
            None => self.0.recorder.audit.record_always(record),
        }
    }

    fn filled(&self) -> Record {
        let inner = &*self.0;
        let mut record = inner.record.clone();
        record.at_ms = inner.recorder.access.now_ms();
        if let Some(about) = inner.about.get().cloned() {
            record.sandbox = about.sandbox;
            record.object = about.object;
            record.owner = about.owner;
            record.request_id = about.request_id;
            if record.token.is_empty() {
                record.token = about.token;
            }
        }
        record
    }

    /// Builds the entry of the end.
    fn ended(&self, code: Code, reason: Option<Reason>, sandbox: Option<&str>) -> Record {
        let mut record = self.filled();
        code_name(code.into()).clone_into(&mut record.code);
        record.reason = reason.map(|reason| reason.name().to_owned()).unwrap_or_default();
        record.duration_ms = Some(daemon::clock::millis(self.0.started.elapsed()));
        if let Some(sandbox) = sandbox.filter(|_| record.sandbox.is_empty()) {
            record.sandbox = bounded(sandbox);
        }
        record
    }

    /// Adds the entry of the end, or counts the call with others like it.
    fn end(&self, code: Code, reason: Option<Reason>, sandbox: Option<&str>) {
        let record = self.ended(code, reason, sandbox);
        if self.is_counted(code, &record) {
            self.0.recorder.audit.refuse(record);
        } else {
            self.add(record);
        }
    }

    /// Returns true when a call of a team has changed nothing, and is about no sandbox that the team has. It costs its
    /// caller nothing, so whoever makes many must not fill the log.
    fn is_counted(&self, code: Code, record: &Record) -> bool {
        if self.0.team.is_none() || !record.sandbox.is_empty() || code == Code::Ok {
            return false;
        }
        // `None`: its message never came.
        let about = self.0.about.get();
        about.is_none_or(|about| about.object.starts_with(UNKNOWN)) || is_refusal(code)
    }

    /// Adds the entry of one of the sandboxes that the call changes.
    pub(super) fn part(&self, sandbox: &str, team: &Team, outcome: &Outcome<'_>) {
        let mut record = self.0.record.clone();
        record.kind = Kind::Part;
        record.at_ms = self.0.recorder.access.now_ms();
        record.sandbox = bounded(sandbox);
        record.owner = if team.as_str() == record.team { String::new() } else { team.to_string() };
        let (code, reason) = match outcome {
            Outcome::Done => (Code::Ok, ""),
            Outcome::Failed(error) => (error.reason.code(), error.reason.name()),
            // The caller hung up; the change goes on.
            Outcome::Unknown => (Code::Cancelled, ""),
        };
        code_name(code.into()).clone_into(&mut record.code);
        reason.clone_into(&mut record.reason);
        self.add(record);
    }

    /// Adds entries of what a clean-up of nodes has changed.
    pub(super) fn cleaned(&self, items: &[GarbageItem]) {
        let done = |item: &&GarbageItem| match item.action() {
            GarbageAction::Unspecified
            | GarbageAction::Quarantined
            | GarbageAction::TooMany
            | GarbageAction::Unchecked => false,
            GarbageAction::Unlock
            | GarbageAction::Undo
            | GarbageAction::Delete
            | GarbageAction::Stop
            | GarbageAction::Start
            | GarbageAction::EnforcePause
            | GarbageAction::SettleSize
            | GarbageAction::Look
            | GarbageAction::Adopt
            | GarbageAction::Release
            | GarbageAction::Destroy
            | GarbageAction::Forget => true,
        };
        for item in items.iter().filter(done) {
            let mut record = self.0.record.clone();
            record.kind = Kind::Part;
            record.at_ms = self.0.recorder.access.now_ms();
            record.object = format!("node:{}", bounded(&item.node));
            // Others are no objects: a time, a count, a path.
            if item.subject.parse::<SandboxId>().is_ok() {
                let found = self.0.recorder.sandboxes.identify(None, &item.subject);
                let owner = found.map(|(_, team)| team.to_string()).unwrap_or_default();
                record.owner = if owner == record.team { String::new() } else { owner };
                record.sandbox = bounded(&item.subject);
            } else if item.subject.parse::<u32>().is_ok() {
                record.object = format!("vmid:{}", bounded(&item.subject));
            } else {
                continue;
            }
            code_name(Code::Ok.into()).clone_into(&mut record.code);
            self.add(record);
        }
    }

    /// Adds the entry of a join. One whose token was not good is only counted: whoever has none could
    /// fill the log.
    pub(super) fn joined<T>(&self, done: &crate::sandbox::Result<T>) {
        match done {
            Ok(_) => self.end(Code::Ok, None, None),
            Err(error) if error.reason == Reason::AddressConflict => {
                self.end(error.reason.code(), Some(error.reason), None);
            }
            Err(_) => self.0.recorder.count_refused(),
        }
    }
}

/// Returns true for codes of calls that were refused: nothing has come of them.
fn is_refusal(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => false,
    }
}

/// Returns what adds an entry for each sandbox of a call that changes many.
pub(super) fn witness<T>(
    request: &tonic::Request<T>,
) -> impl Fn(&str, &Team, Outcome<'_>) + Send + Sync + use<T> {
    let call = request.extensions().get::<Call>().cloned();
    move |sandbox, team, outcome| {
        if let Some(call) = &call {
            call.part(sandbox, team, &outcome);
        }
    }
}

/// Writes the entry of a call's end, however that comes.
#[derive(Debug)]
pub(super) struct Ticket {
    /// Call; `None` once its entry is written, or when there is none.
    call: Option<Call>,
    /// Whether the answer of a unary call is made: it counts, even if the caller does not read it.
    answered: bool,
    made: Option<String>,
}

impl Ticket {
    pub(super) fn new(call: Option<Call>) -> Self {
        Self { call, answered: false, made: None }
    }

    /// Notes an answer whose body is still to be sent.
    pub(super) fn answered(&mut self, made: Option<&Made>) {
        self.made = made.map(|made| made.0.clone());
        self.answered = self.call.as_ref().is_some_and(|call| call.0.shape == Shape::Unary);
    }

    /// Writes the entry with this status. A call that has a ticket had a good token when it began: where it
    /// ends because of its token it is cut and not refused, and what it had begun may be done or not.
    pub(super) fn end(&mut self, status: &Status) {
        let Some(call) = self.call.take() else { return };
        let (mut reason, mut sandbox, mut code) = (None, self.made.take(), status.code());
        if status.code() != Code::Ok
            && let Some((name, metadata)) = daemon::status::info(status)
        {
            reason = Reason::named(&name);
            sandbox = sandbox.or_else(|| metadata.get(SANDBOX_ID).cloned());
        }
        if reason == Some(Reason::TokenInvalid) {
            code = Code::Cancelled;
        }
        call.end(code, reason, sandbox.as_deref());
    }
}

impl Drop for Ticket {
    /// Ends a call that nobody waits for any more.
    fn drop(&mut self) {
        let code = if self.answered { Code::Ok } else { Code::Cancelled };
        self.end(&Status::new(code, ""));
    }
}
