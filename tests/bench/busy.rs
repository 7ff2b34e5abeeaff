//! Work that keeps the CPUs busy and does nothing else.

use std::{
    hint::spin_loop,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, available_parallelism},
};

use anyhow::Result;

/// Keeps every CPU busy, as sandboxes that compute do; until it is dropped.
#[derive(Debug)]
pub(crate) struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    pub(crate) fn start() -> Result<Self> {
        let mut busy = Self { stop: Arc::default(), threads: Vec::new() };
        for _ in 0..available_parallelism()?.get() {
            let stop = Arc::clone(&busy.stop);
            let compute = move || {
                while !stop.load(Ordering::Relaxed) {
                    spin_loop();
                }
            };
            busy.threads.push(thread::Builder::new().spawn(compute)?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot have panicked, and there is nothing more to do if it has.
            drop(thread.join());
        }
    }
}
