//! Whether a helper still lives in the sense that counts: it answers. Pure.
//!
//! A helper that is dead is noticed by its socket. One that was stopped by a signal, is traced, or
//! waits in the kernel for something of the sandbox's holds its socket open and says nothing, while
//! every command of the sandbox waits for its word. So it is asked for a sign of life whenever
//! something is expected of it.

use std::time::Duration;

/// Between two questions, and between two looks at whether the answer has come.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// How long an answer may take before a helper that a signal has stopped is told to go on.
const SLOW: Duration = Duration::from_secs(1);
/// How long an answer may take: milliseconds, unless the sandbox is under heavy load. Then it takes
/// longer, and losing all commands for that would be worse than waiting.
pub(super) const STUCK: Duration = Duration::from_secs(15);

/// A question that is not answered yet.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    waited: Duration,
}

/// What there is to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait.
    Wait,
    /// Tell it to go on, if it was stopped.
    GoOn,
    /// Take it for stuck.
    GiveUp,
}

impl Unanswered {
    /// After another look, `since` the last one. Time in which the sandbox was frozen does not
    /// count, and of a look that came late, by a shim or a host that stood still itself, only as
    /// much as one look takes.
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
    fn an_answer_that_does_not_come_is_waited_for_and_then_given_up() {
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
    fn a_shim_that_stood_still_itself_gives_nothing_up() {
        let mut unanswered = Unanswered::default();
        for _ in 0..14 {
            assert_ne!(unanswered.look(Duration::from_secs(3600), false), Next::GiveUp);
        }
        assert_eq!(unanswered.look(Duration::from_secs(3600), false), Next::GiveUp);
    }
}
