//! Shares a number of places among parties, so that none of them can take all.

use std::collections::BTreeMap;

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

    /// Returns a place. Ignored when the party holds none.
    pub fn release(&mut self, who: &K) {
        let Some(held) = self.held.get_mut(who) else { return };
        *held -= 1;
        self.free += 1;
        if *held == 0 {
            self.held.remove(who);
        }
    }
}

#[cfg(test)]
mod tests {
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
}
