//! flock(2), the lock that PVE's own tools take around a container's config.

use std::{
    fs::{File, OpenOptions},
    io,
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::time::Instant;

/// Interval of attempts: a blocking flock(2) would hold a thread.
const RETRY: Duration = Duration::from_millis(20);

/// Takes the lock until it is dropped; `None` when another process holds it until `deadline`.
pub async fn lock(path: &Path, deadline: Instant) -> io::Result<Option<Flock<File>>> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((same, Errno::EWOULDBLOCK)) => file = same,
            Err((_, error)) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        tokio::time::sleep(RETRY).await;
    }
}
