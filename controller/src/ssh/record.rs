//! Entries of SSH in the audit log: a login, and for each command, terminal, file transfer, forward and listener its
//! begin and its end. Never commands, paths or bytes.

use std::net::SocketAddr;

use daemon::audit::{Kind, Record, bounded, code_name};
use tokio::time::Instant;

use super::{Shared, login::Login};
use crate::sandbox::Error;

/// Action of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Login,
    Exec,
    Shell,
    Sftp,
    Forward,
    Listen,
}

impl Action {
    const fn name(self) -> &'static str {
        match self {
            Self::Login => "SshLogin",
            Self::Exec => "SshExec",
            Self::Shell => "SshShell",
            Self::Sftp => "SshSftp",
            Self::Forward => "SshForward",
            Self::Listen => "SshForwardListen",
        }
    }
}

/// Entry of something under way.
#[derive(Debug)]
pub(super) struct Entry {
    record: Record,
    started: Instant,
}

fn record(shared: &Shared, login: &Login, peer: SocketAddr, action: Action) -> Record {
    let mut record = Record::new(Kind::Call, shared.access.now_ms());
    record.call = shared.audit.number();
    record.method = action.name().to_owned();
    record.team = login.caller.team.to_string();
    record.token.clone_from(&login.caller.token);
    record.user = login.caller.user.as_ref().map(ToString::to_string).unwrap_or_default();
    record.peer = peer.to_string();
    record.sandbox = login.sandbox.to_string();
    record.object = format!("ssh-key:{}", bounded(login.token.name.as_str()));
    record
}

/// Adds the entry of a login.
pub(super) fn login(shared: &Shared, login: &Login, peer: SocketAddr) {
    let mut record = record(shared, login, peer, Action::Login);
    code_name(0).clone_into(&mut record.code);
    shared.audit.record(record);
}

/// Adds the entry of a refusal, or counts it with others like it.
pub(super) fn refuse(
    shared: &Shared,
    login: &Login,
    peer: SocketAddr,
    action: Action,
    error: &Error,
) {
    let mut record = record(shared, login, peer, action);
    error.reason.name().clone_into(&mut record.reason);
    code_name(error.reason.code().into()).clone_into(&mut record.code);
    shared.audit.refuse(record);
}

/// Adds the entry of a begin.
pub(super) fn begin(shared: &Shared, login: &Login, peer: SocketAddr, action: Action) -> Entry {
    let record = record(shared, login, peer, action);
    let begun = Record { kind: Kind::Begun, ..record.clone() };
    shared.audit.record(begun);
    Entry { record, started: Instant::now() }
}

impl Entry {
    /// Adds the entry of the end. `None`: the client left.
    pub(super) fn end(mut self, shared: &Shared, how: Option<Result<(), &Error>>) {
        /// Number of the gRPC code CANCELLED.
        const CANCELLED: i32 = 1;
        self.record.at_ms = shared.access.now_ms();
        self.record.duration_ms = Some(daemon::clock::millis(self.started.elapsed()));
        let code = match how {
            Some(Ok(())) => 0,
            Some(Err(error)) => {
                error.reason.name().clone_into(&mut self.record.reason);
                error.reason.code().into()
            }
            None => CANCELLED,
        };
        code_name(code).clone_into(&mut self.record.code);
        shared.audit.record(self.record);
    }
}
