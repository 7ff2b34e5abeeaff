//! Answers that callers got, recorded when they got them, and what must be true by them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Knowledge about one request_id.
#[derive(Debug, Default, Clone)]
pub(crate) struct Known {
    /// Every id that an answer named.
    pub(crate) ids: BTreeSet<String>,
    /// The sandbox that an answer reported as running.
    pub(crate) acked: Option<Sandbox>,
    /// Whether a deletion was requested.
    pub(crate) delete_asked: bool,
    /// Whether an answer reported it as deleted.
    pub(crate) deleted: bool,
    /// Whether its init was killed: it is stopped, and its commands are lost.
    pub(crate) hit: bool,
    /// Commands by name, with their exit code if one came.
    pub(crate) ran: BTreeMap<String, Option<i32>>,
}

/// Id and place of a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) node: String,
    pub(crate) vmid: u64,
}

/// Answers that all callers got.
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

    /// Returns a sandbox that is known to run and that nobody has asked to delete; `pick` selects
    /// it.
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

    /// Records a violation; the run continues, and fails at its end.
    pub(crate) fn broken(&self, what: String) {
        eprintln!("BROKEN: {what}");
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// Fails if a violation was recorded.
    #[track_caller]
    pub(crate) fn judge(&self) {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
