//! Slots that the teams of a node share. None of them takes the last one while it holds another, and where none is
//! left, the teams that wait take turns.

use std::{collections::BTreeMap, sync::Arc};

use daemon::sync::Mutex;
use proto::name::Team;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::round_robin::RoundRobin;

/// Team that the work is for; `None` for the agent's own.
type Party = Option<Team>;

/// A number of slots. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct FairSlots(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Free slots; no party that waits may take one of them.
    free: usize,
    /// Slots of each party that holds any.
    held: BTreeMap<Party, usize>,
    waiting: RoundRobin<Party, oneshot::Sender<Slot>>,
}

/// A slot that is taken. When it is dropped, the next waiter gets it.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: FairSlots,
    party: Party,
}

/// A waiter in the line of its team. It may be dropped at any time; a slot that it was given by then goes to the
/// next waiter.
#[derive(Debug)]
struct Waiter {
    slots: FairSlots,
    party: Party,
    ticket: u64,
    given: oneshot::Receiver<Slot>,
}

/// Whether a party that holds `held` slots may take one of the `free` ones: it leaves the last one to a party that
/// has none. Unlike `daemon::shares::may_take`, which leaves half: a slot is free again within seconds, and a party
/// that is alone boots as many as it can. Pure.
const fn may_take(held: usize, free: usize) -> bool {
    free > 1 || (free == 1 && held == 0)
}

impl State {
    fn may_take(&self, party: &Party) -> bool {
        may_take(self.held.get(party).copied().unwrap_or(0), self.free)
    }

    /// Takes a free slot for a party.
    fn take(&mut self, party: Party) {
        self.free -= 1;
        *self.held.entry(party).or_default() += 1;
    }

    fn release(&mut self, party: &Party) {
        self.free += 1;
        let Some(held) = self.held.get_mut(party) else { return };
        *held -= 1;
        if *held == 0 {
            self.held.remove(party);
        }
    }

    /// Removes and returns a waiter that may take a slot, which is taken for it.
    fn give(&mut self) -> Option<(Party, oneshot::Sender<Slot>)> {
        let Self { free, held, waiting } = self;
        let may = |party: &Party| may_take(held.get(party).copied().unwrap_or(0), *free);
        let (party, waiter) = waiting.pop(may)?;
        self.take(party.clone());
        Some((party, waiter))
    }
}

