//! Configuration of a daemon: one TOML file, read once at the start.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Failure to read or parse the configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not readable.
    #[error("cannot read {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Reason.
        source: std::io::Error,
    },
    /// The content is not valid; the source shows line and column.
    #[error("{} is not a valid configuration", path.display())]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// Position and reason.
        source: toml::de::Error,
    },
}

/// Reads a configuration. Types use `deny_unknown_fields`, so that a misspelt key is an error.
///
/// # Errors
/// When the file cannot be read or parsed.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Parses the content of a configuration that is, or will be, at `path`.
///
/// # Errors
/// When the content is not valid.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|source| Error::Parse { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only parsed")]
    struct Sample {
        listen: String,
    }

    #[test]
    fn a_misspelt_key_is_shown_with_its_line() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "listen = \"a\"\nlitsen = 1\n").expect("write");
        let error = load::<Sample>(&path).expect_err("unknown key");
        let text = crate::chain::Chain(&error).to_string();
        assert!(
            text.contains("c.toml") && text.contains("line 2") && text.contains("litsen"),
            "{text}"
        );
    }
}
