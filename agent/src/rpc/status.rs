//! Errors of the domain on the wire.

use daemon::status::{FILES_WRITTEN, Refusal};

use crate::sandbox::Error;

/// Converts an error of the domain to its wire form.
pub fn refusal(error: Error) -> Refusal {
    let mut refusal = Refusal::new(error.reason, error.message);
    refusal.retry_after = error.retry_after;
    refusal.field = error.field;
    match error.files_written {
        Some(written) => refusal.with(FILES_WRITTEN, written.to_string()),
        None => refusal,
    }
}
