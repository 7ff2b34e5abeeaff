//! Whose turn is next: the parties that wait take turns, however many waiters each of them has. Pure.

use std::collections::BTreeMap;

/// Waiters of several parties. The parties take turns; the waiters of one party come first come, first
/// served. While a party waits and may have a turn, no other has two.
#[derive(Debug)]
pub(crate) struct RoundRobin<P, W> {
    /// Number of the last arrival or turn: it orders both.
    last: u64,
    /// Lines of the parties that wait; none of them is empty.
    lines: BTreeMap<P, Line<W>>,
}

#[derive(Debug)]
struct Line<W> {
    /// Number of the party's last turn, or of its arrival where it had none since.
    since: u64,
    /// Waiters by their tickets.
    waiters: BTreeMap<u64, W>,
}

impl<P: Ord, W> RoundRobin<P, W> {
    /// Creates it with nobody who waits.
    pub(crate) const fn new() -> Self {
        Self { last: 0, lines: BTreeMap::new() }
    }

    /// Adds a waiter at the end of its party's line; returns its ticket.
    pub(crate) fn join(&mut self, party: P, waiter: W) -> u64 {
        let ticket = self.number();
        let line = || Line { since: ticket, waiters: BTreeMap::new() };
        self.lines.entry(party).or_insert_with(line).waiters.insert(ticket, waiter);
        ticket
    }

    /// Removes a waiter that does not wait any more. Ignored when it had its turn.
    pub(crate) fn leave(&mut self, party: &P, ticket: u64) {
        let Some(line) = self.lines.get_mut(party) else { return };
        line.waiters.remove(&ticket);
        if line.waiters.is_empty() {
            self.lines.remove(party);
        }
    }

    /// Removes and returns the waiter whose turn it is, with its party: the first of the party that is waiting
    /// longest for its next turn, of those that `may` have one.
    pub(crate) fn pop(&mut self, may: impl Fn(&P) -> bool) -> Option<(P, W)>
    where
        P: Clone,
    {
        let parties = self.lines.iter().filter(|(party, _)| may(party));
        let (party, _) = parties.min_by_key(|(_, line)| line.since)?;
        let (party, turn) = (party.clone(), self.number());
        let line = self.lines.get_mut(&party)?;
        line.since = turn;
        let (_, waiter) = line.waiters.pop_first()?;
        if line.waiters.is_empty() {
            self.lines.remove(&party);
        }
        Some((party, waiter))
    }

    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        /// A waiter of this party arrives.
        Join(u8),
        /// One of those that wait leaves.
        Leave(usize),
        /// A turn, which this party may not have.
        Turn(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u8..5).prop_map(Step::Join),
            1 => any::<usize>().prop_map(Step::Leave),
            3 => (0u8..8).prop_map(Step::Turn),
        ];
        proptest::collection::vec(step, 0..300)
    }

    /// Model of those that wait, in the plainest way.
    #[derive(Debug, Default)]
    struct Expected {
        /// Party and ticket of each waiter, in the order of arrival.
        waiting: Vec<(u8, u64)>,
        /// Turns of another party (the second) since a party (the first) waits for its own, and may have it.
        turns: BTreeMap<(u8, u8), u32>,
    }

    impl Expected {
        fn waits(&self, party: u8) -> bool {
            self.waiting.iter().any(|(waiter, _)| *waiter == party)
        }

        fn may_go_on(&self, barred: u8) -> bool {
            self.waiting.iter().any(|(waiter, _)| *waiter != barred)
        }

        fn first_of(&self, party: u8) -> Option<usize> {
            self.waiting.iter().position(|(waiter, _)| *waiter == party)
        }

        fn leave(&mut self, at: usize) -> (u8, u64) {
            let (party, ticket) = self.waiting.remove(at);
            if !self.waits(party) {
                self.turns.retain(|(waiter, _), _| *waiter != party);
            }
            (party, ticket)
        }

        fn turn(&mut self, party: u8, arrival: usize, barred: u8) -> Result<(), TestCaseError> {
            prop_assert_ne!(party, barred);
            prop_assert_eq!(
                self.first_of(party),
                Some(arrival),
                "first come, first served in a party"
            );
            self.leave(arrival);
            self.turns.retain(|(waiter, _), _| *waiter != party);
            let passed = |other: &u8| *other != party && *other != barred && self.waits(*other);
            let others: Vec<_> = (0..5).filter(passed).collect();
            for other in others {
                let turns = self.turns.entry((other, party)).or_default();
                *turns += 1;
                prop_assert!(*turns < 2, "{party} has two turns while {other} waits");
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn no_party_has_two_turns_while_another_waits_and_nobody_is_lost(steps in steps()) {
            let (mut line, mut expected, mut arrivals) = (RoundRobin::new(), Expected::default(), 0u32);
            // Arrivals by their tickets: what `pop` returns says who it is.
            let mut numbers = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Join(party) => {
                        arrivals += 1;
                        let ticket = line.join(party, (party, arrivals));
                        prop_assert!(numbers.insert(arrivals, ticket).is_none());
                        expected.waiting.push((party, ticket));
                    }
                    Step::Leave(at) if !expected.waiting.is_empty() => {
                        let (party, ticket) = expected.leave(at % expected.waiting.len());
                        line.leave(&party, ticket);
                        // A second time, as for one that left when it was chosen already.
                        line.leave(&party, ticket);
                    }
                    Step::Leave(_) => {}
                    Step::Turn(barred) => {
                        let next = line.pop(|party| *party != barred);
                        prop_assert_eq!(next.is_some(), expected.may_go_on(barred));
                        let Some((of, (party, arrival))) = next else { continue };
                        prop_assert_eq!(of, party);
                        let who = (party, numbers[&arrival]);
                        let at = expected.waiting.iter().position(|waiter| *waiter == who);
                        prop_assert!(at.is_some(), "{who:?} waits no more");
                        expected.turn(party, at.unwrap_or_default(), barred)?;
                    }
                }
            }
            let rest = std::iter::from_fn(|| line.pop(|_| true)).count();
            prop_assert_eq!(rest, expected.waiting.len());
            prop_assert!(line.lines.is_empty(), "nothing is left behind");
        }
    }

    #[test]
    fn parties_take_turns_whatever_the_length_of_their_lines() {
        let mut line = RoundRobin::new();
        for waiter in ["red 1", "red 2", "red 3", "blue 1", "green 1", "blue 2"] {
            line.join(waiter.split(' ').next(), waiter);
        }
        let order = std::iter::from_fn(|| line.pop(|_| true)).map(|(_, waiter)| waiter);
        let order: Vec<_> = order.collect();
        assert_eq!(order, ["red 1", "blue 1", "green 1", "red 2", "blue 2", "red 3"]);
    }
}
