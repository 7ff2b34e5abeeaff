//! Runs a command as a stream, or attaches to one: passes messages between caller and node.

mod control;
mod run_to_end;
mod session;

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use proto::{
    exec::{self, check_command, check_exec_id, check_path, check_user, check_window},
    id::Invalid,
    name::Team,
    sandbox::v1::{
        ExecAttach, ExecRequest, ExecResponse, ExecStart, StreamExecRequest, exec_request,
        exec_start, stream_exec_request,
    },
    spec,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

use self::session::{Opening, Session};
use super::{Result, Sandboxes, quota::AdmittedExec};
use crate::{
    inventory::{Entry, commands::Place},
    node::{Node, StreamOwner},
};

pub use self::run_to_end::Output;
pub(crate) use self::session::StdinMemory;

/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Buffered messages for a slow caller. What is behind them waits in the window of the node's stream.
const AHEAD: usize = 1;
/// Node of a sandbox, and the team and sandbox that its streams count against.
pub(super) type Target = (Arc<Node>, StreamOwner);

/// Messages of a running command.
pub type Responses = ReceiverStream<Result<ExecResponse>>;

impl Sandboxes {
    /// Runs a command or attaches to one. The first message of `input` says which and where.
    ///
    /// # Errors
    /// When the first message is neither, or the sandbox cannot run anything now. Later errors end
    /// the stream.
    pub async fn exec<S>(self: &Arc<Self>, team: &Team, mut input: S) -> Result<Responses>
    where
        S: Stream<Item = Result<ExecRequest>> + Send + Unpin + 'static,
    {
        let first = match timeout(FIRST, input.next()).await {
            Ok(Some(first)) => first?.message,
            Ok(None) | Err(_) => None,
        };
        let (place, opening, admitted) = match first {
            Some(exec_request::Message::Start(start)) => {
                let (place, start) = self.runnable(team, start)?;
                let admitted = self.admit_exec(&place, &start.exec_id)?;
                (place, Opening::Start(start), Some(admitted))
            }
            Some(exec_request::Message::Attach(attach)) => {
                let (place, attach) = self.attachable(team, attach)?;
                (place, Opening::Attach(attach), None)
            }
            _ => return Err(Invalid::new("start", "or attach must be the first message").into()),
        };
        let mut session = Session::new(self.clone(), place, opening, admitted);
        let opened = session.open().await?;
        let (to_caller, answer) = mpsc::channel(AHEAD);
        self.tasks.spawn(session.run(opened, input, to_caller));
        Ok(ReceiverStream::new(answer))
    }

    /// Like `exec`, for a caller that cannot send while it reads. Stdin comes by other calls, so
    /// the run needs an exec_id.
    ///
    /// # Errors
    /// As `exec`.
    pub async fn stream_exec(
        self: &Arc<Self>,
        team: &Team,
        request: StreamExecRequest,
    ) -> Result<Responses> {
        let first = match request.subject {
            Some(stream_exec_request::Subject::Start(start)) => {
                check_exec_id("start.exec_id", &start.exec_id)?;
                exec_request::Message::Start(start)
            }
            Some(stream_exec_request::Subject::Attach(attach)) => {
                exec_request::Message::Attach(attach)
            }
            None => return Err(Invalid::new("subject", "must be start or attach").into()),
        };
        let starts = matches!(first, exec_request::Message::Start(_));
        let eof = (starts && request.no_stdin).then_some(exec_request::Message::StdinEof(true));
        let messages = std::iter::once(first).chain(eof);
        let messages = messages.map(|message| Ok(ExecRequest { message: Some(message) }));
        // Never ends: an ended input could be taken for the end of stdin.
        let input = stream::iter(messages.collect::<Vec<_>>()).chain(stream::pending());
        self.exec(team, input).await
    }

    /// Admits a start within the limits of the team.
    fn admit_exec(&self, (node, owner): &Target, exec_id: &str) -> Result<AdmittedExec> {
        let place = Place {
            node: node.name.clone(),
            team: owner.team.clone(),
            sandbox: owner.sandbox,
            exec_id: (!exec_id.is_empty()).then(|| exec_id.to_owned()),
        };
        self.quotas.admit_exec(&self.nodes.commands, place, self.clock.now_ms())
    }

    /// Checks a start and sets the sandbox's id in it.
    fn runnable(&self, team: &Team, mut start: ExecStart) -> Result<(Target, ExecStart)> {
        check(&start).map_err(|invalid| invalid.under("start"))?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, &start.id)?;
        start.id = entry.id.to_string();
        Ok(((node, owner(&entry)), start))
    }

    fn attachable(&self, team: &Team, mut attach: ExecAttach) -> Result<(Target, ExecAttach)> {
        check_exec_id("attach.exec_id", &attach.exec_id)?;
        let (entry, node) = self.on_node(team, &attach.id)?;
        attach.id = entry.id.to_string();
        Ok(((node, owner(&entry)), attach))
    }
}

/// Returns the team and sandbox that a stream to this sandbox counts against.
pub(super) fn owner(entry: &Entry) -> StreamOwner {
    StreamOwner { team: entry.team.clone(), sandbox: entry.id }
}

fn check(start: &ExecStart) -> Result<(), Invalid> {
    match &start.command {
        Some(exec_start::Command::Argv(argv)) => check_command("argv", &argv.args)?,
        Some(exec_start::Command::Shell(line)) => {
            check_command("shell", std::slice::from_ref(line))?;
        }
        Some(exec_start::Command::Sftp(_)) if start.tty => {
            return Err(Invalid::new("tty", "must not be set with `sftp`"));
        }
        Some(exec_start::Command::Sftp(_)) => {}
        None => return Err(Invalid::new("command", "must be argv, shell or sftp")),
    }
    if !start.cwd.is_empty() {
        check_path("cwd", &start.cwd)?;
    }
    check_user(&start.user)?;
    spec::check_env(&start.env)?;
    exec::timeout("timeout", start.timeout)?;
    if let Some(window) = &start.window {
        check_window(window)?;
    }
    if start.detached && start.exec_id.is_empty() {
        return Err(Invalid::new("exec_id", "must be set for a command that is detached"));
    }
    if !start.exec_id.is_empty() {
        check_exec_id("exec_id", &start.exec_id)?;
    }
    Ok(())
}
