//! Why an operation was refused or failed, in words that survive on the wire and in a record.

use std::time::Duration;

use proto::reason;

use crate::{journal, pve, saga::Injected};

/// A refusal or a failure. The reason is what a caller branches on; `rpc` has the one table from it
/// to a gRPC code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// One of `proto::reason`.
    pub reason: &'static str,
    /// A sentence, with `pct`'s own last line where it spoke.
    pub message: String,
    /// When it may be otherwise.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// For a reason of `proto::reason`.
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
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
        Self::new(reason::INVARIANT, error.to_string())
    }
}

impl From<journal::Error> for Error {
    fn from(error: journal::Error) -> Self {
        let reason = match &error {
            journal::Error::Conflict { .. } => reason::REVISION_CONFLICT,
            journal::Error::VmidsExhausted { .. } => reason::VMIDS_EXHAUSTED,
            journal::Error::AddressTaken { .. } => reason::ADDRESS_CONFLICT,
            journal::Error::AddressesExhausted => reason::ADDRESSES_EXHAUSTED,
            journal::Error::Full => reason::STORAGE_FULL,
            journal::Error::Storage(_) => reason::STORE_FAILED,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<pve::Error> for Error {
    fn from(error: pve::Error) -> Self {
        let soon = Some(Duration::from_secs(2));
        let (reason, retry_after) = match &error.kind {
            pve::ErrorKind::Locked(_) => (reason::CONTAINER_LOCKED, soon),
            pve::ErrorKind::NoQuorum(_) => (reason::NO_QUORUM, soon),
            pve::ErrorKind::StorageFull(_) => (reason::STORAGE_FULL, None),
            pve::ErrorKind::NotOurs(_) => (reason::NOT_OURS, None),
            pve::ErrorKind::VmidTaken(_) => (reason::VMIDS_EXHAUSTED, None),
            pve::ErrorKind::NotFound(_)
            | pve::ErrorKind::WrongState(_)
            | pve::ErrorKind::Deadline(_)
            | pve::ErrorKind::Failed(_) => (reason::PCT_FAILED, None),
        };
        Self { reason, message: error.to_string(), retry_after }
    }
}

impl From<Injected> for Error {
    fn from(injected: Injected) -> Self {
        Self::new(reason::INVARIANT, injected.to_string())
    }
}
