//! Failure of a command: one sentence for stderr and an exit code.

use std::fmt;
use std::io;
use std::path::Path;

/// A failed command. The real `pct` exits with the errno that Perl had left over (2, 4 or 255), so
/// the code is set where the failure is created and has no meaning.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Text for stderr; may have several lines.
    pub message: String,
    /// Exit code outside a worker; inside one it is always 255.
    pub code: u8,
    /// Whether the process was told to end or its reader was closed: undo first, then report it.
    pub interrupted: bool,
    /// Whether a fault set exactly this exit code.
    pub forced: bool,
}

pub type Result<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    /// Creates the usual failure, exit code 255.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 255, interrupted: false, forced: false }
    }

    /// Creates a failure with another exit code.
    pub fn coded(code: u8, message: impl Into<String>) -> Self {
        Self { code, ..Self::new(message) }
    }

    /// Creates the failure of a step that a signal interrupted.
    #[must_use]
    pub fn interrupt(message: impl Into<String>) -> Self {
        Self { interrupted: true, ..Self::new(message) }
    }

    /// Creates the failure of a write to a closed stdout.
    #[must_use]
    pub fn broken_pipe() -> Self {
        Self::interrupt("broken pipe ")
    }

    /// Creates the failure of an operation on a path.
    #[must_use]
    pub fn io(doing: &str, path: &Path, error: &io::Error) -> Self {
        Self::coded(2, format!("unable to {doing} '{}' - {}", path.display(), reason(error)))
    }

    /// Puts a prefix in front of the message.
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

/// Returns the system's text of an error, without Rust's "(os error N)".
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Drops a result on purpose: nothing depends on it.
pub fn ignore<T, E>(_: std::result::Result<T, E>) {}
