//! Counts of what is under way for each key, with a bound. A key that has nothing under way takes no
//! memory.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use crate::sync::Mutex;

/// Table of counts. Clones share it.
#[derive(Debug, Clone)]
pub struct KeyedCount<K>(Arc<Mutex<HashMap<K, usize>>>);

/// Counts for its key until it is dropped.
#[derive(Debug)]
pub struct Counted<K: Eq + Hash> {
    table: KeyedCount<K>,
    key: K,
}

impl<K> Default for KeyedCount<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Clone + Eq + Hash> KeyedCount<K> {
    /// Counts one more for this key; `None` when there are `max` already.
    pub fn begin(&self, key: K, max: usize) -> Option<Counted<K>> {
        let mut table = self.0.lock();
        let count = table.entry(key.clone()).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Counted { table: Self(Arc::clone(&self.0)), key })
    }
}

impl<K: Eq + Hash> Drop for Counted<K> {
    fn drop(&mut self) {
        let mut table = self.table.0.lock();
        if let Some(count) = table.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_bound_and_nothing_is_kept_of_idle_keys() {
        let counts = KeyedCount::default();
        let held: Vec<_> = std::iter::from_fn(|| counts.begin("one", 3)).collect();
        assert_eq!(held.len(), 3);
        drop(counts.begin("other", 3).expect("another's"));
        drop(held);
        assert!(counts.0.lock().is_empty());
        assert!(counts.begin("one", 3).is_some());
    }
}
