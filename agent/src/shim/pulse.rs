//! Decides whether a helper is alive, that is: whether it answers. Pure.
//!
//! The socket shows when a helper is dead. A helper that was stopped by a signal, is traced, or
//! blocks in the kernel on something of the sandbox's keeps its socket open but says nothing, while
//! every command of the sandbox waits for it. So the shim pings it whenever it expects something
//! from it.

use std::time::Duration;

/// Interval between pings, and between checks for the answer.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// Time without an answer after which a helper that a signal has stopped is sent SIGCONT.
const SLOW: Duration = Duration::from_secs(1);
/// Time without an answer after which a helper is stuck. An answer takes milliseconds, unless the
/// sandbox is under heavy load; losing all commands for that would be worse than waiting.
pub(super) const STUCK: Duration = Duration::from_secs(15);

/// Ping that is not answered yet.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    waited: Duration,
}

/// Next action for an unanswered ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Wait,
    /// Send SIGCONT if the helper is stopped.
    GoOn,
    /// Treat the helper as stuck.
    GiveUp,
}

impl Unanswered {
    /// Decides after another check, `since` the last one. Time in which the sandbox was frozen does
    /// not count. A check that came late, because the shim or the host was stalled, counts as one
    /// interval only.
    pub(super) fn look(&mut self, since: Duration, frozen: bool) -> Next {
        if frozen {
            return Next::Wait;
        }
        self.waited += since.min(BEAT);
        match self.waited {
            waited if waited >= STUCK => Next::GiveUp,
            waited if waited >= SLOW => Next::GoOn,
            _ => Next::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_is_given_up_after_many_missed_answers() {
        let mut unanswered = Unanswered::default();
        assert_eq!(unanswered.look(BEAT / 2, false), Next::Wait);
        let mut looks = 0;
        while unanswered.look(BEAT, false) == Next::GoOn {
            looks += 1;
        }
        assert_eq!(looks, 14);
        assert_eq!(unanswered.look(Duration::ZERO, false), Next::GiveUp);
    }

    #[test]
    fn no_answer_is_due_while_the_sandbox_is_frozen() {
        let mut unanswered = Unanswered::default();
        for _ in 0..10_000 {
            assert_eq!(unanswered.look(BEAT, true), Next::Wait);
        }
        assert_eq!(unanswered.look(BEAT / 2, false), Next::Wait, "all of the time is left");
    }

    #[test]
    fn long_pause_of_the_shim_counts_as_one_missed_answer() {
        let mut unanswered = Unanswered::default();
        for _ in 0..14 {
            assert_ne!(unanswered.look(Duration::from_secs(3600), false), Next::GiveUp);
        }
        assert_eq!(unanswered.look(Duration::from_secs(3600), false), Next::GiveUp);
    }
}
