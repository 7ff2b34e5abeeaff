//! Decodes the answer to a call, or its absence, into one of `node::Error`.

use std::{error::Error as _, io, time::Duration};

use daemon::chain::with_causes;
use proto::{Reason, sandbox::v1 as api};
use tonic::{Code, Response, Status};

use super::{
    Error,
    calls::{Call, Silence},
};

/// Time that a call may take beyond the wait that the agent was given.
pub(super) const MARGIN: Duration = Duration::from_secs(4);
/// Deadline of a call that only reads or records.
pub(super) const QUICK: Duration = Duration::from_secs(5);

/// Waits for the answer to a call, no longer than `limit`.
pub(super) async fn call<T>(
    call: Call,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(decode(call, &status)),
        Err(_) => Err(unanswered(call, format!("no answer within {} s", limit.as_secs()))),
    }
}

/// Converts the wait that an agent is given.
pub(super) fn duration(wait: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(wait).ok()
}

/// Takes the sandbox out of an answer.
pub(super) fn sandbox(answer: Option<api::Sandbox>) -> Result<api::Sandbox, Error> {
    answer.ok_or_else(|| Error::Nonsense("there is no sandbox in the answer".into()))
}

/// Builds the error of a call without an answer, which may have been carried out.
fn unanswered(call: Call, why: String) -> Error {
    match call.silence() {
        Silence::Agent => Error::Silent(why),
        Silence::Sandbox => Error::Unknown(why),
    }
}

/// Reads how many files were written before one failed.
fn files_written(status: &Status) -> Option<u32> {
    let (_, metadata) = daemon::status::info(status)?;
    metadata.get(daemon::status::FILES_WRITTEN)?.parse().ok()
}

/// Decodes an agent's status. Only a status with our reason is a refusal; all others come from the
/// transport, and then the call may have been carried out, unless the connection was never made.
pub(super) fn decode(call: Call, status: &Status) -> Error {
    let message = status.message().to_owned();
    match daemon::status::reason(status) {
        Some(Reason::OutcomeUnknown) => Error::Unknown(message),
        Some(reason) => {
            let retry_after = daemon::status::retry_after(status);
            Error::Refused { reason, message, retry_after, files_written: files_written(status) }
        }
        None if never_sent(status) => Error::Unreachable(chain(status)),
        None => match status.code() {
            Code::Unimplemented => {
                let (reason, message) = too_old(call);
                let message = message.to_owned();
                Error::Refused { reason, message, retry_after: None, files_written: None }
            }
            // With a source it is the connection's end, and says nothing about the call.
            Code::OutOfRange | Code::ResourceExhausted if status.source().is_none() => {
                let (retry_after, files_written) = (None, None);
                Error::Refused { reason: Reason::TooLarge, message, retry_after, files_written }
            }
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::InvalidArgument
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
            | Code::OutOfRange
            | Code::ResourceExhausted
            | Code::Unauthenticated => unanswered(call, chain(status)),
        },
    }
}

/// Says why an agent does not know a call.
fn too_old(call: Call) -> (Reason, &'static str) {
    if matches!(call, Call::Forward | Call::ForwardListen | Call::ListPorts) {
        let why = "the agent of its node is older, from before forwards: upgrade it";
        return (Reason::ForwardRefused, why);
    }
    (Reason::Invariant, "its agent is too old for this call")
}

fn chain(status: &Status) -> String {
    with_causes(status.message().to_owned(), std::error::Error::source(status))
}

/// Returns true when the operating system reports that the connection could not be made.
fn never_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::NetworkDown
                    | io::ErrorKind::AddrNotAvailable
            );
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_agent_refuses_forwards_and_it_is_said_why() {
        let told = |call| {
            let error = decode(call, &Status::unimplemented(""));
            let Error::Refused { reason, message, .. } = error else { panic!("{error:?}") };
            (reason, message)
        };
        for call in [Call::Forward, Call::ForwardListen, Call::ListPorts] {
            let (reason, message) = told(call);
            assert_eq!(reason, Reason::ForwardRefused, "{call:?}");
            assert!(message.contains("older"), "{message}");
        }
        assert_eq!(told(Call::Files).0, Reason::Invariant);
    }
}
