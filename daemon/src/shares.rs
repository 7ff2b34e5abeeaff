//! Shares a number of places among parties, so that none of them can take all.

use std::{collections::BTreeMap, sync::Arc};

use crate::sync::Mutex;

/// Whether a party that holds `held` places may take one of the `free` ones. Pure.
#[must_use]
pub const fn may_take(held: usize, free: usize) -> bool {
    held < free
}

/// Counts the places that each party holds. A party may take another place while it holds fewer
/// than are free: one party alone gets half of all, two get a third each, and a place is left for
/// the next party. Pure.
#[derive(Debug)]
pub struct Shares<K> {
    free: usize,
    held: BTreeMap<K, usize>,
}

impl<K: Ord + Clone> Shares<K> {
    /// Creates `places` free places.
    pub fn new(places: usize) -> Self {
        Self { free: places, held: BTreeMap::new() }
    }

    /// Number of places that one party holds.
    pub fn held(&self, who: &K) -> usize {
        self.held.get(who).copied().unwrap_or(0)
    }

    /// Takes a place. False when this party already holds its share.
    #[must_use]
    pub fn take(&mut self, who: &K) -> bool {
        if !may_take(self.held(who), self.free) {
            return false;
        }
        self.free -= 1;
        *self.held.entry(who.clone()).or_default() += 1;
        true
    }

    /// Takes as many of the `wanted` places as this party may, which can be none. Returns their number.
    #[must_use]
    pub fn take_up_to(&mut self, who: &K, wanted: usize) -> usize {
        // One place more in its hands is one less that is free, so they meet halfway.
        let allowed = self.free.saturating_sub(self.held(who)).div_ceil(2);
        let taken = wanted.min(allowed);
        if taken > 0 {
            self.free -= taken;
            *self.held.entry(who.clone()).or_default() += taken;
        }
        taken
    }

    /// Returns a place. Ignored when the party holds none.
    pub fn release(&mut self, who: &K) {
        self.release_many(who, 1);
    }

    /// Returns places, at most as many as the party holds.
    pub fn release_many(&mut self, who: &K, places: usize) {
        let Some(held) = self.held.get_mut(who) else { return };
        let places = places.min(*held);
        *held -= places;
        self.free += places;
        if *held == 0 {
            self.held.remove(who);
        }
    }
}

/// Places that are shared as in `Shares`, each given back when its guard is dropped. Clones share them.
#[derive(Debug, Clone)]
pub struct Places<K: Ord + Clone>(Arc<Mutex<Shares<K>>>);

/// Places of a party that grow and shrink in number, such as bytes of memory. Given back when they are dropped.
#[derive(Debug)]
pub struct Part<K: Ord + Clone> {
    places: Places<K>,
    who: K,
    held: usize,
}

/// Place of a party, given back when it is dropped.
#[derive(Debug)]
pub struct Place<K: Ord + Clone> {
    places: Places<K>,
    who: K,
}

impl<K: Ord + Clone> Places<K> {
    /// Creates `places` free places.
    pub fn new(places: usize) -> Self {
        Self(Arc::new(Mutex::new(Shares::new(places))))
    }

    /// Takes a place; `None` when this party already holds its share. Never waits.
    pub fn take(&self, who: &K) -> Option<Place<K>> {
        self.0.lock().take(who).then(|| Place { places: self.clone(), who: who.clone() })
    }

    /// Creates a part of this party, without a place yet.
    pub fn part(&self, who: K) -> Part<K> {
        Part { places: self.clone(), who, held: 0 }
    }

    /// Number of places that one party holds.
    pub fn held(&self, who: &K) -> usize {
        self.0.lock().held(who)
    }
}

impl<K: Ord + Clone> Part<K> {
    /// Number of places.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Grows to this number of places, or as far as the party may. True when it has so many. Never waits.
    pub fn grow_to(&mut self, wanted: usize) -> bool {
        if let Some(more @ 1..) = wanted.checked_sub(self.held) {
            self.held += self.places.0.lock().take_up_to(&self.who, more);
        }
        self.held >= wanted
    }

    /// Gives back what is over this number of places.
    pub fn shrink_to(&mut self, wanted: usize) {
        if let Some(spare @ 1..) = self.held.checked_sub(wanted) {
            self.places.0.lock().release_many(&self.who, spare);
            self.held = wanted;
        }
    }
}

impl<K: Ord + Clone> Drop for Part<K> {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

impl<K: Ord + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        self.places.0.lock().release(&self.who);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_party_gets_half_and_leaves_room_for_others() {
        let mut shares = Shares::new(100);
        let take = |shares: &mut Shares<_>, who| (0..).take_while(|_| shares.take(&who)).count();
        assert_eq!(take(&mut shares, "red"), 50);
        assert_eq!(take(&mut shares, "blue"), 25);
        assert!(take(&mut shares, "green") > 0);
        for _ in 0..50 {
            shares.release(&"red");
        }
        assert_eq!(shares.held(&"red"), 0);
        assert!(take(&mut shares, "blue") > 0, "what is given back is free for all");
    }

    #[test]
    fn parties_that_grow_together_get_equal_shares() {
        let mut shares = Shares::new(100);
        let parties = ["a", "b", "c"];
        while parties.into_iter().filter(|who| shares.take(who)).count() > 0 {}
        let held = parties.map(|who| shares.held(&who));
        assert!(held.iter().all(|held| (24..=26).contains(held)), "{held:?}");
    }

