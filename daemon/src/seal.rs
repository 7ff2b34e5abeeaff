//! Secrets at rest: sealed with a key of this machine, so that a copy of a database without the key
//! gives nothing of them.
//!
//! ```text
//!  sealed = version (1 byte) | nonce (12 bytes) | ciphertext and tag of AES-256-GCM
//! ```
//! A sealed text belongs to one place, such as "env of SANDBOX": moved to another one, it does not
//! open. The nonce is random and fresh each time.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    ops::Deref,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    rand,
};
use rusqlite::Connection;

/// Name of the key's file in the state directory of a daemon.
pub const KEY_FILE: &str = "secret.key";

/// Bytes by which a sealed text is longer than its secret: the version, the nonce and the tag.
pub const OVERHEAD: usize = 1 + NONCE_LEN + 16;

/// Bytes of a key.
const KEY_BYTES: usize = 32;
/// Form of a sealed text. A later form, or one with another key, has another number.
const VERSION: u8 = 1;

/// Failure to seal or to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not sealed with this key for this place, or changed since.
    #[error("it is not sealed with this key, or was changed")]
    Unopened,
    /// Sealed by a later version of the program.
    #[error("a later version has sealed it, in the form {0}")]
    Version(u8),
    /// Nothing could be sealed.
    #[error("it could not be sealed")]
    Unsealed,
}

/// Origin of a key that [`Key::at`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The file was there.
    Found,
    /// There was no file: the key is new.
    Made,
    /// The file held no key, and was renamed: the key is new.
    Replaced,
}

/// A database, with the key for what is sealed in it.
#[derive(Debug, Clone, Copy)]
pub struct Db<'a> {
    /// Connection to the database.
    pub connection: &'a Connection,
    /// The key.
    pub key: &'a Key,
}

impl Deref for Db<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
    }
}

/// Removes from a database's file, and from its log, what was deleted or replaced: SQLite leaves such
/// bytes where they are. Returns false when another connection was in the way.
///
/// # Errors
/// When there is no room for a copy of the database.
pub fn scrub(db: &Connection) -> rusqlite::Result<bool> {
    db.execute_batch("VACUUM")?;
    let busy: bool = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    Ok(!busy)
}

/// Key of this machine. Its bytes are shown nowhere.
pub struct Key(RandomizedNonceKey);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// Creates a random key that is kept in memory alone.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        Self::of(&random()?)
    }

    /// Reads the key in a file; makes it if there is none. Of several processes that do so at the same
    /// time, all get the same key. A file that holds no key is renamed to `NAME.broken`.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn at(path: &Path) -> io::Result<(Self, Origin)> {
        let mut origin = Origin::Found;
        // Made between the two looks by another process at the most.
        for _ in 0..3 {
            let mut bytes = Vec::with_capacity(KEY_BYTES + 1);
            match File::open(path) {
                Ok(file) => file.take(KEY_BYTES as u64 + 1).read_to_end(&mut bytes).map(drop)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if make(path)? && origin == Origin::Found {
                        origin = Origin::Made;
                    }
                    continue;
                }
                Err(error) => return Err(error),
            }
            if let Ok(bytes) = <&[u8; KEY_BYTES]>::try_from(bytes.as_slice()) {
                return Ok((Self::of(bytes)?, origin));
            }
            fs::rename(path, with(path, ".broken"))?;
            origin = Origin::Replaced;
        }
        let why = format!("{} is a link to nothing, or changes while it is read", path.display());
        Err(io::Error::other(why))
    }

    fn of(bytes: &[u8; KEY_BYTES]) -> io::Result<Self> {
        let key = RandomizedNonceKey::new(&AES_256_GCM, bytes);
        key.map(Self).map_err(|_| io::Error::other("AES-256-GCM takes no key"))
    }

    /// Seals a secret for a place.
    ///
    /// # Errors
    /// `Unsealed`: when the library fails.
    pub fn seal(&self, place: &str, secret: &[u8]) -> Result<Vec<u8>, Error> {
        let mut text = secret.to_vec();
        let nonce = self.0.seal_in_place_append_tag(aad(place), &mut text);
        let nonce = nonce.map_err(|_| Error::Unsealed)?;
        let nonce: &[u8; NONCE_LEN] = nonce.as_ref();
        let mut sealed = Vec::with_capacity(1 + NONCE_LEN + text.len());
        sealed.push(VERSION);
        sealed.extend_from_slice(nonce);
        sealed.append(&mut text);
        Ok(sealed)
    }

    /// Opens what was sealed for a place.
    ///
    /// # Errors
    /// When it was sealed with another key or for another place, is changed, or of a later version.
    pub fn open(&self, place: &str, sealed: &[u8]) -> Result<Vec<u8>, Error> {
        let (version, rest) = sealed.split_first().ok_or(Error::Unopened)?;
        if *version != VERSION {
            return Err(Error::Version(*version));
        }
        let (nonce, text) = rest.split_first_chunk::<NONCE_LEN>().ok_or(Error::Unopened)?;
        let mut text = text.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.0.open_in_place(nonce, aad(place), &mut text);
        let length = opened.map_err(|_| Error::Unopened)?.len();
        text.truncate(length);
        Ok(text)
    }
}

