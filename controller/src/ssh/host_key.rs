//! Host key of the SSH server: made once, and kept. Clients pin it, so a new one looks to them like an attack.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use daemon::replace::{Access, replace};
use russh::keys::{
    PrivateKey,
    ssh_key::{LineEnding, private::Ed25519Keypair},
};

use crate::access::ssh_keys;

/// Most bytes of the file.
const BYTES_MAX: u64 = 16 * 1024;

/// Failure to load or to make the key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file has no key.
    #[error("{}: no private key of OpenSSH; restore it from a backup, or remove it and tell all users", .0.display())]
    Key(PathBuf),
}

/// Returns the path of the key in the controller's directory.
pub fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("ssh_host_ed25519_key")
}

/// Key that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Fingerprint, as OpenSSH shows it.
    pub fingerprint: String,
    /// Mode of the file.
    pub mode: u32,
}

/// Looks at the key. `None`: there is none.
///
/// # Errors
/// When the file cannot be read, or has no key.
pub fn look(data_dir: &Path) -> Result<Option<Found>, Error> {
    let path = path(data_dir);
    let read = load(&path).and_then(|text| Ok((text, fs::metadata(&path)?.permissions().mode())));
    match read {
        Ok((text, mode)) => {
            let key = PrivateKey::from_openssh(&text).map_err(|_| Error::Key(path))?;
            let fingerprint = ssh_keys::fingerprint_of(key.public_key());
            Ok(Some(Found { fingerprint, mode: mode & 0o7777 }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { path, source }),
    }
}

/// Loads the key; makes it where there is none.
///
/// # Errors
/// When the file cannot be read or written, or has no key.
pub fn load_or_make(data_dir: &Path) -> Result<PrivateKey, Error> {
    let path = path(data_dir);
    match load(&path) {
        Ok(text) => PrivateKey::from_openssh(&text).map_err(|_| Error::Key(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(&path).map_err(|source| Error::File { path, source })
        }
        Err(source) => Err(Error::File { path, source }),
    }
}

fn load(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn make(path: &Path) -> io::Result<PrivateKey> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    let key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
    let text = key.to_openssh(LineEnding::LF).map_err(io::Error::other)?;
    replace(path, text.as_bytes(), Access { mode: 0o600, group: None })?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_made_once_and_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = load_or_make(dir.path()).expect("made");
        let mode = std::fs::metadata(path(dir.path())).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = load_or_make(dir.path()).expect("loaded");
        assert_eq!(first.public_key(), again.public_key());
        std::fs::write(path(dir.path()), "nonsense").expect("written");
        assert!(matches!(load_or_make(dir.path()), Err(Error::Key(_))), "it is never made anew");
    }
}
