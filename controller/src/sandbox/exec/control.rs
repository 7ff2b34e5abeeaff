//! Control of a running command from outside its stream: stdin, terminal size, signals, list.

use std::{sync::Arc, time::Duration};

use proto::{
    agent::v1::control_exec_request::Action,
    exec::{PIECE_BYTES_MAX, check_chunk, check_exec_id, check_signal, check_window},
    id::Invalid,
    name::Team,
    sandbox::v1::{
        ExecInfo, ListExecsRequest, ListExecsResponse, ResizeExecRequest, SignalExecRequest,
        WriteExecStdinRequest,
    },
};
use tokio::time::Instant;

use crate::sandbox::{Result, Sandboxes};

/// Most commands on a page.
const EXECS_MAX: usize = 1000;
/// Time after which no other piece of stdin is begun: each takes up to 10 s, and the call is answered within 20 s.
const PIECES: Duration = Duration::from_secs(8);

impl Sandboxes {
    /// Writes stdin of a command, in pieces for its agent; returns how many bytes it has then. Repeating writes
    /// nothing twice.
    ///
    /// # Errors
    /// When there is no such command, or the bytes do not follow those that it has.
    pub async fn write_exec_stdin(
        self: &Arc<Self>,
        team: &Team,
        mut request: WriteExecStdinRequest,
    ) -> Result<u64> {
        check_chunk("data", &request.data)?;
        request.id = self.own_id(team, &request.id, &request.exec_id)?;
        let (mut rest, begun) = (std::mem::take(&mut request.data), Instant::now());
        loop {
            let piece = rest.split_to(rest.len().min(PIECE_BYTES_MAX));
            let end = request.offset.saturating_add(piece.len() as u64);
            let eof = request.eof && rest.is_empty();
            let write = WriteExecStdinRequest { data: piece, eof, ..request.clone() };
            let taken = self.control(team, &request.id, Action::WriteStdin(write)).await?;
            // The caller sends again what the command does not take now.
            if rest.is_empty() || taken < end || begun.elapsed() >= PIECES {
                return Ok(taken);
            }
            request.offset = end;
        }
    }

    /// Sets the terminal size of a command.
    ///
    /// # Errors
    /// When there is no such command.
    pub async fn resize_exec(
        self: &Arc<Self>,
        team: &Team,
        mut request: ResizeExecRequest,
    ) -> Result<()> {
        check_window(&request.window.unwrap_or_default())?;
        request.id = self.own_id(team, &request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.control(team, &id, Action::Resize(request)).await.map(drop)
    }

    /// Signals a command and all processes that it started.
    ///
    /// # Errors
    /// When there is no such command.
    pub async fn signal_exec(
        self: &Arc<Self>,
        team: &Team,
        mut request: SignalExecRequest,
    ) -> Result<()> {
        check_signal(request.signal)?;
        request.id = self.own_id(team, &request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.control(team, &id, Action::Signal(request)).await.map(drop)
    }

    /// Lists a page of the commands of the sandbox's current boot, ordered by start time.
    ///
    /// # Errors
    /// When the page is wrong, there is no such sandbox, or its node does not answer.
    pub async fn list_execs(
        &self,
        team: &Team,
        request: &ListExecsRequest,
    ) -> Result<ListExecsResponse> {
        let ListExecsRequest { id, page_size, page_token } = request;
        let limit = match usize::try_from(*page_size) {
            Ok(0) => EXECS_MAX,
            Ok(size) if size <= EXECS_MAX => size,
            Ok(_) | Err(_) => return Err(Invalid::new("page_size", "must be 0 to 1000").into()),
        };
        let after = after(page_token)?;
        let (entry, node) = self.on_node(team, id)?;
        let execs = self.calls(&node, team)?.list_execs(&entry.id).await;
        let mut execs = execs.map_err(|error| self.node_error(&node, error))?;
        execs.retain(|exec| Some(place(exec)) > after);
        execs.sort_by_cached_key(place);
        let more = execs.len() > limit;
        execs.truncate(limit);
        let last = execs.last().filter(|_| more).map(place);
        let next = last.map(|(seconds, nanos, exec_id)| format!("{seconds}.{nanos}.{exec_id}"));
        Ok(ListExecsResponse { execs, next_page_token: next.unwrap_or_default() })
    }

    fn own_id(&self, team: &Team, id: &str, exec_id: &str) -> Result<String> {
        check_exec_id("exec_id", exec_id)?;
        self.may_change()?;
        Ok(self.on_node(team, id)?.0.id.to_string())
    }

    async fn control(&self, team: &Team, id: &str, action: Action) -> Result<u64> {
        let (_, node) = self.on_node(team, id)?;
        let answer = self.calls(&node, team)?.control_exec(action).await;
        answer.map_err(|error| self.node_error(&node, error))
    }
}

/// Place of a command in the list: by the time of its start, then by name.
type Place = (i64, i32, String);

fn place(exec: &ExecInfo) -> Place {
    let at = exec.started_at.unwrap_or_default();
    (at.seconds, at.nanos, exec.exec_id.clone())
}

/// Reads the token of the previous page: the place of its last command.
fn after(token: &str) -> Result<Option<Place>, Invalid> {
    if token.is_empty() {
        return Ok(None);
    }
    let read = || {
        let (seconds, rest) = token.split_once('.')?;
        let (nanos, exec_id) = rest.split_once('.')?;
        Some((seconds.parse().ok()?, nanos.parse().ok()?, exec_id.to_owned()))
    };
    let bad = || Invalid::new("page_token", "must be the token of the page before");
    read().map(Some).ok_or_else(bad)
}
