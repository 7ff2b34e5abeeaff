//! Reasons why operations were refused or failed, in a form for the wire and for records.

use std::{borrow::Cow, time::Duration};

use proto::Reason;

use crate::{journal, pve, saga::Injected};

/// Result of an operation, or of a part of one.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Refusal or failure of an operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Reason code that callers branch on.
    pub reason: Reason,
    /// Sentence for people, with the last line that `pct` printed, if any.
    pub message: String,
    /// Delay after which a retry may succeed.
    pub retry_after: Option<Duration>,
    /// Field of the request that is invalid.
    pub field: Option<Cow<'static, str>>,
    /// Number of files that were written before the one that failed, where several were to be.
    pub files_written: Option<u32>,
}

impl Error {
    /// Creates an error without a hint when to retry.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            retry_after: None,
            field: None,
            files_written: None,
        }
    }

    /// Creates the error of a caller's field that turned out to be invalid.
    pub fn of_field(invalid: proto::id::Invalid) -> Self {
        let field = Some(invalid.what.clone());
        Self { field, ..Self::new(Reason::FieldInvalid, invalid.to_string()) }
    }

    /// Adds a hint when to retry.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }
}

/// Converts an invalid text that the agent itself built: texts of callers are checked before.
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
        Self { retry_after, ..Self::new(reason, error.to_string()) }
    }
}

impl From<Injected> for Error {
    fn from(injected: Injected) -> Self {
        Self::new(Reason::Invariant, injected.to_string())
    }
}
