//! The one table from our errors to gRPC's.

use daemon::status::Refusal;
use proto::reason;
use tonic::{Code, Status};

use crate::sandbox;

/// The code of a reason. docs/errors.md says the same.
pub(super) fn code(reason: &str) -> Code {
    match reason {
        reason::FIELD_INVALID => Code::InvalidArgument,
        reason::TOKEN_INVALID => Code::Unauthenticated,
        reason::SCOPE_MISSING => Code::PermissionDenied,
        reason::SANDBOX_NOT_FOUND
        | reason::SNAPSHOT_NOT_FOUND
        | reason::SERVICE_NOT_FOUND
        | reason::NODE_NOT_FOUND
        | reason::EXEC_NOT_FOUND
        | reason::FILE_NOT_FOUND => Code::NotFound,
        reason::REQUEST_ID_REUSED
        | reason::SANDBOX_KNOWN
        | reason::SERVICE_EXISTS
        | reason::EXEC_ID_REUSED => Code::AlreadyExists,
        reason::SANDBOX_NOT_RUNNING
        | reason::SANDBOX_DELETED
        | reason::SANDBOX_BUSY
        | reason::CREATE_CANCELLED
        | reason::NOT_OURS
        | reason::CONTAINER_UNFIT
        | reason::ADDRESS_CONFLICT
        | reason::DHCP_REFUSED
        | reason::CONTAINER_GONE
        | reason::NOT_ADOPTED
        | reason::NOT_MOVABLE
        | reason::NODE_IN_USE
        | reason::SANDBOX_PAUSED
        | reason::FREEZE_FAILED
        | reason::FILE_REFUSED => Code::FailedPrecondition,
        reason::NO_CAPACITY
        | reason::NODE_CORDONED
        | reason::NODE_NUMBER_CHANGED
        | reason::MEMORY_FULL
        | reason::STORAGE_FULL
        | reason::QUEUE_FULL
        | reason::VMIDS_EXHAUSTED
        | reason::ADDRESSES_EXHAUSTED
        | reason::TOO_MANY_CALLS
        | reason::TOO_LARGE => Code::ResourceExhausted,
        reason::EVENTS_GONE => Code::OutOfRange,
        reason::STALE_EPOCH | reason::REVISION_CONFLICT | reason::EXEC_LOST => Code::Aborted,
        reason::NODE_UNREACHABLE
        | reason::NO_QUORUM
        | reason::CONTAINER_LOCKED
        | reason::SHUTTING_DOWN => Code::Unavailable,
        reason::OUTCOME_UNKNOWN | reason::PROBE_TIMEOUT => Code::DeadlineExceeded,
        // PCT_FAILED, EXEC_FAILED, STORE_FAILED, INVARIANT, and what a later agent may say.
        _ => Code::Internal,
    }
}

impl From<sandbox::Error> for Status {
    fn from(error: sandbox::Error) -> Self {
        let mut refusal = Refusal::new(code(&error.reason), error.reason, error.message);
        refusal.field = error.field;
        refusal.retry_after = error.retry_after;
        if let Some(id) = error.sandbox_id {
            refusal = refusal.with("sandbox_id", id);
        }
        refusal.into()
    }
}

/// A status that tonic made (a message that is too large, a call that ran out of its time) in our
/// form; one of ours as it is.
pub(super) fn completed(status: &Status) -> Option<Status> {
    if daemon::status::reason(status).is_some() {
        return None;
    }
    let (reason, message) = match status.code() {
        // tonic's word for a message over the limit.
        Code::OutOfRange => (
            reason::TOO_LARGE,
            format!("a message may have {} bytes at most", proto::MESSAGE_BYTES_MAX),
        ),
        Code::Cancelled | Code::DeadlineExceeded => {
            (reason::OUTCOME_UNKNOWN, "the call's own deadline was over first".to_owned())
        }
        Code::InvalidArgument => (reason::FIELD_INVALID, status.message().to_owned()),
        Code::Ok
        | Code::Unknown
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => return None,
    };
    Some(Refusal::new(code(reason), reason, message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_our_fault_is_internal() {
        let internal: Vec<_> =
            reason::ALL.iter().filter(|reason| code(reason) == Code::Internal).copied().collect();
        assert_eq!(internal, ["PCT_FAILED", "EXEC_FAILED", "STORE_FAILED", "INVARIANT"]);
    }
}
