//! Times of a team's creations, commands and changes, for its rates. Pure.

use std::collections::{BTreeMap, VecDeque};

use proto::{
    limits::{COUNT_MAX, Rate, WINDOW_MAX},
    name::UserLabel,
};

/// Times of what a rate counts, milliseconds since 1970, in order. As many as the largest rate may count, from
/// the longest window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Times(VecDeque<u64>);

impl Times {
    /// Adds one.
    pub(super) fn add(&mut self, at_ms: u64) {
        let newest = self.0.back().copied().unwrap_or_default().max(at_ms);
        // Those of the store come in the order of its rows.
        let place = self.0.partition_point(|known| *known <= at_ms);
        self.0.insert(place, at_ms);
        let old = newest.saturating_sub(daemon::clock::millis(WINDOW_MAX));
        while self.0.front().is_some_and(|first| *first < old) || self.0.len() > COUNT_MAX as usize
        {
            self.0.pop_front();
        }
    }

    /// Moves what lies ahead to now: the clock was set back since. So it leaves each window as if it were done now, and
    /// not when the clock gets there once more. Called before what is done now is counted or added.
    pub(super) fn set_back(&mut self, now_ms: u64) {
        for at_ms in self.0.iter_mut().rev().take_while(|at_ms| **at_ms > now_ms) {
            *at_ms = now_ms;
        }
    }

    /// Removes one of this time, or of the one that it was set back to.
    pub(super) fn remove(&mut self, at_ms: u64) {
        let after = self.0.partition_point(|known| *known <= at_ms);
        if let Some(place) = after.checked_sub(1) {
            self.0.remove(place);
        }
    }

    /// Returns the number in the window that ends now.
    pub(super) fn count(&self, rate: Rate, now_ms: u64) -> u32 {
        let window_ms = daemon::clock::millis(rate.window);
        let before = self.0.partition_point(|at_ms| at_ms.saturating_add(window_ms) <= now_ms);
        u32::try_from(self.0.len() - before).unwrap_or(u32::MAX)
    }

    /// Returns the time until another one is within the rate, milliseconds; `None` when one is
    /// now. A rate of 0 never has room: the answer is its window.
    pub(super) fn wait_ms(&self, rate: Rate, now_ms: u64) -> Option<u64> {
        let (count, window_ms) = (self.count(rate, now_ms), daemon::clock::millis(rate.window));
        let over = count.checked_sub(rate.count)?;
        if rate.count == 0 {
            return Some(window_ms);
        }
        // Room comes when the last of those that are too many leaves the window.
        let first = self.0.len() - count as usize;
        let leaves_ms = self.0.get(first + over as usize)?.saturating_add(window_ms);
        Some(leaves_ms.saturating_sub(now_ms).max(1))
    }
}

/// Creations of one team, in all and by each of its users.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct History {
    pub(super) team: Times,
    users: BTreeMap<UserLabel, Times>,
}

impl History {
    /// Adds a creation.
    pub(super) fn add(&mut self, user: Option<&UserLabel>, at_ms: u64) {
        self.team.add(at_ms);
        if let Some(user) = user {
            self.users.entry(user.clone()).or_default().add(at_ms);
        }
    }

    /// Removes a creation that was not made after all.
    pub(super) fn remove(&mut self, user: Option<&UserLabel>, at_ms: u64) {
        self.team.remove(at_ms);
        if let Some(times) = user.and_then(|user| self.users.get_mut(user)) {
            times.remove(at_ms);
        }
    }

    /// Moves creations of the team, and of this user, that lie ahead to now.
    pub(super) fn set_back(&mut self, user: Option<&UserLabel>, now_ms: u64) {
        self.team.set_back(now_ms);
        if let Some(times) = user.and_then(|user| self.users.get_mut(user)) {
            times.set_back(now_ms);
        }
    }