fn aad(place: &str) -> Aad<&[u8]> {
    Aad::from(place.as_bytes())
}

fn random() -> io::Result<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    rand::fill(&mut bytes).map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(bytes)
}

/// Makes the key's file, durably; false when another process was first.
fn make(path: &Path) -> io::Result<bool> {
    let draft = with(path, &format!(".{}.new", std::process::id()));
    // One that a crash has left may be linked already, so it is not written to.
    drop(fs::remove_file(&draft));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&draft)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = File::open(dir.unwrap_or(Path::new(".")))?;
    // Root may be the first to come, before the daemon whose directory it is.
    let owner = dir.metadata()?;
    if owner.uid() != file.metadata()?.uid() {
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(&random()?)?;
    file.sync_all()?;
    // A link, because a rename would replace the key that another process has made meanwhile.
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    dir.sync_all()?;
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        done => done.map(|()| true),
    }
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    fn key() -> Key {
        Key::random().expect("random numbers")
    }

    proptest! {
        #[test]
        fn sealed_secret_opens_in_its_place_alone(
            secret in proptest::collection::vec(any::<u8>(), 0..300),
            place in "[a-z ]{0,20}",
            other in "[a-z ]{0,20}",
        ) {
            let key = key();
            let sealed = key.seal(&place, &secret).expect("sealed");
            prop_assert_eq!(sealed.len(), secret.len() + OVERHEAD);
            prop_assert_eq!(key.open(&place, &sealed), Ok(secret.clone()));
            let there = key.open(&other, &sealed);
            prop_assert_eq!(there.is_ok(), place == other);
            prop_assert!(super::tests::key().open(&place, &sealed).is_err());
            // The same secret looks different each time.
            prop_assert_ne!(key.seal(&place, &secret).expect("sealed"), sealed);
        }

        #[test]
        fn any_flipped_bit_fails(
            secret in proptest::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let key = key();
            let mut sealed = key.seal("here", &secret).expect("sealed");
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(key.open("here", &sealed).is_err());
        }

        #[test]
        fn truncated_or_longer_text_fails(
            secret in proptest::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(),
        ) {
            let key = key();
            let mut sealed = key.seal("here", &secret).expect("sealed");
            let part = at.index(sealed.len());
            prop_assert!(key.open("here", &sealed[..part]).is_err());
            sealed.push(0);
            prop_assert!(key.open("here", &sealed).is_err());
        }

        #[test]
        fn nonsense_is_refused(sealed in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(key().open("here", &sealed).is_err());
        }
    }

    #[test]
    fn later_form_is_named() {
        assert_eq!(key().open("here", &[9, 1, 2]), Err(Error::Version(9)));
    }

    #[test]
    fn key_is_made_once_and_for_its_owner_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(KEY_FILE);
        let (first, origin) = Key::at(&path).expect("made");
        assert_eq!(origin, Origin::Made);
        let sealed = first.seal("here", b"secret").expect("sealed");
        let (again, origin) = Key::at(&path).expect("read");
        assert_eq!(origin, Origin::Found);
        assert_eq!(again.open("here", &sealed), Ok(b"secret".to_vec()));
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(dir.path().read_dir().expect("listed").count(), 1, "no draft is left");
        assert!(!format!("{first:?}").contains(|c: char| c.is_ascii_digit()));
    }

    #[test]
    fn file_without_a_key_is_kept_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(KEY_FILE);
        fs::write(&path, "half").expect("written");
        assert_eq!(Key::at(&path).expect("made").1, Origin::Replaced);
        assert_eq!(Key::at(&path).expect("read").1, Origin::Found);
        assert_eq!(fs::read(with(&path, ".broken")).expect("kept"), b"half");
    }

    #[test]
    fn concurrent_first_starts_get_one_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(KEY_FILE);
        // As two processes do: the draft of a process has its own name.
        fs::write(with(&path, ".draft"), [7; KEY_BYTES]).expect("written");
        fs::hard_link(with(&path, ".draft"), &path).expect("the other was first");
        assert!(!make(&path).expect("looked"));
        assert_eq!(fs::read(&path).expect("read"), [7; KEY_BYTES]);
    }
}
