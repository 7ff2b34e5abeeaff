//! Decides which action is due for a sandbox by the rules of its lifetime. Pure.

use std::time::Duration;

use proto::{Cause, lifetime::Action};

use crate::{
    clock::Moment,
    journal::{Phase, Record},
    sandbox::Lifetimes,
};

/// One thing that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Cause of the action.
    pub cause: Cause,
    /// Action to take.
    pub action: Action,
}

/// Decides what is due for a sandbox that has not been used for `unused`.
pub(in crate::sandbox) fn due(
    record: &Record,
    now: &Moment,
    unused: Duration,
    rules: &Lifetimes,
) -> Option<Due> {
    let life = &record.lifetime;
    let expired = life.expires.as_ref().is_some_and(|expiry| expiry.reached(now));
    let ttl = expired.then_some(Due { cause: Cause::Ttl, action: life.ttl_action });
    let kept = |longest: Duration, action| {
        let too_long = !longest.is_zero() && record.since.ago(now) >= longest;
        (too_long && !rules.exempts(record))
            .then_some(Due { cause: Cause::RetentionExceeded, action })
    };
    match record.phase {
        Phase::Running => ttl.or_else(|| {
            let idle = life.idle_ms > 0 && unused >= Duration::from_millis(life.idle_ms);
            idle.then_some(Due { cause: Cause::Idle, action: life.idle_action })
        }),
        Phase::Paused => ttl
            .filter(|due| due.action != Action::Pause)
            .or_else(|| kept(rules.paused_max, Action::Stop)),
        Phase::Stopped => ttl
            .filter(|due| due.action == Action::Delete)
            .or_else(|| kept(rules.stopped_max, Action::Delete)),
        Phase::Creating
        | Phase::Undoing
        | Phase::Starting
        | Phase::Stopping
        | Phase::Deleting
        | Phase::Deleted
        | Phase::Failed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Lifetime, conformance::record};

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(hours: u32) -> Moment {
        Moment { wall_ms: 1, boot: "b".into(), up_ms: 1 }.after(HOUR * hours)
    }

    fn with(phase: Phase, life: Lifetime) -> Record {
        Record { phase, lifetime: life, since: at(0), ..record(1) }
    }

    fn expiring(action: Action) -> Lifetime {
        Lifetime { ttl_action: action, expires: Some(at(2)), ..Lifetime::default() }
    }

    fn ttl(action: Action) -> Option<Due> {
        Some(Due { cause: Cause::Ttl, action })
    }

    #[test]
    fn action_is_due_from_the_expiry_on() {
        let rules = Lifetimes::default();
        let of = |phase, action, hour| {
            due(&with(phase, expiring(action)), &at(hour), Duration::ZERO, &rules)
        };
        for action in [Action::Pause, Action::Stop, Action::Delete] {
            assert_eq!(of(Phase::Running, action, 1), None);
            assert_eq!(of(Phase::Running, action, 2), ttl(action));
            assert_eq!(of(Phase::Starting, action, 9), None, "an operation has it");
        }
        assert_eq!(of(Phase::Paused, Action::Pause, 9), None, "it is paused");
        assert_eq!(of(Phase::Paused, Action::Stop, 9), ttl(Action::Stop));
        assert_eq!(of(Phase::Stopped, Action::Stop, 9), None);
        assert_eq!(of(Phase::Stopped, Action::Delete, 9), ttl(Action::Delete));
    }

    #[test]
    fn idle_action_is_due_once_a_running_sandbox_is_unused_long_enough() {
        let rules = Lifetimes::default();
        let life =
            Lifetime { idle_ms: 3_600_000, idle_action: Action::Stop, ..Lifetime::default() };
        let of = |phase, unused| due(&with(phase, life.clone()), &at(9), unused, &rules);
        assert_eq!(of(Phase::Running, HOUR - Duration::from_millis(1)), None);
        let stop = Due { cause: Cause::Idle, action: Action::Stop };
        assert_eq!(of(Phase::Running, HOUR), Some(stop));
        assert_eq!(of(Phase::Paused, HOUR * 9), None);
        let never = with(Phase::Running, Lifetime::default());
        assert_eq!(due(&never, &at(9), HOUR * 9999, &rules), None);
    }

    #[test]
    fn retention_stops_paused_and_deletes_stopped_sandboxes_unless_exempt() {
        let rules = Lifetimes {
            paused_max: HOUR * 20,
            stopped_max: HOUR * 24 * 7,
            exempt: Some(("keep".into(), "true".into())),
            ..Lifetimes::default()
        };
        let of = |record: &Record, hours| due(record, &at(hours), Duration::ZERO, &rules);
        let paused = with(Phase::Paused, Lifetime::default());
        assert_eq!(of(&paused, 19), None);
        assert_eq!(
            of(&paused, 20),
            Some(Due { cause: Cause::RetentionExceeded, action: Action::Stop })
        );
        let mut stopped = with(Phase::Stopped, Lifetime::default());
        assert_eq!(
            of(&stopped, 24 * 7),
            Some(Due { cause: Cause::RetentionExceeded, action: Action::Delete })
        );
        stopped.since = Moment::default();
        assert_eq!(of(&stopped, 24 * 7), None, "nobody knows since when");
        let mut exempt = paused;
        exempt.metadata.insert("keep".into(), "true".into());
        assert_eq!(of(&exempt, 9999), None);
        assert_eq!(of(&with(Phase::Running, Lifetime::default()), 9999), None);
    }
}
