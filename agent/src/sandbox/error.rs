//! Why an operation was refused or failed, in words that survive on the wire and in a record.

use std::time::Duration;

use proto::Reason;

use crate::{journal, pve, saga::Injected};

/// A refusal or a failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What a caller branches on.
    pub reason: Reason,
    /// A sentence, with `pct`'s own last line where it spoke.
    pub message: String,
    /// When it may be otherwise.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// Without a hint when to try again.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), retry_after: None }
    }

    /// With a hint when to try again.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }
}

/// A text of our own making that does not fit: what callers send is checked before.
impl From<proto::id::Invalid> for Error {
    fn from(error: proto::id::Invalid) -> Self {
        Self::new(Reason::Invariant, error.to_string())
    }
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        let reason = match &error {
            journal::Error::Conflict { .. } => Reason::RevisionConflict,
            journal::Error::VmidsExhausted { .. } => Reason::VmidsExhausted,
            journal::Error::AddressTaken { .. } => Reason::AddressConflict,
            journal::Error::AddressesExhausted => Reason::AddressesExhausted,
            journal::Error::Full => Reason::StorageFull,
            journal::Error::Storage(_) => Reason::StoreFailed,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<pve::Error> for Error {
    fn from(error: pve::Error) -> Self {
        let soon = Some(Duration::from_secs(2));
        let (reason, retry_after) = match &error.kind {
            pve::ErrorKind::Locked(_) => (Reason::ContainerLocked, soon),
            pve::ErrorKind::NoQuorum(_) => (Reason::NoQuorum, soon),
            pve::ErrorKind::StorageFull(_) => (Reason::StorageFull, None),
            pve::ErrorKind::NotOurs(_) => (Reason::NotOurs, None),
            pve::ErrorKind::VmidTaken(_) => (Reason::VmidsExhausted, None),
            pve::ErrorKind::NotFound(_)
            | pve::ErrorKind::WrongState(_)
            | pve::ErrorKind::Deadline(_)
            | pve::ErrorKind::Failed(_) => (Reason::PctFailed, None),
        };
        Self { reason, message: error.to_string(), retry_after }
    }
}

impl From<Injected> for Error {
    fn from(injected: Injected) -> Self {
        Self::new(Reason::Invariant, injected.to_string())
    }
}
