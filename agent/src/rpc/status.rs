//! The one table from the reasons of the domain to the codes of gRPC.

use daemon::status::Refusal;
use proto::reason;
use tonic::Code;

use crate::sandbox::Error;

/// An error of the domain as it goes on the wire.
pub fn refusal(error: Error) -> Refusal {
    let mut refusal = Refusal::new(code(error.reason), error.reason, error.message);
    refusal.retry_after = error.retry_after;
    refusal
}

fn code(reason: &str) -> Code {
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
        // The controller's own; no agent says it.
        reason::EVENTS_GONE => Code::OutOfRange,
        reason::STALE_EPOCH | reason::REVISION_CONFLICT | reason::EXEC_LOST => Code::Aborted,
        reason::NODE_UNREACHABLE
        | reason::NO_QUORUM
        | reason::CONTAINER_LOCKED
        | reason::SHUTTING_DOWN => Code::Unavailable,
        reason::OUTCOME_UNKNOWN | reason::PROBE_TIMEOUT => Code::DeadlineExceeded,
        // PCT_FAILED, EXEC_FAILED, STORE_FAILED, INVARIANT.
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each reason is documented with its code: `/// CODE: what it means.`
    #[test]
    fn codes_are_as_documented() {
        let source = include_str!("../../../proto/src/reason.rs");
        let mut documented = None;
        let mut seen = 0;
        for line in source.lines().map(str::trim) {
            if let Some((code, _)) = line.strip_prefix("/// ").and_then(|l| l.split_once(": ")) {
                documented = Some(code);
            } else if let Some(name) = line.strip_suffix(';')
                && reason::ALL.contains(&name)
            {
                let code: String = format!("{:?}", code(name))
                    .chars()
                    .flat_map(|c| c.is_uppercase().then_some('_').into_iter().chain([c]))
                    .collect();
                let code = code.trim_start_matches('_').to_ascii_uppercase();
                assert_eq!(documented.take(), Some(code.as_str()), "{name}");
                seen += 1;
            }
        }
        assert_eq!(seen, reason::ALL.len());
    }
}
