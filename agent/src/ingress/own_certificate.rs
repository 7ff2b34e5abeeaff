//! Certificate of the operator's own: reads the files, judges them, and copies what is good to where Caddy may read
//! it. Certificate and key become one file, so that Caddy never reads one of two that do not fit.
//!
//! What is not good is not copied: Caddy goes on with the copy before.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use daemon::{peer, tls};
use proto::secret::Secret;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{caddy, decide::Domain, secure::wildcard, settings::CertificateFiles};
use crate::sys::read;

/// Name of the copy of the operator's certificate and key, beside Caddy's configuration.
const CERTIFICATE_COPY: &str = "caddy-certificate.pem";
/// Name of the copy of the token for the challenge by DNS, beside Caddy's configuration.
const TOKEN_COPY: &str = "caddy-dns-token";
/// Mode of a copy, as `caddy::put` sets it.
const COPY_MODE: u32 = 0o640;
/// Largest file of a certificate or a key, bytes.
const FILE_MAX: u64 = 256 * 1024;
/// Longest token with the spaces around it, bytes.
const TOKEN_MAX: u64 = 4 * 1024;
/// Characters of a line of PEM.
const LINE: usize = 64;
/// Mode bits by which others than the owner could read a token.
const FOR_OTHERS: u32 = 0o077;

/// Reason why a certificate, or the token to get one, is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// A file cannot be read.
    #[error("{} cannot be read: {why}", .path.display())]
    Unreadable {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// The file of the certificate has none, or one that is damaged.
    #[error("{} has no certificate that can be used: {why}", .path.display())]
    NoCertificate {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// The file of the key has none.
    #[error("{} has no private key that can be used (one with a password cannot)", .0.display())]
    NoKey(PathBuf),
    /// Certificate and key do not belong together.
    #[error(
        "the key in {} is not that of the first certificate in {}", .key.display(), .cert.display()
    )]
    OtherKey {
        /// File of the certificate.
        cert: PathBuf,
        /// File of the key.
        key: PathBuf,
    },
    /// The certificate does not cover the host names of sandboxes.
    #[error("the certificate in {} is for {names}, and not for {wanted}", .path.display())]
    OtherNames {
        /// File.
        path: PathBuf,
        /// Names in it.
        names: String,
        /// Name that must be in it.
        wanted: String,
    },
    /// The certificate has ended.
    #[error("the certificate in {} has ended", .0.display())]
    Ended(PathBuf),
    /// The certificate has not begun.
    #[error("the certificate in {} is not valid yet: does the clock go right?", .0.display())]
    NotYet(PathBuf),
    /// Others than root can read a token.
    #[error(
        "others than root can read {}: chown root {}; chmod 0600 {}",
        .0.display(), .0.display(), .0.display()
    )]
    Open(PathBuf),
    /// A token is none.
    #[error("{} must hold one token and nothing else", .0.display())]
    NoToken(PathBuf),
    /// The copy cannot be written.
    #[error("{} was not written: {why}", .path.display())]
    Unwritten {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
}

/// Lists the copies that the agent may have made beside Caddy's configuration.
pub fn copies(caddy_config: &Path) -> [PathBuf; 2] {
    [CERTIFICATE_COPY, TOKEN_COPY].map(|name| caddy_config.with_file_name(name))
}

/// Removes the copies beside Caddy's configuration that are not in use, and their drafts.
///
/// # Errors
/// When a file is there and cannot be removed.
pub fn remove_unused(caddy_config: &Path, used: Option<&Path>) -> io::Result<()> {
    for path in copies(caddy_config).iter().filter(|path| used != Some(path.as_path())) {
        for path in [path.clone(), path.with_added_extension("new")] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let why = format!("{} was not removed: {error}", path.display());
                    return Err(io::Error::new(error.kind(), why));
                }
                Ok(()) | Err(_) => {}
            }
        }
    }
    Ok(())
}