impl FairSlots {
    /// Creates `slots` free slots.
    pub(crate) fn new(slots: usize) -> Self {
        let state = State { free: slots, held: BTreeMap::new(), waiting: RoundRobin::new() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Waits for a slot for the work of this team; `None` is the agent's own work. Returns none when the
    /// deadline passes.
    pub(crate) async fn take(&self, team: Option<&Team>, deadline: Instant) -> Option<Slot> {
        let mut waiter = match self.take_or_wait(team) {
            Ok(slot) => return Some(slot),
            Err(waiter) => waiter,
        };
        timeout_at(deadline, &mut waiter.given).await.ok()?.ok()
    }

    fn take_or_wait(&self, team: Option<&Team>) -> Result<Slot, Waiter> {
        let mut state = self.0.lock();
        let party = team.cloned();
        // Nobody of this party waits then: it would have got the slot.
        if state.may_take(&party) {
            state.take(party.clone());
            return Ok(Slot { slots: self.clone(), party });
        }
        let (give, given) = oneshot::channel();
        let ticket = state.waiting.join(party.clone(), give);
        Err(Waiter { slots: self.clone(), party, ticket, given })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // With one slot more, several may be in reach: those that were left for others.
        let next: Vec<_> = {
            let mut state = self.slots.0.lock();
            state.release(&self.party);
            std::iter::from_fn(|| state.give()).collect()
        };
        for (party, next) in next {
            // A waiter that has just given up does not take it: dropped here, the slot goes to the next one.
            drop(next.send(Slot { slots: self.slots.clone(), party }));
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.slots.0.lock().waiting.leave(&self.party, self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::Pin, time::Duration};

    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    type Wait = Pin<Box<dyn Future<Output = Option<Slot>>>>;

    fn named(team: &str) -> Team {
        team.parse().expect("a team")
    }

    /// Waits for a slot without an end; it has its place in the line when this returns.
    fn wait(slots: &FairSlots, team: &str) -> Wait {
        let (slots, team) = (slots.clone(), named(team));
        let deadline = Instant::now() + Duration::from_secs(3600);
        let mut wait: Wait = Box::pin(async move { slots.take(Some(&team), deadline).await });
        assert!(poll(&mut wait).is_none(), "no slot is free");
        wait
    }

    /// Slot that was given, if one was.
    fn poll(wait: &mut Wait) -> Option<Slot> {
        wait.now_or_never().flatten()
    }

    fn slot(slots: &FairSlots, team: &str) -> Option<Slot> {
        slots.take_or_wait(Some(&named(team))).ok()
    }

    /// Free slots, and parties that hold any.
    fn free_and_holders(slots: &FairSlots) -> (usize, usize) {
        let state = slots.0.lock();
        (state.free, state.held.len())
    }

    /// Slots that a team takes until it gets no more.
    fn all(slots: &FairSlots, team: &str) -> Vec<Slot> {
        std::iter::from_fn(|| slot(slots, team)).collect()
    }

    #[test]
    fn team_leaves_a_slot_for_another_where_there_are_two() {
        for (count, own, others) in [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 3, 1), (16, 15, 1)] {
            let slots = FairSlots::new(count);
            let red = all(&slots, "red");
            assert_eq!((red.len(), all(&slots, "blue").len()), (own, others), "of {count}");
            drop(red);
            assert!(slot(&slots, "blue").is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn free_slot_goes_to_the_team_whose_turn_it_is() {
        let slots = FairSlots::new(2);
        let (first, second) = (slot(&slots, "white"), slot(&slots, "green"));
        assert!(first.is_some() && second.is_some());
        let mut red = ["red", "red", "red"].map(|team| wait(&slots, team));
        let mut blue = wait(&slots, "blue");
        drop(first);
        let first = poll(&mut red[0]).expect("came first");
        assert!(poll(&mut blue).is_none());
        drop(second);
        let second = poll(&mut blue).expect("red has had its turn");
        assert!(slot(&slots, "white").is_none() && poll(&mut red[1]).is_none());
        drop(second);
        assert!(poll(&mut red[1]).is_none(), "red has one, and leaves the last one");
        drop((slot(&slots, "blue").expect("left for it"), first));
        let second = poll(&mut red[1]).expect("red has none");
        drop(second);
        drop(poll(&mut red[2]).expect("free"));
        assert_eq!(free_and_holders(&slots), (2, 0), "free again");
    }

    #[tokio::test(start_paused = true)]
    async fn slot_that_was_left_for_others_goes_to_a_team_that_has_none_any_more() {
        let slots = FairSlots::new(3);
        let (red, blue) = (slot(&slots, "red").expect("free"), slot(&slots, "blue").expect("free"));
        let (mut more_blue, mut more_red) = (wait(&slots, "blue"), wait(&slots, "red"));
        assert_eq!(slots.0.lock().free, 1, "each leaves it");
        drop(red);
        let given = (poll(&mut more_blue), poll(&mut more_red));
        assert!(given.0.is_some() && given.1.is_some(), "{given:?}");
        drop((blue, given));
        assert_eq!(free_and_holders(&slots), (3, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_is_dropped_after_it_was_given_a_slot_passes_it_on() {
        let slots = FairSlots::new(1);
        let held = slot(&slots, "green").expect("free");
        let (red, mut blue) = (wait(&slots, "red"), wait(&slots, "blue"));
        drop(held);
        assert!(poll(&mut blue).is_none(), "it is red's");
        drop(red);
        let held = poll(&mut blue).expect("passed on");
        let last = wait(&slots, "red");
        drop(held);
        drop(last);
        assert!(slot(&slots, "green").is_some(), "nobody waits, so it is free");
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_is_dropped_or_too_late_leaves_nothing_behind() {
        let slots = FairSlots::new(1);
        let held = slot(&slots, "green").expect("free");
        drop(wait(&slots, "red"));
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(slots.take(None, soon).await.is_none(), "it is held");
        assert!(slots.0.lock().waiting.pop(|_| true).is_none());
        drop(held);
        assert!(slots.take(None, soon).await.is_some());
    }

    proptest! {
        /// Any order of waiters that come, slots that come back and waiters that give up.
        #[test]
        fn no_team_takes_the_last_slot_beside_another_and_none_is_left_idle(
            count in 1_usize..6,
            steps in proptest::collection::vec((0_u8..3, 0_u8..4), 0..200),
        ) {
            let slots = FairSlots::new(count);
            let (mut held, mut waiting) = (Vec::<Slot>::new(), Vec::<Waiter>::new());
            for (step, number) in steps {
                let at = usize::from(number);
                match step {
                    0 => {
                        let (team, before) = (named(&format!("team-{number}")), slots.0.lock().free);
                        let own = held.iter().filter(|slot| slot.party.as_ref() == Some(&team)).count();
                        match slots.take_or_wait(Some(&team)) {
                            Ok(slot) => {
                                prop_assert!(own == 0 || before > 1, "the last one beside {own}");
                                held.push(slot);
                            }
                            Err(waiter) => waiting.push(waiter),
                        }
                    }
                    1 if !held.is_empty() => drop(held.remove(at % held.len())),
                    2 if !waiting.is_empty() => drop(waiting.remove(at % waiting.len())),
                    _ => {}
                }
                waiting.retain_mut(|waiter| match waiter.given.try_recv() {
                    Ok(slot) => {
                        held.push(slot);
                        false
                    }
                    Err(_) => true,
                });
                let state = slots.0.lock();
                prop_assert_eq!(state.free + held.len(), count, "none is lost or made");
                let idle = waiting.iter().find(|waiter| state.may_take(&waiter.party));
                prop_assert!(idle.is_none(), "{idle:?} waits beside a slot that it may take");
            }
            drop((held, waiting));
            let state = slots.0.lock();
            prop_assert_eq!((state.free, state.held.len()), (count, 0));
        }
    }

    /// No slot is lost or given twice, whatever moment a waiter gives up at.
    #[test]
    fn threads_that_take_and_give_up_leave_all_slots_free() {
        let slots = FairSlots::new(2);
        std::thread::scope(|scope| {
            for thread in 0..8u32 {
                let slots = &slots;
                scope.spawn(move || {
                    let team = named(&format!("team-{}", thread % 3));
                    for _ in 0..2_000 {
                        // Dropped at once, with a slot or without.
                        drop(slots.take_or_wait(Some(&team)));
                    }
                });
            }
        });
        assert_eq!(free_and_holders(&slots), (2, 0));
        assert!(slots.0.lock().waiting.pop(|_| true).is_none());
    }
}
