//! A certificate and its key in two files, replaced as one.
//!
//! ```text
//!  KEY.next (new key, durable) -> request, signed elsewhere -> CERT replaced -> KEY.next becomes KEY
//! ```
//! The certificate is the moment of the change: after a crash behind it, the certificate fits the key
//! in `KEY.next`, and `recover` finishes the change. Before it, the old pair is whole.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use crate::{
    replace::{Access, replace},
    text::read_if_there as read,
    tls,
};

/// Paths of a certificate and its key.
#[derive(Debug, Clone)]
pub struct KeyFiles {
    /// File with the certificate, PEM; everybody may read it.
    pub certificate: PathBuf,
    /// File with its private key, PEM.
    pub key: PathBuf,
    /// Permissions of the key.
    pub access: Access,
}

impl KeyFiles {
    /// Path of a key whose certificate is not there yet.
    fn next(&self) -> PathBuf {
        self.key.with_added_extension("next")
    }

    /// Keeps other processes from changing the files until it is dropped; `None` while another one does.
    ///
    /// # Errors
    /// When the file beside the key, which is locked, cannot be made.
    pub fn lock(&self) -> io::Result<Option<File>> {
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(self.key.with_added_extension("lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// File that says what the key which waits was made for.
    fn purpose(&self) -> PathBuf {
        self.key.with_added_extension("next.for")
    }

    /// Returns the key that waits, PEM, if it was made for this purpose.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn waiting_for(&self, purpose: &str) -> io::Result<Option<String>> {
        let same = !purpose.is_empty() && read(&self.purpose())?.as_deref() == Some(purpose);
        if same { self.waiting() } else { Ok(None) }
    }

    /// Stores a new key for a purpose, so that a repeated call finds it. Durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn prepare_for(&self, key: &str, purpose: &str) -> io::Result<()> {
        // After a crash in between, the key is for nothing, and is made again.
        self.forget_purpose()?;
        self.prepare(key)?;
        replace(&self.purpose(), purpose.as_bytes(), Access::PRIVATE)
    }

    fn forget_purpose(&self) -> io::Result<()> {
        match fs::remove_file(self.purpose()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Returns the key that waits for its certificate, PEM.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn waiting(&self) -> io::Result<Option<String>> {
        read(&self.next())
    }

    /// Stores a new key, which waits for its certificate. Durable.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn prepare(&self, key: &str) -> io::Result<()> {
        replace(&self.next(), key.as_bytes(), self.access)
    }

    /// Installs the certificate of the key that waits.
    ///
    /// # Errors
    /// When it does not fit that key, or a file cannot be written: then the old pair is still there.
    pub fn install(&self, certificate: &str) -> io::Result<()> {
        let key = self.waiting()?.unwrap_or_default();
        if !tls::fits(certificate.as_bytes(), key.as_bytes()) {
            let why = "the certificate does not fit the key that was made for it";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let access = Access { mode: 0o644, group: None };
        replace(&self.certificate, certificate.as_bytes(), access)?;
        self.put_key()
    }

    /// Finishes what a crash has interrupted. Returns true when there was something to finish.
    ///
    /// # Errors
    /// When a file cannot be read or renamed.
    pub fn recover(&self) -> io::Result<bool> {
        let (Some(certificate), Some(next)) = (read(&self.certificate)?, self.waiting()?) else {
            return Ok(false);
        };
        let key = read(&self.key)?.unwrap_or_default();
        let fits = |key: &str| tls::fits(certificate.as_bytes(), key.as_bytes());
        if fits(&key) || !fits(&next) {
            return Ok(false);
        }
        self.put_key()?;
        Ok(true)
    }

    fn put_key(&self) -> io::Result<()> {
        fs::rename(self.next(), &self.key)?;
        self.forget_purpose()?;
        let dir = self.key.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// Creates a key and its certificate, PEM.
    fn pair() -> (String, String) {
        let key = KeyPair::generate().expect("key");
        let params = CertificateParams::new(vec!["test.internal".into()]).expect("params");
        let certificate = params.self_signed(&key).expect("certificate").pem();
        (key.serialize_pem(), certificate)
    }

    fn files(dir: &Path) -> KeyFiles {
        let (certificate, key) = (dir.join("a.crt"), dir.join("a.key"));
        KeyFiles { certificate, key, access: Access::PRIVATE }
    }

    fn fits(files: &KeyFiles) -> bool {
        let read = |path: &Path| fs::read(path).expect("read");
        tls::fits(&read(&files.certificate), &read(&files.key))
    }

    #[test]
    fn pair_is_replaced_only_by_a_certificate_of_the_new_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = files(dir.path());
        let ((first, its), (second, other)) = (pair(), pair());
        files.prepare(&first).expect("stored");
        files.install(&other).expect_err("of another key");
        files.install(&its).expect("installed");
        assert!(fits(&files) && files.waiting().expect("read").is_none());
        // A new key alone changes nothing.
        files.prepare(&second).expect("stored");
        assert!(fits(&files) && !files.recover().expect("looked"));
        assert_eq!(fs::read_to_string(&files.key).expect("read"), first);
        files.install(&other).expect("installed");
        assert_eq!(fs::read_to_string(&files.key).expect("read"), second);
    }

    #[test]
    fn waiting_key_is_found_again_only_for_its_purpose() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = files(dir.path());
        let ((first, its), (second, _)) = (pair(), pair());
        files.prepare_for(&first, "one").expect("stored");
        let waiting = |purpose: &str| files.waiting_for(purpose).expect("read");
        assert_eq!(waiting("one").as_deref(), Some(first.as_str()));
        assert_eq!((waiting("two"), waiting("")), (None, None));
        // Of a key for nothing, such as a renewal's, nobody says that it is for something.
        files.prepare_for(&second, "").expect("stored");
        assert_eq!((waiting("one"), waiting("")), (None, None));
        files.prepare_for(&first, "one").expect("stored");
        files.install(&its).expect("installed");
        assert_eq!(waiting("one"), None);
        let left = fs::read_dir(dir.path()).expect("listed").count();
        assert_eq!(left, 2, "the certificate and its key");
    }

    #[test]
    fn only_one_process_at_a_time_changes_the_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = files(dir.path());
        let held = files.lock().expect("tried").expect("free");
        assert!(files.lock().expect("tried").is_none());
        drop(held);
        assert!(files.lock().expect("tried").is_some());
    }

    #[test]
    fn crash_between_certificate_and_key_is_finished_at_the_next_start() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = files(dir.path());
        let ((first, its), (second, other)) = (pair(), pair());
        files.prepare(&first).expect("stored");
        files.install(&its).expect("installed");
        files.prepare(&second).expect("stored");
        fs::write(&files.certificate, &other).expect("the crash came after this");
        assert!(!fits(&files));
        assert!(files.recover().expect("finished"));
        assert!(fits(&files) && !files.recover().expect("nothing is left"));
    }
}
