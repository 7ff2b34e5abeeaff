//! How a command fails: one sentence for stderr and an exit code.

use std::fmt;
use std::io;
use std::path::Path;

/// A failed command. Real `pct` exits with whatever errno Perl had left over (2, 4 or 255), so the
/// code is set where the failure is made and means nothing.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What goes to stderr; may have several lines.
    pub message: String,
    /// The exit code when it happens outside a worker; inside one it is always 255.
    pub code: u8,
    /// The process was told to end, or its reader went away: undo, then say so.
    pub interrupted: bool,
    /// A fault asked for exactly this exit code.
    pub forced: bool,
}

/// What commands return.
pub type Result<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    /// The usual failure, exit 255.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 255, interrupted: false, forced: false }
    }

    /// A failure that leaves another code.
    pub fn coded(code: u8, message: impl Into<String>) -> Self {
        Self { code, ..Self::new(message) }
    }

    /// A signal came while a step was under way.
    #[must_use]
    pub fn interrupt(message: impl Into<String>) -> Self {
        Self { interrupted: true, ..Self::new(message) }
    }

    /// The reader of stdout has gone.
    #[must_use]
    pub fn broken_pipe() -> Self {
        Self::interrupt("broken pipe ")
    }

    /// An operation on a path failed.
    #[must_use]
    pub fn io(doing: &str, path: &Path, error: &io::Error) -> Self {
        Self::coded(2, format!("unable to {doing} '{}' - {}", path.display(), reason(error)))
    }

    /// The same failure with words in front.
    #[must_use]
    pub fn prefixed(mut self, prefix: &str) -> Self {
        self.message = format!("{prefix}{}", self.message);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The system's words for an error, without Rust's "(os error N)".
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Drops a result that nothing depends on, on purpose.
pub fn ignore<T, E>(_: std::result::Result<T, E>) {}
