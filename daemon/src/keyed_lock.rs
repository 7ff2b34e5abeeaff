//! One lock for each key, first come first served. A key that nobody holds or waits for takes no
//! memory.

use std::{collections::HashMap, hash::Hash, sync::Arc};

use tokio::sync::OwnedMutexGuard;

use crate::sync::Mutex;

type Lock = Arc<tokio::sync::Mutex<()>>;

/// Table of locks. Clones share it.
#[derive(Debug)]
pub struct KeyedLock<K>(Arc<Mutex<HashMap<K, Lock>>>);

/// Holds the lock of a key until it is dropped.
#[derive(Debug)]
pub struct Guard<K: Copy + Eq + Hash> {
    /// Dropped before the place.
    _held: OwnedMutexGuard<()>,
    _place: Place<K>,
}

impl<K> Default for KeyedLock<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K> Clone for KeyedLock<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K: Copy + Eq + Hash> KeyedLock<K> {
    /// Waits until nobody else holds the lock of this key. A caller that stops waiting loses its
    /// place.
    pub async fn lock(&self, key: K) -> Guard<K> {
        let (place, lock) = self.place(key);
        Guard { _held: lock.lock_owned().await, _place: place }
    }

    fn place(&self, key: K) -> (Place<K>, Lock) {
        let lock = Arc::clone(self.0.lock().entry(key).or_default());
        (Place { table: self.clone(), key, lock: Some(Arc::clone(&lock)) }, lock)
    }
}

/// Place of a holder or of one who waits. The last one removes the key.
#[derive(Debug)]
struct Place<K: Copy + Eq + Hash> {
    table: KeyedLock<K>,
    key: K,
    /// `None` only while it is dropped.
    lock: Option<Lock>,
}

impl<K: Copy + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut table = self.table.0.lock();
        // Under the lock of the table, so that of two that go at once the second sees the first gone.
        drop(self.lock.take());
        if table.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            table.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test(start_paused = true)]
    async fn a_key_has_one_holder_and_other_keys_do_not_wait() {
        let locks = KeyedLock::<u32>::default();
        let first = locks.lock(1).await;
        let _other = timeout(SOON, locks.lock(2)).await.expect("free");
        timeout(SOON, locks.lock(1)).await.expect_err("held");
        drop(first);
        timeout(SOON, locks.lock(1)).await.expect("free");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_keeps_the_key_and_gets_it_in_turn() {
        let locks = KeyedLock::<u32>::default();
        let held = locks.lock(1).await;
        let order = Arc::<Mutex<Vec<u32>>>::default();
        let waiting: Vec<_> = (0..3)
            .map(|number| {
                let (locks, order) = (locks.clone(), Arc::clone(&order));
                tokio::spawn(async move {
                    let _held = locks.lock(1).await;
                    order.lock().push(number);
                    tokio::time::sleep(SOON).await;
                })
            })
            .collect();
        tokio::time::sleep(SOON).await;
        drop(held);
        // Comes last, whether or not the key was free for a moment.
        drop(locks.lock(1).await);
        assert_eq!(*order.lock(), [0, 1, 2]);
        for task in waiting {
            task.await.expect("ended");
        }
        assert!(locks.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_left_of_a_key_that_nobody_wants() {
        let locks = KeyedLock::<u32>::default();
        let held = locks.lock(1).await;
        timeout(SOON, locks.lock(1)).await.expect_err("held");
        assert_eq!(locks.0.lock().len(), 1);
        drop(held);
        assert!(locks.0.lock().is_empty());
        // The holder goes while another one has already stopped waiting for it.
        let held = locks.lock(1).await;
        let mut waits = Box::pin(locks.lock(1));
        tokio::select! {
            biased;
            _ = &mut waits => panic!("held"),
            () = std::future::ready(()) => {}
        }
        drop(held);
        drop(waits);
        assert!(locks.0.lock().is_empty());
    }

    #[test]
    fn nothing_is_left_of_a_key_that_many_threads_release_at_once() {
        let locks = KeyedLock::<u32>::default();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let (place, lock) = locks.place(1);
                        // As a guard goes: the lock first.
                        drop(lock);
                        drop(place);
                    }
                });
            }
        });
        assert!(locks.0.lock().is_empty());
    }
}