    #[test]
    fn giving_back_an_untaken_place_changes_nothing() {
        let mut shares = Shares::new(4);
        shares.release(&"red");
        assert!(shares.take(&"red") && shares.take(&"red") && !shares.take(&"red"));
        assert!(!Shares::new(0).take(&"red"));
    }

    proptest! {
        /// Compares with a model: any order of takes and returns, of parties that come and go.
        #[test]
        fn places_are_neither_lost_nor_made_and_a_new_party_finds_one_while_any_is_free(
            places in 0_usize..40,
            steps in prop::collection::vec((any::<bool>(), 0_u8..6), 0..200),
        ) {
            let mut shares = Shares::new(places);
            let mut held = BTreeMap::<u8, usize>::new();
            for (takes, who) in steps {
                let (own, all) = (held.get(&who).copied().unwrap_or(0), held.values().sum::<usize>());
                if takes {
                    let taken = shares.take(&who);
                    prop_assert_eq!(taken, own < places - all, "{} of {}", own, places - all);
                    prop_assert!(taken || own > 0 || all == places, "a new party was turned away");
                    *held.entry(who).or_default() += usize::from(taken);
                } else {
                    shares.release(&who);
                    held.entry(who).and_modify(|own| *own = own.saturating_sub(1));
                }
                let all: usize = held.values().sum();
                prop_assert!(all <= places);
                prop_assert!(held.iter().all(|(who, own)| shares.held(who) == *own));
            }
            held.retain(|_, own| *own > 0);
            prop_assert_eq!(shares.held, held, "nothing is kept of a party without places");
        }

        /// Many places at once are as many as one after the other.
        #[test]
        fn party_takes_as_many_places_at_once_as_one_by_one(
            places in 0_usize..60,
            steps in prop::collection::vec((0_u8..4, 0_usize..40, any::<bool>()), 0..40),
        ) {
            let (mut shares, mut model) = (Shares::new(places), Shares::new(places));
            for (who, count, takes) in steps {
                if takes {
                    let singly = (0..count).take_while(|_| model.take(&who)).count();
                    prop_assert_eq!(shares.take_up_to(&who, count), singly);
                } else {
                    shares.release_many(&who, count);
                    (0..count).for_each(|_| model.release(&who));
                }
                prop_assert_eq!((shares.free, &shares.held), (model.free, &model.held));
            }
        }

        /// Holds also when a party has filled its share before the others come.
        #[test]
        fn party_that_comes_late_gets_half_of_what_is_left(
            places in 1_usize..500,
            parties in 1_u8..6,
        ) {
            let mut shares = Shares::new(places);
            let mut free = places;
            for who in 0..parties {
                let taken = (0..).take_while(|_| shares.take(&who)).count();
                prop_assert_eq!(taken, free.div_ceil(2));
                free -= taken;
            }
        }
    }

    #[test]
    fn place_is_free_again_when_it_is_dropped() {
        let places = Places::new(4);
        let held: Vec<_> = std::iter::from_fn(|| places.take(&"red")).collect();
        assert_eq!((held.len(), places.held(&"red")), (2, 2));
        assert!(places.take(&"blue").is_some(), "another's");
        drop(held);
        assert!(places.take(&"red").is_some());
    }

    #[test]
    fn part_grows_as_far_as_its_party_may_and_is_given_back_when_it_is_dropped() {
        let places = Places::new(100);
        let (mut one, mut two) = (places.part("red"), places.part("red"));
        assert!(one.grow_to(40) && one.grow_to(30));
        assert!(!two.grow_to(20), "half of all, with the other part");
        assert_eq!((one.held(), two.held(), places.held(&"red")), (40, 10, 50));
        one.shrink_to(5);
        one.shrink_to(10);
        assert_eq!((one.held(), places.held(&"red")), (5, 15));
        assert!(two.grow_to(20));
        drop((one, two));
        let shares = places.0.lock();
        assert_eq!((shares.free, shares.held.len()), (100, 0), "all was given back");
    }

    #[test]
    fn threads_that_take_and_return_at_once_never_hold_more_than_there_are() {
        const PLACES: usize = 16;
        const THREADS: usize = 8;
        let (places, held, most) = (Places::new(PLACES), AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (places, held, most) = (&places, &held, &most);
                scope.spawn(move || {
                    let mut own = Vec::new();
                    for round in 0..2000_usize {
                        if (round + thread) % 3 < 2 {
                            if let Some(place) = places.take(&(thread % 3)) {
                                most.fetch_max(
                                    held.fetch_add(1, Ordering::SeqCst) + 1,
                                    Ordering::SeqCst,
                                );
                                own.push(place);
                            }
                        } else if let Some(place) = own.pop() {
                            // Counted down first: until the drop, the place is still held.
                            held.fetch_sub(1, Ordering::SeqCst);
                            drop(place);
                        }
                    }
                    held.fetch_sub(own.len(), Ordering::SeqCst);
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= PLACES);
        let shares = places.0.lock();
        assert_eq!((shares.free, shares.held.len()), (PLACES, 0), "all were given back");
    }
}
