//! The fencing number. Raised over every agent's at the first contact and persisted before it is
//! used, so that changes of a controller that was replaced are refused by the nodes.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::store::{self, Store};

/// Our epoch.
#[derive(Debug)]
pub struct Epoch {
    store: Arc<dyn Store>,
    current: AtomicU64,
    fenced: AtomicBool,
    raising: tokio::sync::Mutex<()>,
}

impl Epoch {
    /// One above what was used before, persisted.
    ///
    /// # Errors
    /// When it cannot be persisted.
    pub async fn start(store: Arc<dyn Store>) -> Result<Self, store::Error> {
        let before = store.epoch(0).await?;
        let current = store.epoch(before + 1).await?;
        Ok(Self {
            store,
            current: AtomicU64::new(current),
            fenced: AtomicBool::new(false),
            raising: tokio::sync::Mutex::new(()),
        })
    }

    /// The number that goes into every change.
    pub fn get(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// A later controller is in charge.
    pub fn fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// An agent that knew us refused our epoch: somebody with a higher one has been there since.
    pub fn fence(&self) {
        if !self.fenced.swap(true, Ordering::AcqRel) {
            tracing::error!(
                epoch = self.get(),
                "a later controller is in charge, this one is fenced"
            );
        }
    }

    /// Goes above what an agent has seen, at the first contact with it.
    ///
    /// # Errors
    /// When it cannot be persisted.
    pub async fn raise_above(&self, seen: u64) -> Result<(), store::Error> {
        let _one_at_a_time = self.raising.lock().await;
        if seen >= self.get() {
            let raised = self.store.epoch(seen + 1).await?;
            self.current.store(raised, Ordering::Release);
        }
        Ok(())
    }
}
