//! Objects that requests name, for the audit log. Never arguments, contents or secrets.

use daemon::audit::bounded;
use proto::{
    forward,
    sandbox::v1::{exec_request, forward_request, stream_exec_request, upload_archive_request, *},
};

/// Object of a request, as the caller names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Subject {
    /// Sandbox, by any form of its name; empty: none.
    pub(super) sandbox: String,
    /// Other object with its kind, such as `node:pve1`; empty: none.
    pub(super) object: String,
    /// Team that the request is about, if it names one.
    pub(super) owner: String,
    /// `request_id` of a creation.
    pub(super) request_id: String,
    /// Public id of a one-time token.
    pub(super) token: String,
}

impl Subject {
    fn sandbox(id: &str) -> Self {
        Self { sandbox: bounded(id), ..Self::default() }
    }

    fn other(kind: &str, name: &str) -> Self {
        let object =
            if name.is_empty() { String::new() } else { format!("{kind}:{}", bounded(name)) };
        Self { object, ..Self::default() }
    }

    fn of_team(self, team: &str) -> Self {
        Self { owner: bounded(team), ..self }
    }

    fn creation(request: &CreateSandboxRequest) -> Self {
        Self { request_id: bounded(&request.request_id), ..Self::default() }
    }

    fn start(start: Option<&ExecStart>) -> Self {
        start.map(|start| Self::sandbox(&start.id)).unwrap_or_default()
    }
}

/// Request that says what it is about.
pub(super) trait Named {
    /// Returns the object of the request.
    fn subject(&self) -> Subject;
}

macro_rules! named {
    ($($request:ty, $this:pat => $subject:expr;)*) => {
        $(impl Named for $request {
            fn subject(&self) -> Subject {
                let $this = self;
                $subject
            }
        })*
    };
}

/// Requests with the sandbox in `id`.
macro_rules! sandboxes {
    ($($request:ty)*) => {
        named! { $($request, this => Subject::sandbox(&this.id);)* }
    };
}

/// Requests with the node in `node`.
macro_rules! nodes {
    ($($request:ty)*) => {
        named! { $($request, this => Subject::other("node", &this.node);)* }
    };
}

/// Requests about no single object.
macro_rules! nothing {
    ($($request:ty)*) => {
        named! { $($request, _ => Subject::default();)* }
    };
}

sandboxes! {
    GetSandboxRequest WatchSandboxRequest StartSandboxRequest StopSandboxRequest
    DeleteSandboxRequest PauseSandboxRequest ResumeSandboxRequest WriteExecStdinRequest
    ResizeExecRequest SignalExecRequest ListExecsRequest WriteFilesRequest ReadFileRequest
    StatFileRequest ListDirRequest RemoveFileRequest DownloadArchiveRequest
    CreateAccessLinkRequest RevokeAccessRequest
    ExposeHttpServiceRequest HideHttpServiceRequest ReleaseSandboxRequest WatchEventsRequest
    WatchAllEventsRequest ListPortsRequest
}

nodes! {
    CollectGarbageRequest CordonNodeRequest UncordonNodeRequest DrainNodeRequest ForgetNodeRequest
    CreateNodeTokenRequest RevokeNodeRequest
}

/// Returns what may be logged of a text that should name a token: somebody may have put a whole token there.
fn without_secret(text: &str) -> &str {
    let prefixes = ["pvesb_", "e2b_", "pvesj_"];
    match proto::token::split(text) {
        Some((id, _)) => id,
        None if prefixes.iter().any(|prefix| text.starts_with(prefix)) => "",
        None => text,
    }
}

nothing! {
    ListSandboxesRequest WatchSandboxesRequest PruneSandboxesRequest CompareSandboxesRequest
    GetUsageRequest ListSnapshotsRequest ExplainPlacementRequest ListNodesRequest FsckRequest
    ListTeamsRequest GetVersionRequest ExportAuditRequest VerifyAuditRequest
}

