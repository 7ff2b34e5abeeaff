//! Converts our errors to gRPC statuses.

use daemon::status::{FAILED_PATH, FILES_WRITTEN, Refusal};
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
        if let Some(exceeded) = error.exceeded {
            refusal = refusal
                .with("limit", exceeded.limit)
                .with("used", exceeded.used.to_string())
                .with("max", exceeded.max.to_string());
        }
        if let Some(partial) = error.partial {
            refusal = refusal.with(FILES_WRITTEN, partial.files_written.to_string());
            if let Some(path) = partial.failed_path {
                refusal = refusal.with(FAILED_PATH, path);
            }
        }
        refusal.into()
    }
}

/// Gives a status that tonic made (a message is too large, a call ran out of time) our form; `None`
/// for a status that already has it, or has no form of ours.
pub(super) fn completed(status: &Status) -> Option<Status> {
    if daemon::status::reason(status).is_some() {
        return None;
    }
    let (reason, message) = match status.code() {
        // tonic's code for a message over the limit.
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
