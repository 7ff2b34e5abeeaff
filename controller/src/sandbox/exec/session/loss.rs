//! Errors of a command that cannot be continued or started. Only what has certainly not run is
//! reported as a refusal.

use proto::Reason;

use super::{Opening, Session};
use crate::{
    node,
    sandbox::{Error, RETRY},
};

impl Session {
    /// Returns true when the call starts a command that runs or may run.
    pub(super) fn may_run(&self) -> bool {
        matches!(self.opening, Opening::Start(_)) && (self.started || self.in_doubt)
    }

    /// Builds the error of a command that cannot be continued or started; it is never repeated.
    /// Only what has certainly not run is reported as a refusal.
    pub(super) fn lost(&self, error: node::Error) -> Error {
        let node_error = |error| self.sandboxes.node_error(&self.node, error);
        if !self.may_run() {
            return match error {
                node::Error::Unknown(why) | node::Error::Silent(why) => {
                    self.sandboxes.unreachable(&self.node.name, &why)
                }
                error @ (node::Error::Refused { .. }
                | node::Error::Unreachable(_)
                | node::Error::Nonsense(_)) => node_error(error),
            };
        }
        match &error {
            node::Error::Unknown(why)
            | node::Error::Silent(why)
            | node::Error::Unreachable(why) => self.unknown(why),
            node::Error::Nonsense(_) => node_error(error),
            node::Error::Refused { reason, message, .. } => {
                // Specific to this command, from the agent that would know it.
                let own = matches!(reason, Reason::ExecLost | Reason::ExecIdReused);
                let gone = matches!(
                    reason,
                    Reason::ExecNotFound
                        | Reason::FieldInvalid
                        | Reason::SandboxNotRunning
                        | Reason::SandboxDeleted
                        | Reason::SandboxNotFound
                );
                if own || *reason == Reason::FieldInvalid && !self.started {
                    node_error(error)
                } else if gone {
                    self.gone(message)
                } else {
                    self.unknown(message)
                }
            }
        }
    }

    /// Builds the error of a command that may run, or may have run.
    pub(super) fn unknown(&self, why: &str) -> Error {
        let again = if self.is_named() {
            "ask again with the same exec_id: it is not run twice"
        } else {
            "look at what it did before you run it again"
        };
        let node = &self.node.name;
        let message = format!("node {node}: the command may run, or have run; {again}: {why}");
        Error::new(Reason::OutcomeUnknown, message).retry(RETRY)
    }

    pub(super) fn stopping(&self) -> Error {
        // A repeated call attaches to the command.
        if self.is_named() || !self.may_run() {
            return Error::new(Reason::ShuttingDown, "the controller is stopping").retry(RETRY);
        }
        self.unknown("the controller is stopping")
    }

    pub(super) fn gone(&self, why: &str) -> Error {
        let node = &self.node.name;
        let what = format!("the connection to node {node} broke and the command is lost: {why}");
        Error::new(Reason::ExecLost, what)
    }
}

/// Returns true when only the connection is lost; an agent that stops says so.
pub(super) fn is_break(error: &node::Error) -> bool {
    match error {
        node::Error::Unknown(_) | node::Error::Silent(_) | node::Error::Unreachable(_) => true,
        node::Error::Refused { reason, .. } => {
            matches!(reason, Reason::ShuttingDown | Reason::NodeUnreachable)
        }
        node::Error::Nonsense(_) => false,
    }
}

/// Returns true when all streams of the node are in use, which is temporary.
pub(super) fn is_full(error: &node::Error) -> bool {
    error.reason() == Some(Reason::TooManyCalls)
}