/// Judges certificate and key at a time, milliseconds since 1970. Returns the key and then the certificates in one
/// text, PEM. What else stands in the files was not judged, and is left out.
///
/// # Errors
/// Says what is wrong with them.
pub fn judge(
    files: &CertificateFiles,
    cert: &str,
    key: &Secret<String>,
    domain: &Domain,
    now_ms: u64,
) -> Result<Secret<String>, Flaw> {
    let path = || files.cert.clone();
    let none = |why: String| Flaw::NoCertificate { path: path(), why };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(cert.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| none(error.to_string()))?;
    let lives: Vec<_> =
        chain.iter().map(|der| peer::validity(der)).collect::<Result<_, _>>().map_err(none)?;
    let (Some(leaf), Some(life)) = (chain.first(), lives.first()) else {
        return Err(none("it is empty".to_owned()));
    };
    let no_key = || Flaw::NoKey(files.key.clone());
    let private = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| no_key())?;
    let label = match &private {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        PrivateKeyDer::Pkcs8(_) => "PRIVATE KEY",
        _ => return Err(no_key()),
    };
    if !tls::fits(cert.as_bytes(), key.as_bytes()) {
        return Err(Flaw::OtherKey { cert: path(), key: files.key.clone() });
    }
    let names = peer::names(leaf).map_err(none)?;
    let wanted = wildcard(domain);
    if !names.iter().any(|name| name.eq_ignore_ascii_case(&wanted)) {
        let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
        return Err(Flaw::OtherNames { path: path(), names, wanted });
    }
    if life.not_after_ms <= now_ms {
        return Err(Flaw::Ended(path()));
    }
    if life.not_before_ms > now_ms {
        return Err(Flaw::NotYet(path()));
    }
    let mut both = Secret::new(String::new());
    push_block(&mut both, label, private.secret_der());
    for der in &chain {
        push_block(&mut both, "CERTIFICATE", der);
    }
    Ok(both)
}