    /// Returns the creations of a user.
    pub(super) fn of_user(&self, user: &UserLabel) -> Option<&Times> {
        self.users.get(user)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn rate(count: u32, seconds: u64) -> Rate {
        Rate::new(count, Duration::from_secs(seconds)).expect("within bounds")
    }

    proptest! {
        #[test]
        fn no_window_has_more_creations_than_the_rate(
            steps in prop::collection::vec(0_u64..3000, 1..60),
            count in 1_u32..6,
            seconds in 1_u64..10,
        ) {
            let (rate, mut times, mut now_ms) = (rate(count, seconds), Times::default(), 1_000_000);
            let mut admitted: Vec<u64> = Vec::new();
            for step in steps {
                now_ms += step;
                match times.wait_ms(rate, now_ms) {
                    None => {
                        times.add(now_ms);
                        admitted.push(now_ms);
                    }
                    Some(wait_ms) => {
                        // The hint is exact: not a moment earlier, and then at once.
                        prop_assert!(times.wait_ms(rate, now_ms + wait_ms).is_none());
                        prop_assert!(times.wait_ms(rate, now_ms + wait_ms - 1).is_some());
                    }
                }
                let window_ms = seconds * 1000;
                let within = admitted.iter().filter(|at| **at + window_ms > now_ms).count();
                prop_assert!(within <= count as usize);
                prop_assert_eq!(times.count(rate, now_ms) as usize, within);
            }
        }

        #[test]
        fn wait_is_a_window_at_most_however_the_clock_is_set(
            steps in prop::collection::vec(
                prop_oneof![0_i64..3000, -5000_i64..0, -9_000_000_000_i64..9_000_000_000],
                1..60,
            ),
            count in 1_u32..6,
            seconds in 1_u64..10,
        ) {
            let (rate, mut times, mut now_ms) = (rate(count, seconds), Times::default(), 1_u64 << 40);
            for step in steps {
                now_ms = now_ms.saturating_add_signed(step);
                times.set_back(now_ms);
                match times.wait_ms(rate, now_ms) {
                    None => {
                        let before = times.count(rate, now_ms);
                        times.add(now_ms);
                        prop_assert!(before < count);
                        prop_assert_eq!(times.count(rate, now_ms), before + 1);
                    }
                    Some(wait_ms) => {
                        prop_assert!(wait_ms <= seconds * 1000, "{wait_ms}");
                        prop_assert!(times.wait_ms(rate, now_ms + wait_ms).is_none());
                    }
                }
            }
        }

        #[test]
        fn removed_creations_leave_nothing(
            all in prop::collection::vec((0_u64..100, any::<bool>()), 0..40),
        ) {
            let (mut history, mut other) = (History::default(), History::default());
            let user: UserLabel = "ada".parse().expect("user");
            for (at_ms, stays) in &all {
                history.add(Some(&user), *at_ms);
                if *stays {
                    other.add(Some(&user), *at_ms);
                }
            }
            for (at_ms, _) in all.iter().filter(|(_, stays)| !stays) {
                history.remove(Some(&user), *at_ms);
            }
            prop_assert_eq!(history.team, other.team);
        }
    }

    #[test]
    fn creation_that_was_set_back_can_be_removed() {
        let mut times = Times::default();
        times.add(1000);
        times.add(9000);
        times.set_back(2000);
        times.remove(9000);
        assert_eq!(times.0, [1000]);
        times.remove(999);
        assert_eq!(times.0, [1000], "older than all that is kept");
    }

    #[test]
    fn memory_of_creations_is_bounded() {
        let mut times = Times::default();
        for n in 0..u64::from(COUNT_MAX) + 500 {
            times.add(n);
        }
        assert_eq!(times.0.len(), COUNT_MAX as usize);
        times.add(daemon::clock::millis(WINDOW_MAX) * 3);
        assert_eq!(times.0.len(), 1, "older than any window");
        assert_eq!(times.wait_ms(rate(0, 60), 0), Some(60_000), "never");
    }
}
