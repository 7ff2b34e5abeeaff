//! Disks under the in-memory journal and store: hooks around each sync, for the simulation and for
//! tests that crash.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Hooks around a sync: they take time, or crash the process and never return.
#[async_trait::async_trait]
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Called while a crash still loses the write.
    async fn before_sync(&self);
    /// Called when the write survives a crash, but its caller does not know that yet.
    async fn after_sync(&self);
}

/// Disk that takes no time and does not crash.
#[derive(Debug)]
pub struct SoundDisk;

#[async_trait::async_trait]
impl Disk for SoundDisk {
    async fn before_sync(&self) {}
    async fn after_sync(&self) {}
}

/// Time of a crash: before the sync, or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The write is lost.
    Before,
    /// The write is durable, and nobody knows.
    After,
}

/// Disk that blocks one sync for ever, and counts the syncs. Does neither until it is armed.
#[derive(Debug, Default)]
pub struct FatalDisk {
    armed: AtomicBool,
    begun: AtomicUsize,
    ended: AtomicUsize,
    at: Option<(usize, When)>,
    reached: Notify,
}

impl FatalDisk {
    /// Creates a disk that blocks the sync with this number, counted from 0; `None` blocks none.
    pub fn new(at: Option<(usize, When)>) -> Self {
        Self { at, ..Self::default() }
    }

    /// Switches counting and blocking on or off.
    pub fn arm(&self, armed: bool) {
        self.armed.store(armed, Ordering::Relaxed);
    }

    /// Waits until a sync is blocked.
    pub async fn reached(&self) {
        self.reached.notified().await;
    }

    /// Number of syncs that have begun.
    pub fn syncs(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    async fn pass(&self, count: &AtomicUsize, when: When) {
        if !self.armed.load(Ordering::Relaxed) {
            return;
        }
        let number = count.fetch_add(1, Ordering::Relaxed);
        if self.at == Some((number, when)) {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait::async_trait]
impl Disk for FatalDisk {
    async fn before_sync(&self) {
        self.pass(&self.begun, When::Before).await;
    }

    async fn after_sync(&self) {
        self.pass(&self.ended, When::After).await;
    }
}
