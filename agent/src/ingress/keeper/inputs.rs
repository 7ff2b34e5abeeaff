//! Files that Caddy reads at its start, and the record of the Caddy that was started last.

use std::{fs, io, path::Path, time::UNIX_EPOCH};

use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256};

use crate::{
    ingress::{settings::Settings, switch::Record, version::Version},
    sys::read,
};

/// All that Caddy reads at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// Digest of it.
    pub digest: String,
    /// Time of its last change, milliseconds since 1970.
    pub changed_ms: u64,
}

/// Reads what Caddy reads at its start: its configuration and certificates. A new version of Caddy counts as
/// a change, too.
///
/// # Errors
/// When a file cannot be read.
pub fn inputs(settings: &Settings, config: &Path, version: Option<Version>) -> io::Result<Inputs> {
    let peers = settings.peers.iter();
    let certificates = peers.flat_map(|peers| [&peers.ca, &peers.cert, &peers.key]);
    let own = settings.secure.iter().map(|secure| secure.certificate.copy());
    let files = certificates.chain(own).map(|path| Path::new(path.as_str()));
    let (mut all, mut changed_ms) = (Sha256::new(), 0);
    for path in [config].into_iter().chain(files) {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        all.update(Sha256::digest(read::whole(path, read::LARGE).map_err(named)?));
        let modified = fs::metadata(path).and_then(|about| about.modified()).map_err(named)?;
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        changed_ms = changed_ms.max(daemon::clock::millis(since));
    }
    if let Some(version) = version {
        all.update(version.to_string());
    }
    let digest = HEXLOWER.encode(&all.finalize());
    Ok(Inputs { digest, changed_ms })
}

/// Returns the record of the last start. One that cannot be read is none: the time of the start decides then.
pub fn record(path: &Path) -> Option<Record> {
    let bytes = read::whole(path, read::SMALL).ok()?;
    serde_json::from_slice(&bytes).ok()
}
