//! Waking a paused sandbox on use, without a resume call.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
};

use crate::{
    journal::{Phase, Record, WakeOn},
    sandbox::{
        Error, Sandboxes,
        core::{
            operations::{OperationKind, OperationState},
            queries,
        },
    },
};

/// Longest wait of a call for a sandbox to wake. A thaw takes a millisecond; only a pause that just
/// fails takes longer.
const WAIT: Duration = Duration::from_secs(8);
/// Longest wait of the ingress, which holds each request for as long as it may itself.
const WAIT_HTTP: Duration = Duration::from_secs(90);

/// Use that needs the sandbox to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A request for an open port.
    Http,
    /// A connection to its SSH port.
    Ssh,
    /// A command, or access to files.
    Exec,
}

impl Wake {
    /// True when this use may wake the sandbox.
    pub const fn allowed(self, by: WakeOn) -> bool {
        match self {
            Self::Http => by.http,
            Self::Ssh => by.ssh,
            Self::Exec => by.exec,
        }
    }

    const fn wait(self) -> Duration {
        match self {
            Self::Http => WAIT_HTTP,
            Self::Ssh | Self::Exec => WAIT,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Http => "an HTTP request",
            Self::Ssh => "an SSH connection",
            Self::Exec => "a command",
        }
    }
}

impl Sandboxes {
    /// Returns the running sandbox; resumes it first if it is paused and this use may wake it.
    /// Concurrent callers resume it once.
    ///
    /// # Errors
    /// SANDBOX_PAUSED when it is paused and this use does not wake it; else as if it does not run.
    pub async fn wake(self: &Arc<Self>, name: &SandboxRef, by: Wake) -> Result<Arc<Record>, Error> {
        let record = self.living(name)?;
        self.used(&record.id);
        match record.phase {
            // RUNNING is written before the thaw: a caller that comes in between waits too.
            Phase::Running => match self.operations.find(&record.id, OperationKind::Resume) {
                Some(operation) => match operation.ended(by.wait()).await {
                    OperationState::Done(result) => still_runs(result?),
                    OperationState::UnderWay => Err(slow(&record.id)),
                },
                None => Ok(record),
            },
            Phase::Paused if by.allowed(record.wake_on) => {
                tracing::info!(sandbox_id = %record.id, by = by.word(), "waking sandbox");
                still_runs(self.resume(&record.id, by.wait()).await?)
            }
            Phase::Paused => Err(Error::new(
                Reason::SandboxPaused,
                format!("{} is paused, and {} does not wake it", record.id, by.word()),
            )),
            Phase::Creating
            | Phase::Undoing
            | Phase::Starting
            | Phase::Stopping
            | Phase::Stopped
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => Err(queries::not_running(&record)),
        }
    }
}

fn still_runs(record: Arc<Record>) -> Result<Arc<Record>, Error> {
    if record.phase == Phase::Running {
        return Ok(record);
    }
    let late = record.phase == Phase::Paused;
    Err(if late { slow(&record.id) } else { queries::not_running(&record) })
}

fn slow(id: &SandboxId) -> Error {
    Error::new(Reason::SandboxBusy, format!("{id} did not wake in time"))
        .retry_after(Duration::from_secs(2))
}
