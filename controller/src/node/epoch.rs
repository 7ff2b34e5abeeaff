//! The fencing number. Raised over every agent's at the first contact and persisted before it is
//! used, so that changes of a controller that was replaced are refused by the nodes.

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

/// How long after its start a controller may go above what a node has seen. Its store may be lost or
/// an old one, so that nodes know higher numbers. Later that means that somebody else is in charge:
/// a node that was away for long must not make the one that was replaced the last again.
const STARTING: Duration = Duration::from_secs(15);

/// Our epoch.
#[derive(Debug)]
pub struct Epoch {
    store: Arc<dyn Store>,
    current: AtomicU64,
    fenced: CancellationToken,
    /// Nodes knew of a later life of this store than it does.
    behind: AtomicBool,
    raising: tokio::sync::Mutex<()>,
    started: Instant,
}

/// What the epoch that a node has seen means for ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It obeys us, or will.
    Ours,
    /// We must go above it first.
    Raise,
    /// A later controller is in charge.
    Replaced,
}

/// `met`: it has heard our epoch before.
fn standing(seen: u64, own: u64, met: bool, age: Duration) -> Standing {
    match (seen > own, seen == own) {
        (true, _) if met || age > STARTING => Standing::Replaced,
        (true, _) => Standing::Raise,
        // Another may have used the same number, over a copy of the store.
        (false, true) if !met => Standing::Raise,
        (false, _) => Standing::Ours,
    }
}

impl Epoch {
    /// One above what was used before, persisted.
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

    /// The number that goes into every change.
    pub fn get(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// A later controller is in charge.
    pub fn fenced(&self) -> bool {
        self.fenced.is_cancelled()
    }

    /// Nodes have seen our epoch or a higher one before we did: our store was lost, or is an old copy,
    /// and what stands in it is not all that there is.
    pub fn behind(&self) -> bool {
        self.behind.load(Ordering::Acquire)
    }

    /// Waits until a later controller is in charge.
    pub async fn replaced(&self) {
        self.fenced.cancelled().await;
    }

    /// Somebody with a higher epoch has been at an agent that knew us, or has claimed our store.
    pub fn fence(&self) {
        if !self.fenced() {
            tracing::error!(
                epoch = self.get(),
                "a later controller is in charge, this one is fenced"
            );
            self.fenced.cancel();
        }
    }

    /// A node says what it has seen: we go above it, or learn that we were replaced.
    ///
    /// # Errors
    /// When a higher number cannot be persisted.
    pub async fn meet(&self, seen: u64, met: bool) -> Result<(), store::Error> {
        let _one_at_a_time = self.raising.lock().await;
        match standing(seen, self.get(), met, self.started.elapsed()) {
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
    fn who_has_just_started_goes_above_and_later_it_was_replaced() {
        let (young, old) = (Duration::ZERO, STARTING * 2);
        assert_eq!(standing(7, 3, false, young), Standing::Raise, "its store was lost");
        assert_eq!(standing(3, 3, false, young), Standing::Raise, "over a copy of the store");
        assert_eq!(standing(3, 3, true, old), Standing::Ours);
        assert_eq!(standing(2, 3, false, old), Standing::Ours);
        assert_eq!(standing(4, 3, true, young), Standing::Replaced);
        assert_eq!(standing(4, 3, false, old), Standing::Replaced, "a node that was away for long");
    }
}