/// Appends a block of PEM.
fn push_block(text: &mut String, label: &str, der: &[u8]) {
    let encoded = Secret::new(STANDARD.encode(der));
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    for line in encoded.as_bytes().chunks(LINE) {
        text.extend(line.iter().copied().map(char::from));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
}

/// Copies certificate and key to where Caddy reads them, if they are good. Returns true when the copy was
/// written: they are others than before, or its mode or group was not right.
///
/// # Errors
/// Says what is wrong with them, or why they were not copied. The copy before stays.
pub fn refresh(
    files: &CertificateFiles,
    domain: &Domain,
    group: Option<&str>,
    now_ms: u64,
) -> Result<bool, Flaw> {
    let cert = text(&files.cert)?;
    let key = Secret::new(text(&files.key)?);
    let both = judge(files, &cert, &key, domain, now_ms)?;
    copy(Path::new(files.copy.as_str()), &both, group)
}

/// Copies the token of a DNS provider to where Caddy reads it. Returns true when the copy was written.
///
/// # Errors
/// When the file cannot be read, others than root can read it, or it holds no token; or the copy cannot be written.
pub fn refresh_token(from: &Path, to: &Path, group: Option<&str>) -> Result<bool, Flaw> {
    let unreadable =
        |error: io::Error| Flaw::Unreadable { path: from.to_owned(), why: error.to_string() };
    let file = File::open(from).map_err(unreadable)?;
    // Of the file that is read: another may be in its place by now.
    let about = file.metadata().map_err(unreadable)?;
    if !is_private(about.uid(), about.mode()) {
        return Err(Flaw::Open(from.to_owned()));
    }
    let mut bytes = Secret::new(Vec::<u8>::new());
    let read = file.take(TOKEN_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let token = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    let is_plain = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    if read as u64 > TOKEN_MAX || !is_plain {
        return Err(Flaw::NoToken(from.to_owned()));
    }
    copy(to, &Secret::from(token), group)
}

/// Returns whether root alone can read a file with this owner and mode: root, or the user that this process runs as.
fn is_private(owner: u32, mode: u32) -> bool {
    let is_ours = owner == 0 || owner == nix::unistd::geteuid().as_raw();
    is_ours && mode & FOR_OTHERS == 0
}

fn text(path: &Path) -> Result<String, Flaw> {
    read::whole_text(path, FILE_MAX)
        .map_err(|error| Flaw::Unreadable { path: path.to_owned(), why: error.to_string() })
}

fn copy(to: &Path, text: &Secret<String>, group: Option<&str>) -> Result<bool, Flaw> {
    let unwritten =
        |error: io::Error| Flaw::Unwritten { path: to.to_owned(), why: error.to_string() };
    match read::whole(to, 2 * FILE_MAX + 2).map(Secret::new) {
        Ok(there) if there.as_slice() == text.as_bytes() => {
            if has_access(to, group).map_err(unwritten)? {
                return Ok(false);
            }
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unwritten(error)),
    }
    caddy::put(to, text, group).map_err(unwritten)?;
    Ok(true)
}

/// Returns whether a copy has the mode and the group that it should have.
fn has_access(path: &Path, group: Option<&str>) -> io::Result<bool> {
    let about = fs::metadata(path)?;
    let is_of_group = match group {
        None => true,
        Some(name) => {
            let found = nix::unistd::Group::from_name(name)?;
            found.is_some_and(|group| group.gid.as_raw() == about.gid())
        }
    };
    Ok(is_of_group && about.mode() & 0o7777 == COPY_MODE)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, time::Duration};

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    /// Second of the begin of the tests' certificates.
    const BEGIN_S: u64 = 1_700_000_000;
    /// Life of them, seconds.
    const LIFE_S: u64 = 90 * 86_400;
    const MIDDLE_MS: u64 = (BEGIN_S + LIFE_S / 2) * 1000;

    fn pair(names: &[&str]) -> (String, String) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        let at = |second| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(second);
        params.not_before = at(BEGIN_S);
        params.not_after = at(BEGIN_S + LIFE_S);
        let key = KeyPair::generate().expect("a key");
        (params.self_signed(&key).expect("signed").pem(), key.serialize_pem())
    }

    fn files(dir: &Path) -> CertificateFiles {
        let copy = dir.join("copy.pem");
        CertificateFiles {
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
            copy: copy.as_path().try_into().expect("a plain path"),
        }
    }

    fn domain() -> Domain {
        "sbx.test".parse().expect("a domain")
    }

    #[track_caller]
    fn judged(cert: &str, key: &str, now_ms: u64) -> Result<String, String> {
        let files = files(Path::new("/t"));
        let judged = judge(&files, cert, &key.to_owned().into(), &domain(), now_ms);
        judged.map(|both| both.to_string()).map_err(|flaw| flaw.to_string())
    }

    #[test]
    fn each_flaw_of_a_pair_is_told() {
        let (cert, key) = pair(&["example.com", "*.SBX.test"]);
        let (other_cert, other_key) = pair(&["*.sbx.test"]);
        let chain = format!("{cert}{other_cert}");
        let both = judged(&chain, &key, MIDDLE_MS).expect("good");
        assert!(
            both.starts_with(key.trim_end()) && both.trim_end().ends_with(other_cert.trim_end())
        );

        // What was not judged is left out: a leaf beside the key, a key beside the leaf, words.
        let (key_file, cert_file) =
            (format!("{other_cert}{key}"), format!("a\n{chain}{other_key}"));
        assert_eq!(judged(&cert_file, &key_file, MIDDLE_MS).expect("good"), both);

        let damaged = cert.replacen("MII", "MIX", 1);
        let (single, single_key) = pair(&["sbx.test", "a.sbx.test", "*.a.sbx.test"]);
        let (nameless, nameless_key) = pair(&[]);
        let end_ms = (BEGIN_S + LIFE_S) * 1000;
        for (cert, key, now_ms, word) in [
            ("", key.as_str(), MIDDLE_MS, "/t/cert.pem has no certificate that can be used"),
            (key.as_str(), &key, MIDDLE_MS, "/t/cert.pem has no certificate that can be used"),
            (&damaged, &key, MIDDLE_MS, "/t/cert.pem has no certificate that can be used"),
            (&format!("{cert}{damaged}"), &key, MIDDLE_MS, "/t/cert.pem has no certificate"),
            (&cert, "", MIDDLE_MS, "/t/key.pem has no private key"),
            (&cert, &cert, MIDDLE_MS, "/t/key.pem has no private key"),
            (&cert, &other_key, MIDDLE_MS, "the key in /t/key.pem is not that of the first"),
            // The certificate of the CA, or an old one, before that of the server.
            (&format!("{other_cert}{cert}"), &key, MIDDLE_MS, "is not that of the first"),
            (&single, &single_key, MIDDLE_MS, "is for sbx.test, a.sbx.test, *.a.sbx.test, and not"),
            (&nameless, &nameless_key, MIDDLE_MS, "is for no name, and not for *.sbx.test"),
            (&cert, &key, end_ms, "/t/cert.pem has ended"),
            (&cert, &key, (BEGIN_S - 1) * 1000, "/t/cert.pem is not valid yet"),
        ] {
            let why = judged(cert, key, now_ms).expect_err(word);
            assert!(why.contains(word), "{word}: {why}");
            assert!(!why.contains("PRIVATE"), "{why}");
        }
        judged(&cert, &key, BEGIN_S * 1000).expect("it has begun");
        judged(&cert, &key, end_ms - 1).expect("it has not ended");
    }

    #[test]
    fn good_pair_becomes_one_file_and_a_bad_one_leaves_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = files(dir.path());
        let write = |(cert, key): &(String, String)| {
            fs::write(&files.cert, cert).expect("written");
            fs::write(&files.key, key).expect("written");
        };
        let refresh = || refresh(&files, &domain(), None, MIDDLE_MS);
        let copied = || fs::read_to_string(files.copy.as_str()).unwrap_or_default();
        assert!(matches!(refresh(), Err(Flaw::Unreadable { .. })));
        let (first, second) = (pair(&["*.sbx.test"]), pair(&["*.sbx.test"]));
        write(&first);
        assert_eq!((refresh(), refresh()), (Ok(true), Ok(false)));
        let mode = fs::metadata(files.copy.as_str()).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        for other in [0o600, 0o644] {
            fs::set_permissions(files.copy.as_str(), fs::Permissions::from_mode(other))
                .expect("set");
            assert_eq!((refresh(), refresh()), (Ok(true), Ok(false)));
        }
        let before = copied();
        assert!(before.contains(first.0.trim_end()) && before.contains(first.1.trim_end()));
        // Half of a renewal.
        write(&(second.0.clone(), first.1));
        assert!(matches!(refresh(), Err(Flaw::OtherKey { .. })));
        assert_eq!(copied(), before);
        write(&second);
        assert_eq!(refresh(), Ok(true));
        assert!(copied().contains(second.1.trim_end()));
        fs::write(&files.cert, vec![b' '; 300_000]).expect("written");
        assert!(matches!(refresh(), Err(Flaw::Unreadable { .. })));
        // A copy that was damaged is made again.
        write(&second);
        fs::write(files.copy.as_str(), "x").expect("written");
        assert_eq!(refresh(), Ok(true));
    }

    #[test]
    fn token_is_copied_only_from_a_file_for_root_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("token"), dir.path().join("copy"));
        let refresh = || refresh_token(&from, &to, None);
        assert!(matches!(refresh(), Err(Flaw::Unreadable { .. })));
        fs::write(&from, "abc-123\n").expect("written");
        let mode = |mode| fs::set_permissions(&from, fs::Permissions::from_mode(mode));
        mode(0o644).expect("set");
        assert_eq!(refresh(), Err(Flaw::Open(from.clone())));
        mode(0o600).expect("set");
        assert_eq!((refresh(), refresh()), (Ok(true), Ok(false)));
        assert_eq!(fs::read_to_string(&to).expect("there"), "abc-123");
        for text in ["", "\n", "two words", "two\nlines", "\u{e4}"] {
            fs::write(&from, text).expect("written");
            assert_eq!(refresh(), Err(Flaw::NoToken(from.clone())), "{text:?}");
        }
        assert_eq!(fs::read_to_string(&to).expect("there"), "abc-123");
    }

    #[test]
    fn file_is_private_only_where_others_than_root_cannot_read_it() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(is_private(0, 0o100_600) && is_private(own, 0o100_400));
        assert!(!is_private(own + 1, 0o100_600));
        assert!(!is_private(0, 0o100_640) && !is_private(0, 0o100_604));
    }

    #[test]
    fn copies_that_no_setting_uses_are_removed_with_their_drafts() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("caddy.json");
        let [certificate, token] = copies(&config);
        let draft = dir.path().join("caddy-dns-token.new");
        for path in [&config, &certificate, &token, &draft] {
            fs::write(path, "x").expect("written");
        }
        remove_unused(&config, Some(&certificate)).expect("removed");
        assert!(certificate.exists() && !token.exists() && !draft.exists());
        remove_unused(&config, None).expect("removed");
        assert!(!certificate.exists() && config.exists());
    }
}
