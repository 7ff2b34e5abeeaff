//! Slots that the teams of a node share. Where they are all taken, the teams that wait take turns.

use std::sync::Arc;

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
    /// Free slots; none while anybody waits.
    free: usize,
    waiting: RoundRobin<Party, oneshot::Sender<Slot>>,
}

/// A slot that is taken. When it is dropped, the next waiter gets it.
#[derive(Debug)]
pub(crate) struct Slot(FairSlots);

/// A waiter in the line of its team. It may be dropped at any time; a slot that it was given by then goes to the
/// next waiter.
#[derive(Debug)]
struct Waiter {
    slots: FairSlots,
    party: Party,
    ticket: u64,
    given: oneshot::Receiver<Slot>,
}

impl FairSlots {
    /// Creates `slots` free slots.
    pub(crate) fn new(slots: usize) -> Self {
        Self(Arc::new(Mutex::new(State { free: slots, waiting: RoundRobin::new() })))
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
        if let Some(free) = state.free.checked_sub(1) {
            state.free = free;
            return Ok(Slot(self.clone()));
        }
        let (give, given) = oneshot::channel();
        let party = team.cloned();
        let ticket = state.waiting.join(party.clone(), give);
        Err(Waiter { slots: self.clone(), party, ticket, given })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let next = {
            let mut state = self.0.0.lock();
            let next = state.waiting.pop();
            if next.is_none() {
                state.free += 1;
            }
            next
        };
        if let Some(next) = next {
            // A waiter that has just given up does not take it: dropped here, the slot goes to the next one.
            drop(next.send(Slot(self.0.clone())));
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

    use super::*;

    type Wait = Pin<Box<dyn Future<Output = Option<Slot>>>>;

    /// Waits for a slot without an end; it has its place in the line when this returns.
    fn wait(slots: &FairSlots, team: &str) -> Wait {
        let (slots, team) = (slots.clone(), team.parse::<Team>().expect("a team"));
        let deadline = Instant::now() + Duration::from_secs(3600);
        let mut wait: Wait = Box::pin(async move { slots.take(Some(&team), deadline).await });
        assert!(poll(&mut wait).is_none(), "no slot is free");
        wait
    }

    /// Slot that was given, if one was.
    fn poll(wait: &mut Wait) -> Option<Slot> {
        wait.now_or_never().flatten()
    }

    fn slot(slots: &FairSlots) -> Option<Slot> {
        slots.take_or_wait(None).ok()
    }

    #[tokio::test(start_paused = true)]
    async fn free_slot_goes_to_the_team_whose_turn_it_is() {
        let slots = FairSlots::new(2);
        let (first, second) = (slot(&slots).expect("free"), slot(&slots).expect("free"));
        let mut red = ["red", "red", "red"].map(|team| wait(&slots, team));
        let mut blue = wait(&slots, "blue");
        drop(first);
        let first = poll(&mut red[0]).expect("came first");
        assert!(poll(&mut blue).is_none());
        drop(second);
        let second = poll(&mut blue).expect("red has had its turn");
        assert!(slot(&slots).is_none() && poll(&mut red[1]).is_none());
        drop((first, second));
        assert_eq!(red[1..].iter_mut().filter_map(poll).count(), 2);
        assert_eq!(slots.0.lock().free, 2, "free again");
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_is_dropped_after_it_was_given_a_slot_passes_it_on() {
        let slots = FairSlots::new(1);
        let held = slot(&slots).expect("free");
        let (red, mut blue) = (wait(&slots, "red"), wait(&slots, "blue"));
        drop(held);
        assert!(poll(&mut blue).is_none(), "it is red's");
        drop(red);
        let held = poll(&mut blue).expect("passed on");
        let last = wait(&slots, "red");
        drop(held);
        drop(last);
        assert!(slot(&slots).is_some(), "nobody waits, so it is free");
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_is_dropped_or_too_late_leaves_nothing_behind() {
        let slots = FairSlots::new(1);
        let held = slot(&slots).expect("free");
        drop(wait(&slots, "red"));
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(slots.take(None, soon).await.is_none(), "it is held");
        assert!(slots.0.lock().waiting.pop().is_none());
        drop(held);
        assert!(slots.take(None, soon).await.is_some());
    }

    /// No slot is lost or given twice, whatever moment a waiter gives up at.
    #[test]
    fn threads_that_take_and_give_up_leave_all_slots_free() {
        let slots = FairSlots::new(2);
        std::thread::scope(|scope| {
            for thread in 0..8u32 {
                let slots = &slots;
                scope.spawn(move || {
                    let team: Team = format!("team-{}", thread % 3).parse().expect("a team");
                    for _ in 0..2_000 {
                        // Dropped at once, with a slot or without.
                        drop(slots.take_or_wait(Some(&team)));
                    }
                });
            }
        });
        assert_eq!(slots.0.lock().free, 2);
        assert!(slots.0.lock().waiting.pop().is_none());
    }
}
