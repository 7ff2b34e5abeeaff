//! Reading /etc/pve. It is a FUSE file system: a read hangs when pmxcfs does, so each read has a
//! deadline and the number of threads that can hang is bounded.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::sys::read;

/// Concurrent reads at most, hanging ones included. The agent has as many threads for them alone.
pub const READS_MAX: usize = 8;

/// Deadline of a read. A read of pmxcfs takes 0.1 ms; one that takes this long hangs.
const DEADLINE: Duration = Duration::from_secs(3);

/// Runs blocking reads with a deadline. Clones share their limit.
#[derive(Debug, Clone)]
pub struct Files {
    slots: Arc<Semaphore>,
}

impl Default for Files {
    fn default() -> Self {
        Self { slots: Arc::new(Semaphore::new(READS_MAX)) }
    }
}

impl Files {
    /// Reads a file; `None` when it does not exist.
    pub async fn read(&self, path: PathBuf) -> io::Result<Option<Vec<u8>>> {
        self.blocking(move || match read::whole(&path, read::LARGE) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    /// Runs any blocking read.
    pub async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer from the file system");
        let slots = Arc::clone(&self.slots);
        let slot = timeout(DEADLINE, slots.acquire_owned()).await.map_err(late)?;
        let task = tokio::task::spawn_blocking(move || {
            // The slot belongs to the thread, because the caller may give up first.
            let _slot = slot;
            read()
        });
        timeout(DEADLINE, task).await.map_err(late)?.unwrap_or_else(|gone| Err(gone.into()))
    }
}
