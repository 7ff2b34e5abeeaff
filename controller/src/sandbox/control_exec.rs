//! Control of a running command from outside its stream: stdin, terminal size, signals, list.

use std::sync::Arc;

use proto::{
    agent::v1::control_exec_request::Action,
    exec::{check_chunk, check_exec_id, check_signal, check_window},
    name::Team,
    sandbox::v1::{ExecInfo, ResizeExecRequest, SignalExecRequest, WriteExecStdinRequest},
};

use super::{Error, Sandboxes};

impl Sandboxes {
    /// Writes stdin of a command; returns how many bytes it has then. Repeating writes nothing
    /// twice.
    ///
    /// # Errors
    /// When there is no such command, or the bytes do not follow those that it has.
    pub async fn write_exec_stdin(
        self: &Arc<Self>,
        team: &Team,
        mut request: WriteExecStdinRequest,
    ) -> Result<u64, Error> {
        check_chunk("data", &request.data)?;
        request.id = self.own_id(team, &request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.control(team, &id, Action::WriteStdin(request)).await
    }

    /// Sets the terminal size of a command.
    ///
    /// # Errors
    /// When there is no such command.
    pub async fn resize_exec(
        self: &Arc<Self>,
        team: &Team,
        mut request: ResizeExecRequest,
    ) -> Result<(), Error> {
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
    ) -> Result<(), Error> {
        check_signal(request.signal)?;
        request.id = self.own_id(team, &request.id, &request.exec_id)?;
        let id = request.id.clone();
        self.control(team, &id, Action::Signal(request)).await.map(drop)
    }

    /// Lists the commands of the sandbox's current boot.
    ///
    /// # Errors
    /// When there is no such sandbox, or its node does not answer.
    pub async fn list_execs(&self, team: &Team, id: &str) -> Result<Vec<ExecInfo>, Error> {
        let (entry, node) = self.on_node(team, id)?;
        node.client.list_execs(&entry.id).await.map_err(|error| self.of_node(&node, error))
    }

    fn own_id(&self, team: &Team, id: &str, exec_id: &str) -> Result<String, Error> {
        check_exec_id("exec_id", exec_id)?;
        self.may_change()?;
        Ok(self.on_node(team, id)?.0.id.to_string())
    }

    async fn control(&self, team: &Team, id: &str, action: Action) -> Result<u64, Error> {
        let (_, node) = self.on_node(team, id)?;
        node.client.control_exec(action).await.map_err(|error| self.of_node(&node, error))
    }
}
