//! Retention of a shim's commands: decides what to drop by age, by number, and by the disk space
//! that outputs take.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use daemon::seldom::Seldom;

use super::{
    ring::Budget,
    session::{HELD, REST, Session},
};

/// Most ended commands that are kept: with exec_ids from callers, and with generated ones.
const ENDED_MAX: usize = 64;
/// Retention of an ended command with a generated exec_id: for an agent that restarts.
const MADE_UP_KEPT: Duration = HELD;
/// Retention of an ended command with an exec_id from its caller, at least while its background
/// processes write.
const NAMED_KEPT: Duration = REST;
/// Most ended commands whose background processes may continue to write. Beyond them, the one that
/// ended first is read no more, and its background processes are killed by their next write.
const BACKGROUND_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Commands {
    /// Commands that can be asked for, by exec_id.
    pub(super) named: BTreeMap<String, Arc<Session>>,
    /// Commands that cannot be asked for any more, and whose background processes still write.
    forgotten: Vec<Arc<Session>>,
    /// Lines about commands whose output is no longer read.
    crowded: Seldom,
}

/// Size of an ended command's output in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndedOutput {
    pub(super) age: Duration,
    pub(super) bytes: u64,
}

impl Commands {
    pub(super) fn count(&self) -> usize {
        self.named.len() + self.forgotten.len()
    }

    /// Drops what has been kept for long enough, and what exceeds the limits.
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
            if let Some(left_out) = self.crowded.admit() {
                tracing::info!(
                    exec_id = session.title.exec_id,
                    left_out,
                    "too many ended commands have background output: the output of this one is no longer read"
                );
            }
            session.drop_background();
        }
    }

    /// Drops a command that nobody can ask for any more.
    pub(super) fn forget(&mut self, session: Arc<Session>) {
        session.forget();
        if session.has_background() {
            self.forgotten.push(session);
        }
    }

    /// Drops outputs until the budget is met, starting with the command that ended first. Running
    /// commands come last and keep their unread output, for which `floor` bytes are reserved.
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

    /// Drops outputs of ended commands, the one that ended first before all others, until `bytes`
    /// bytes are freed.
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

    /// Lists the outputs of ended commands, the oldest first.
    pub(super) fn ended_outputs(&self) -> Vec<EndedOutput> {
        let output = |session: Arc<Session>| {
            let (age, bytes) = (session.ended_for()?, session.in_files());
            (bytes > 0).then_some(EndedOutput { age, bytes })
        };
        self.ended().into_iter().filter_map(output).collect()
    }

    /// Lists the running commands whose callers chose their names, by name.
    pub(super) fn running_names(&self) -> Vec<String> {
        let named = self.named.values().filter(|session| session.title.keep && session.runs());
        named.map(|session| session.title.exec_id.clone()).collect()
    }

    fn ended(&self) -> Vec<Arc<Session>> {
        self.by_age(|_| true)
    }

    /// Lists ended commands, the one that ended first at the front.
    fn by_age(&self, wanted: impl Fn(&Session) -> bool) -> Vec<Arc<Session>> {
        let all = self.named.values().chain(&self.forgotten).filter(|session| wanted(session));
        let mut ended: Vec<(Duration, &Arc<Session>)> =
            all.filter_map(|session| Some((session.ended_for()?, session))).collect();
        ended.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
        ended.into_iter().map(|(_, session)| Arc::clone(session)).collect()
    }
}
