//! The form of every error on the wire: a gRPC code, a sentence, and `google.rpc.ErrorInfo` with a
//! constant reason that callers branch on. Each crate builds these in one table.

use std::{borrow::Cow, collections::HashMap, time::Duration};

use proto::{
    id::Invalid,
    reason::{DOMAIN, Reason},
};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

/// Delay before a retry where a temporary refusal names none.
const RETRY: Duration = Duration::from_secs(1);

/// Header with the delay before a retry, seconds.
pub const RETRY_AFTER: &str = "retry-after";
/// Key of the metadata with the number of files that were written before one failed.
pub const FILES_WRITTEN: &str = "files_written";
/// Key of the metadata with the path of the file that could not be written.
pub const FAILED_PATH: &str = "failed_path";

/// Error to be sent on the wire.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Reason that callers branch on; it determines the gRPC code.
    pub reason: Reason,
    /// Sentence that says what is wrong and, if possible, what to do.
    pub message: String,
    /// Field of the request that is invalid.
    pub field: Option<Cow<'static, str>>,
    /// Delay before a retry.
    pub retry_after: Option<Duration>,
    /// Further data for programs, such as `node`.
    pub metadata: HashMap<String, String>,
}

impl Refusal {
    /// Creates an error with a reason and a sentence.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            field: None,
            retry_after: None,
            metadata: HashMap::new(),
        }
    }

    /// Adds a delay for a retry.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Adds a pair of data for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }
}

impl From<Invalid> for Refusal {
    fn from(invalid: Invalid) -> Self {
        let mut refusal = Self::new(Reason::FieldInvalid, invalid.to_string());
        refusal.field = Some(invalid.what);
        refusal
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(refusal.reason.name(), DOMAIN, refusal.metadata);
        if let Some(field) = refusal.field {
            details.add_bad_request_violation(field, refusal.message.clone());
        }
        let again = refusal.reason.is_temporary().then_some(RETRY);
        if let Some(delay) = refusal.retry_after.or(again) {
            details.set_retry_info(Some(delay));
        }
        let mut status = Self::with_error_details(refusal.reason.code(), refusal.message, details);
        if let Some(delay) = refusal.retry_after.or(again) {
            // Whole seconds, as HTTP has it: for those that do not decode the details.
            let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
            status.metadata_mut().insert(RETRY_AFTER, seconds.into());
        }
        status
    }
}

/// Name of the reason, and metadata, of an error of ours; `None` for a status of other origin.
pub fn info(status: &Status) -> Option<(String, HashMap<String, String>)> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some((info.reason, info.metadata))
}

/// Reason of an error of ours; UNSPECIFIED for one that is newer than this program.
pub fn reason(status: &Status) -> Option<Reason> {
    info(status).map(|(name, _)| Reason::named(&name).unwrap_or_default())
}

/// Delay before a retry, if the status has one.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn refusal_round_trips_through_a_status() {
        let refusal = Refusal::new(Reason::NoCapacity, "full")
            .retry_after(Duration::from_millis(1500))
            .with("node", "n1");
        let status = Status::from(refusal);
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "full"));
        let (why, metadata) = info(&status).expect("ours");
        assert_eq!((why.as_str(), metadata["node"].as_str()), ("NO_CAPACITY", "n1"));
        assert_eq!(retry_after(&status), Some(Duration::from_millis(1500)));
        assert_eq!(status.metadata().get(RETRY_AFTER).expect("a header"), "2");
        assert_eq!(reason(&Status::internal("x")), None);
    }

    #[test]
    fn temporary_refusal_always_says_when_to_try_again() {
        let after = |reason| retry_after(&Status::from(Refusal::new(reason, "no")));
        assert_eq!(after(Reason::TooManyCalls), Some(RETRY));
        assert_eq!(after(Reason::NoQuorum), Some(RETRY));
        for permanent in [Reason::TooLarge, Reason::NeverFits, Reason::SandboxNotFound] {
            assert_eq!(after(permanent), None);
            assert!(Status::from(Refusal::new(permanent, "no")).metadata().is_empty());
        }
    }

    #[test]
    fn invalid_field_is_named_in_the_status() {
        let status = Status::from(Refusal::from(Invalid::new("request_id", "must be short")));
        let bad = status.get_details_bad_request().expect("bad request");
        assert_eq!(bad.field_violations[0].field, "request_id");
        assert_eq!(reason(&status), Some(Reason::FieldInvalid));
    }
}
