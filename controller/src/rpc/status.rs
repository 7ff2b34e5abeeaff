//! Our errors as gRPC's.

use daemon::status::Refusal;
use proto::Reason;
use tonic::{Code, Status};

use crate::sandbox;

impl From<sandbox::Error> for Status {
    fn from(error: sandbox::Error) -> Self {
        let mut refusal = Refusal::new(error.reason, error.message);
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
            Reason::TooLarge,
            format!("a message may have {} bytes at most", proto::MESSAGE_BYTES_MAX),
        ),
        Code::Cancelled | Code::DeadlineExceeded => {
            (Reason::OutcomeUnknown, "the call's own deadline was over first".to_owned())
        }
        Code::InvalidArgument => (Reason::FieldInvalid, status.message().to_owned()),
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
    Some(Refusal::new(reason, message).into())
}
