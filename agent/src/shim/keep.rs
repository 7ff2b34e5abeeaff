//! What a shim keeps of its commands, and lets go of: by their age, their number, and the room that
//! their outputs take on the disk.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    ring::Budget,
    session::{HELD, Session},
};

/// Commands that have ended and are kept: by their callers' names, and by made-up ones.
const ENDED_MAX: usize = 64;
/// How long a command with a made-up name is kept once it has ended: for an agent that restarts.
const MADE_UP_KEPT: Duration = HELD;
/// How long one with its caller's name is, or for as long as its background writes.
const NAMED_KEPT: Duration = Duration::from_secs(60 * 60);
/// Ended commands whose background may go on writing. Beyond them the one that ended first is read no
/// more, and its background is killed by its next write.
const BACKGROUND_MAX: usize = 64;

/// All commands of a shim.
#[derive(Debug, Default)]
pub(super) struct Commands {
    /// Those that can be asked for, by their names.
    pub(super) named: BTreeMap<String, Arc<Session>>,
    /// Those that cannot any more, and whose background still writes.
    forgotten: Vec<Arc<Session>>,
}

/// An ended command's output in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndedOutput {
    /// How long ago the command ended.
    pub(super) age: Duration,
    /// How much it is.
    pub(super) bytes: u64,
}

impl Commands {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.named.len() + self.forgotten.len()
    }

    /// Lets go of what has been kept for long enough, and of what is too much.
    pub(super) fn tidy(&mut self) {
        self.forgotten.retain(|session| session.has_background());
        let done = self.named.values().filter(|session| !session.is_attached());
        let done: Vec<(Duration, &Arc<Session>)> =
            done.filter_map(|session| Some((session.ended_for()?, session))).collect();
        let mut gone: Vec<String> = Vec::new();
        for keep in [true, false] {
            let limit = if keep { NAMED_KEPT } else { MADE_UP_KEPT };
            let mut of_kind: Vec<_> =
                done.iter().filter(|(_, session)| session.title.keep == keep).collect();
            of_kind.sort_unstable_by_key(|(age, _)| *age);
            for (at, (age, session)) in of_kind.into_iter().enumerate() {
                let lives = keep && session.has_background();
                if at >= ENDED_MAX || *age >= limit && !lives {
                    gone.push(session.title.exec_id.clone());
                }
            }
        }
        for name in gone {
            if let Some(session) = self.named.remove(&name) {
                self.forget(session);
            }
        }
        let mut background = self.by_age(|session| session.has_background());
        let too_many = background.len().saturating_sub(BACKGROUND_MAX);
        for session in background.drain(..too_many) {
            tracing::info!(
                exec_id = session.title.exec_id,
                "too many commands left something that writes: this one is read no more"
            );
            session.let_background_go();
        }
    }

    /// Nobody can ask for it any more.
    pub(super) fn forget(&mut self, session: Arc<Session>) {
        session.forget();
        if session.has_background() {
            self.forgotten.push(session);
        }
    }

    /// Lets go of outputs until the budget is kept: of the command that ended first before all
    /// others. What is not read of one that runs stays; there is `floor` room for that.
    pub(super) fn make_room(&self, budget: &Budget, floor: u64) {
        let ended = self.ended();
        for attached in [false, true] {
            for session in ended.iter().filter(|session| session.is_attached() == attached) {
                if budget.used() <= budget.limit() {
                    return;
                }
                session.trim(0);
            }
        }
        for session in self.named.values().filter(|session| session.runs()) {
            if budget.used() <= budget.limit() {
                return;
            }
            session.trim(floor);
        }
    }

    /// Lets go of outputs of ended commands, of the one that ended first before all others, until so
    /// many bytes are free.
    pub(super) fn free(&self, bytes: u64) {
        let mut freed = 0;
        for session in self.ended() {
            if freed >= bytes {
                return;
            }
            freed += session.in_files();
            session.trim(0);
        }
    }

    /// The outputs of ended commands, the oldest first.
    pub(super) fn ended_outputs(&self) -> Vec<EndedOutput> {
        let output = |session: Arc<Session>| {
            let (age, bytes) = (session.ended_for()?, session.in_files());
            (bytes > 0).then_some(EndedOutput { age, bytes })
        };
        self.ended().into_iter().filter_map(output).collect()
    }

    fn ended(&self) -> Vec<Arc<Session>> {
        self.by_age(|_| true)
    }

    /// Of those that have ended, the one that ended first goes first.
    fn by_age(&self, wanted: impl Fn(&Session) -> bool) -> Vec<Arc<Session>> {
        let all = self.named.values().chain(&self.forgotten).filter(|session| wanted(session));
        let mut ended: Vec<(Duration, &Arc<Session>)> =
            all.filter_map(|session| Some((session.ended_for()?, session))).collect();
        ended.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
        ended.into_iter().map(|(_, session)| Arc::clone(session)).collect()
    }
}
