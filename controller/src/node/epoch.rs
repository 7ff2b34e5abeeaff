//! Fencing number (epoch). At first contact it is raised above every agent's and persisted before
//! use, so that nodes refuse changes of a replaced controller.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{self, Store};

/// Time after its start in which a controller may raise its epoch above what a node has seen. Its
/// store may be lost or an old copy, so that nodes know higher epochs. Later a higher epoch means
/// that another controller is in charge: a node back after long must not put a replaced controller
/// in charge again.
const STARTING: Duration = Duration::from_secs(15);

/// Epoch of this controller.
#[derive(Debug)]
pub struct Epoch {
    store: Arc<dyn Store>,
    current: AtomicU64,
    fenced: CancellationToken,
    /// Whether nodes knew a later epoch of this store than the store does.
    behind: AtomicBool,
    raising: tokio::sync::Mutex<()>,
    started: Instant,
}

/// Relation of the epoch that a node has seen to ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// The node obeys us, or will.
    Ours,
    /// Ours must be raised above it first.
    Raise,
    /// A later controller is in charge.
    Replaced,
}

/// Compares the epochs. `handshaken`: the node has seen our epoch before.
fn standing(seen: u64, own: u64, handshaken: bool, age: Duration) -> Standing {
    match (seen > own, seen == own) {
        (true, _) if handshaken || age > STARTING => Standing::Replaced,
        (true, _) => Standing::Raise,
        // Another controller may have used the same number, over a copy of the store.
        (false, true) if !handshaken => Standing::Raise,
        (false, _) => Standing::Ours,
    }
}

impl Epoch {
    /// Claims the epoch after the last one and persists it.
    ///
    /// # Errors
    /// When it cannot be persisted.
    pub async fn start(store: Arc<dyn Store>) -> Result<Self, store::Error> {
        let current = store.claim().await?;
        Ok(Self {
            store,
            current: AtomicU64::new(current),
            fenced: CancellationToken::new(),
            behind: AtomicBool::new(false),
            raising: tokio::sync::Mutex::new(()),
            started: Instant::now(),
        })
    }

    /// Returns the epoch that every change carries.
    pub fn get(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// Returns true when a later controller is in charge.
    pub fn fenced(&self) -> bool {
        self.fenced.is_cancelled()
    }

    /// Returns true when nodes had seen our epoch or a higher one before we used it: the store was
    /// lost or is an old copy, so its contents are incomplete.
    pub fn behind(&self) -> bool {
        self.behind.load(Ordering::Acquire)
    }

    /// Waits until a later controller is in charge.
    pub async fn replaced(&self) {
        self.fenced.cancelled().await;
    }

    /// Fences this controller: a known agent has seen a higher epoch, or our store was claimed.
    pub fn fence(&self) {
        if !self.fenced() {
            tracing::error!(
                epoch = self.get(),
                "a later controller is in charge, this one is fenced"
            );
            self.fenced.cancel();
        }
    }

    /// Handles the epoch that a node has seen: raises ours above it, or fences this controller.
    ///
    /// # Errors
    /// When a higher number cannot be persisted.
    pub async fn handshake(&self, seen: u64, handshaken: bool) -> Result<(), store::Error> {
        let _one_at_a_time = self.raising.lock().await;
        match standing(seen, self.get(), handshaken, self.started.elapsed()) {
            Standing::Ours => Ok(()),
            Standing::Replaced => {
                self.fence();
                Ok(())
            }
            Standing::Raise if self.fenced() => Ok(()),
            Standing::Raise => match self.store.raise(seen + 1).await {
                Ok(raised) => {
                    self.behind.store(true, Ordering::Release);
                    self.current.store(raised, Ordering::Release);
                    Ok(())
                }
                Err(store::Error::Replaced) => {
                    self.fence();
                    Ok(())
                }
                Err(error @ store::Error::Failed(_)) => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_controller_raises_its_epoch_and_an_old_one_was_replaced() {
        let (young, old) = (Duration::ZERO, STARTING * 2);
        assert_eq!(standing(7, 3, false, young), Standing::Raise, "its store was lost");
        assert_eq!(standing(3, 3, false, young), Standing::Raise, "over a copy of the store");
        assert_eq!(standing(3, 3, true, old), Standing::Ours);
        assert_eq!(standing(2, 3, false, old), Standing::Ours);
        assert_eq!(standing(4, 3, true, young), Standing::Replaced);
        assert_eq!(standing(4, 3, false, old), Standing::Replaced, "a node that was away for long");
    }
}