named! {
    CreateSandboxRequest, this => Subject::creation(this);
    GetOrCreateSandboxRequest, this => {
        this.create.as_ref().map(Subject::creation).unwrap_or_default()
    };
    UpdateSandboxRequest, this => {
        this.sandbox.as_ref().map(|sandbox| Subject::sandbox(&sandbox.id)).unwrap_or_default()
    };
    ExecCommandRequest, this => Subject::start(this.start.as_ref());
    ExecRequest, this => match &this.message {
        Some(exec_request::Message::Start(start)) => Subject::start(Some(start)),
        Some(exec_request::Message::Attach(attach)) => Subject::sandbox(&attach.id),
        Some(
            exec_request::Message::Stdin(_)
            | exec_request::Message::StdinEof(_)
            | exec_request::Message::Resize(_)
            | exec_request::Message::Signal(_),
        )
        | None => Subject::default(),
    };
    ForwardRequest, this => match &this.message {
        Some(forward_request::Message::Open(open)) => Subject {
            object: bounded(&forward::shown(open.target.as_ref())),
            ..Subject::sandbox(&open.id)
        },
        Some(forward_request::Message::Data(_) | forward_request::Message::Eof(_)) | None => {
            Subject::default()
        }
    };
    ForwardListenRequest, this => Subject {
        object: format!("listen:{}", this.port),
        ..Subject::sandbox(&this.id)
    };
    StreamExecRequest, this => match &this.subject {
        Some(stream_exec_request::Subject::Start(start)) => Subject::start(Some(start)),
        Some(stream_exec_request::Subject::Attach(attach)) => Subject::sandbox(&attach.id),
        None => Subject::default(),
    };
    UploadArchiveRequest, this => match &this.message {
        Some(upload_archive_request::Message::Start(start)) => Subject::sandbox(&start.id),
        Some(upload_archive_request::Message::Data(_)) | None => Subject::default(),
    };
    RecoverSandboxRequest, this => Subject::other("vmid", &this.vmid.to_string());
    AdoptSandboxRequest, this => {
        Subject::other("vmid", &this.vmid.to_string()).of_team(&this.team)
    };
    CreateTokenRequest, this => Subject::other("token", without_secret(&this.name)).of_team(&this.team);
    ListTokensRequest, this => Subject::other("team", &this.team).of_team(&this.team);
    RevokeTokenRequest, this => Subject::other("token", without_secret(&this.token)).of_team(&this.team);
    AddSshKeyRequest, this => Subject::other("ssh-key", &this.name).of_team(&this.team);
    ListSshKeysRequest, this => Subject::other("team", &this.team).of_team(&this.team);
    RemoveSshKeyRequest, this => {
        Subject::other("ssh-key", without_secret(&this.key)).of_team(&this.team)
    };
    GetTeamRequest, this => Subject::other("team", &this.name).of_team(&this.name);
    UpdateTeamRequest, this => {
        let name = this.team.as_ref().map(|team| team.name.as_str()).unwrap_or_default();
        Subject::other("team", name).of_team(name)
    };
    ListAuditRequest, this => Subject { sandbox: bounded(&this.sandbox), ..Subject::default() }
        .of_team(&this.team);
    JoinRequest, this => Subject {
        // `pvesj_ID_SECRET`: the id alone.
        token: this.token.split('_').nth(1).map(bounded).unwrap_or_default(),
        ..Subject::other("node", &this.node)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_have_names_and_no_secrets() {
        let token = "pvesj_0123456789ab_secret".to_owned();
        let join = JoinRequest { token, node: "n1".into(), ..JoinRequest::default() };
        let subject = join.subject();
        assert_eq!((subject.object.as_str(), subject.token.as_str()), ("node:n1", "0123456789ab"));
        let start = ExecStart {
            id: "web".into(),
            command: Some(exec_start::Command::Shell("secret".into())),
            env: [("KEY".to_owned(), "secret".to_owned())].into(),
            ..ExecStart::default()
        };
        let command = ExecCommandRequest { start: Some(start), stdin: "secret".into() };
        assert_eq!(command.subject(), Subject::sandbox("web"));
        let whole = format!("pvesb_0123456789ab_{}", "f".repeat(64));
        for (text, object) in
            [(whole.as_str(), "token:0123456789ab"), ("e2b_12", ""), ("ci", "token:ci")]
        {
            let revoke = RevokeTokenRequest { token: text.into(), ..RevokeTokenRequest::default() };
            assert_eq!(revoke.subject().object, object);
        }
        let long = DeleteSandboxRequest { id: "x".repeat(1 << 20) };
        assert!(long.subject().sandbox.len() < 200);
    }
}
