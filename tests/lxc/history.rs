//! What callers were told, each at the moment when they were, and what must then be so.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is known of one request_id.
#[derive(Debug, Default, Clone)]
pub(crate) struct Known {
    /// Every id that an answer named.
    pub(crate) ids: BTreeSet<String>,
    /// The sandbox that an answer said to run.
    pub(crate) acked: Option<Sandbox>,
    /// Somebody wants it gone.
    pub(crate) delete_asked: bool,
    /// And was told that it is.
    pub(crate) deleted: bool,
    /// Its init was killed: it is down, and its commands are lost.
    pub(crate) hit: bool,
    /// Commands, by their name, and the code that came, if one did.
    pub(crate) ran: BTreeMap<String, Option<i32>>,
}

/// Where it is.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) node: String,
    pub(crate) vmid: u64,
}

/// All of it, for all callers.
#[derive(Debug, Default)]
pub(crate) struct History {
    known: Mutex<BTreeMap<String, Known>>,
    broken: Mutex<Vec<String>>,
}

impl History {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note<T>(&self, key: &str, change: impl FnOnce(&mut Known) -> T) -> T {
        change(self.lock().entry(key.to_owned()).or_default())
    }

    pub(crate) fn all(&self) -> BTreeMap<String, Known> {
        self.lock().clone()
    }

    /// A sandbox that its callers know to run and nobody wants gone; which, says `pick`.
    pub(crate) fn living(&self, pick: u64) -> Option<(String, Sandbox)> {
        let all = self.lock();
        let living: Vec<_> = all
            .iter()
            .filter(|(_, known)| !known.delete_asked && !known.hit)
            .filter_map(|(key, known)| Some((key, known.acked.as_ref()?)))
            .collect();
        let count = u64::try_from(living.len()).ok().filter(|count| *count > 0)?;
        let (key, sandbox) = living[usize::try_from(pick % count).ok()?];
        Some((key.clone(), sandbox.clone()))
    }

    /// Something that may not be; the run goes on, and fails at its end.
    pub(crate) fn broken(&self, what: String) {
        eprintln!("BROKEN: {what}");
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// Fails when something was not as it must be.
    #[track_caller]
    pub(crate) fn judge(&self) {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
