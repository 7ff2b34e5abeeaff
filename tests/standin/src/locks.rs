//! flock files: one per configuration and one per storage, at the real paths with the real
//! timeouts.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::signals::{Woken, wait};

/// Longest wait of most operations for a configuration or a storage.
const USUAL: Duration = Duration::from_secs(10);
/// Longest wait for the lock of a new configuration.
const CREATE: Duration = Duration::from_secs(5);

/// A held lock; dropping it unlocks the file.
#[derive(Debug)]
pub(crate) struct Held {
    _file: File,
}

/// Locks a container's configuration.
pub(crate) fn config(ctx: &Ctx, vmid: u32) -> Result<Held> {
    take(ctx, &config_path(ctx, vmid), USUAL)
}

/// Locks a configuration that is about to be created.
pub(crate) fn new_config(ctx: &Ctx, vmid: u32) -> Result<Held> {
    take(ctx, &config_path(ctx, vmid), CREATE)
}

/// Locks a storage.
pub(crate) fn storage(ctx: &Ctx, name: &str) -> Result<Held> {
    take(ctx, &ctx.roots.storage_lock_dir.join(format!("pve-storage-{name}")), USUAL)
}

fn config_path(ctx: &Ctx, vmid: u32) -> PathBuf {
    ctx.roots.lock_dir.join(format!("pve-config-{vmid}.lock"))
}

/// Tries the lock without waiting; then prints PVE's message and waits in the kernel's queue.
fn take(ctx: &Ctx, path: &Path, limit: Duration) -> Result<Held> {
    let fail = |error: &io::Error| Failure::io("open lock", path, error);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|e| fail(&e))?;
    }
    let open = || OpenOptions::new().create(true).append(true).open(path);
    let file = open().map_err(|e| fail(&e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(Held { _file: file }),
        Err(Errno::WOULDBLOCK) => {}
        Err(error) => return Err(fail(&error.into())),
    }
    ctx.warn("trying to acquire lock...")?;
    if wait_in_queue(ctx, &file, limit)? {
        ctx.warn(" OK")?;
        return Ok(Held { _file: file });
    }
    let message = format!("can't lock file '{}' - got timeout", path.display());
    // The code is EINTR, the errno that Perl's alarm leaves.
    Err(Failure::coded(4, message))
}

/// Waits for the lock, a signal or the deadline, while a thread blocks in flock(2), which serves
/// waiters in order. After a timeout the thread holds a duplicate of the descriptor until the
/// process ends, which happens soon.
fn wait_in_queue(ctx: &Ctx, file: &File, limit: Duration) -> Result<bool> {
    let fail = |error: io::Error| Failure::new(format!("waiting for a lock failed: {error}"));
    let waiter = file.try_clone().map_err(fail)?;
    let (done, finished) = io::pipe().map_err(fail)?;
    thread::spawn(move || {
        ignore(flock(&waiter, FlockOperation::LockExclusive));
        drop(finished);
    });
    match wait(ctx.signals(), &[done.as_fd()], Some(Instant::now() + limit)) {
        Woken::Ready(_) => Ok(true),
        Woken::Timeout => Ok(false),
        Woken::Signal => Err(Failure::interrupt("received interrupt")),
    }
}
