//! Errors of packing and unpacking.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Error of packing or unpacking.
#[derive(Debug)]
pub enum Error {
    /// A file cannot be read or written.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the file system.
        error: io::Error,
    },
    /// The archive is none, is not whole, or has an entry that is not taken.
    Invalid(String),
    /// The stream that the archive comes from or goes to has failed.
    Stream(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, error } => write!(f, "{}: {error}", path.display()),
            Self::Invalid(why) => write!(f, "the archive is not valid: {why}"),
            Self::Stream(error) => write!(f, "the archive broke off: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Creates the error of a file.
    pub(crate) fn file(path: &Path, error: impl Into<io::Error>) -> Self {
        Self::File { path: path.to_owned(), error: error.into() }
    }

    /// Creates the error of a file that is refused for its kind.
    pub(crate) fn refused(path: &Path, kind: io::ErrorKind, why: &'static str) -> Self {
        Self::file(path, io::Error::new(kind, why))
    }
}

/// Adds the path to an error of the file system.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, path: &Path) -> Result<T, Error> {
        self.map_err(|error| Error::file(path, error))
    }
}
