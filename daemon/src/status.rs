//! The form of every error on the wire: a gRPC code, a sentence, and `google.rpc.ErrorInfo` with a
//! constant reason that callers branch on. Each crate builds these in one table.

use std::{collections::HashMap, time::Duration};

use proto::{
    id::Invalid,
    reason::{DOMAIN, Reason},
};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

/// Error to be sent on the wire.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Reason that callers branch on; it determines the gRPC code.
    pub reason: Reason,
    /// Sentence that says what is wrong and, if possible, what to do.
    pub message: String,
    /// Field of the request that is invalid.
    pub field: Option<&'static str>,
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
        if let Some(delay) = refusal.retry_after {
            details.set_retry_info(Some(delay));
        }
        Self::with_error_details(refusal.reason.code(), refusal.message, details)
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
    fn what_goes_on_the_wire_comes_back() {
        let refusal = Refusal::new(Reason::NoCapacity, "full")
            .retry_after(Duration::from_millis(1500))
            .with("node", "n1");
        let status = Status::from(refusal);
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "full"));
        let (why, metadata) = info(&status).expect("ours");
        assert_eq!((why.as_str(), metadata["node"].as_str()), ("NO_CAPACITY", "n1"));
        assert_eq!(retry_after(&status), Some(Duration::from_millis(1500)));
        assert_eq!(reason(&Status::internal("x")), None);
    }

    #[test]
    fn a_wrong_field_is_named() {
        let status = Status::from(Refusal::from(Invalid::new("request_id", "must be short")));
        let bad = status.get_details_bad_request().expect("bad request");
        assert_eq!(bad.field_violations[0].field, "request_id");
        assert_eq!(reason(&status), Some(Reason::FieldInvalid));
    }
}
