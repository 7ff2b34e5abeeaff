//! Key of a client certificate: made here, written here, and sent nowhere.

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rcgen::{CertificateParams, KeyPair};

use crate::failure::Failure;

/// New key, and the file that waits for it.
pub(super) struct ClientKey {
    key: KeyPair,
    /// Certificate request, PEM.
    pub(super) request: String,
    path: PathBuf,
    file: File,
}

/// Makes a key and an empty file for it, which must not be there yet.
///
/// # Errors
/// When the file cannot be made.
pub(super) fn make(path: &Path) -> Result<ClientKey, Failure> {
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        let message = format!("cannot make {}: {error}", path.display());
        Failure::usage(message, "--certificate must name a file that is not there yet")
    })?;
    let failed = |error: rcgen::Error| Failure::local(format!("cannot make a key: {error}"));
    let key = KeyPair::generate().map_err(failed)?;
    let request = CertificateParams::default().serialize_request(&key).map_err(failed)?;
    let request = request.pem().map_err(failed)?;
    Ok(ClientKey { key, request, path: path.to_owned(), file })
}

impl ClientKey {
    /// Writes certificate and key to the file; returns its path.
    ///
    /// # Errors
    /// When it cannot be written: the token is of no use then.
    pub(super) fn save(mut self, id: &str, certificate: &str) -> Result<PathBuf, Failure> {
        if certificate.is_empty() {
            return Err(Failure::local(format!(
                "the controller is too old for client certificates; it made a bearer token that nobody has seen: \
                 revoke it with `sandboxctl token revoke {id}`"
            )));
        }
        let text = format!("{certificate}{}", self.key.serialize_pem());
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_all());
        written.map_err(|error| {
            let path = self.path.display();
            Failure::local(format!(
                "cannot write {path}: {error}; revoke it with `sandboxctl token revoke {id}`"
            ))
        })?;
        Ok(std::mem::take(&mut self.path))
    }
}

impl Drop for ClientKey {
    /// Removes a file that has no certificate.
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // An empty file that stays only wants another name next time.
            drop(std::fs::remove_file(&self.path));
        }
    }
}
