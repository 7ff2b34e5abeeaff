//! The life of a sandbox. Pure.
//!
//! ```text
//!            CameUp              StopAsked             WentDown
//!  CREATING --------> RUNNING -----------> STOPPING ------------> STOPPED
//!      |               |  ^ \__________________________________^    |
//!      | CreateFailed  |  |            FoundDown                    | StartAsked
//!      v               |  +---------------- STARTING <--------------+
//!  UNDOING             |        CameUp         | StartFailed -> STOPPED
//!      | Undone        |
//!      v               v DeleteAsked, from every phase that has not ended
//!   FAILED          DELETING --Removed--> DELETED
//!      |                                     ^
//!      +---------- DeleteAsked --------------+
//! ```

use crate::journal::Phase;

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It runs and answered.
    CameUp,
    /// Its creation failed or was called off.
    CreateFailed,
    /// Nothing of a failed creation is left.
    Undone,
    /// Somebody wants it to run.
    StartAsked,
    /// It did not come up again; it was stopped.
    StartFailed,
    /// Somebody wants it stopped.
    StopAsked,
    /// It is down, as asked.
    WentDown,
    /// It was seen to be down, unasked.
    FoundDown,
    /// Somebody wants it gone.
    DeleteAsked,
    /// Nothing of it is left.
    Removed,
}

/// The phase that follows; `None` when the event cannot happen in this phase.
pub const fn next(phase: Phase, event: Event) -> Option<Phase> {
    use Event as E;
    use Phase as P;
    Some(match (phase, event) {
        (P::Creating | P::Starting, E::CameUp) => P::Running,
        (P::Creating | P::Undoing, E::CreateFailed) => P::Undoing,
        (P::Undoing, E::Undone) => P::Failed,
        (P::Stopped | P::Starting, E::StartAsked) => P::Starting,
        (P::Starting, E::StartFailed) => P::Stopped,
        (P::Running | P::Starting | P::Stopping, E::StopAsked) => P::Stopping,
        (P::Stopping, E::WentDown) => P::Stopped,
        (P::Running, E::FoundDown) => P::Stopped,
        (P::Deleting, E::Removed) => P::Deleted,
        (P::Failed, E::DeleteAsked) => P::Deleted,
        (
            P::Creating
            | P::Undoing
            | P::Running
            | P::Starting
            | P::Stopping
            | P::Stopped
            | P::Deleting,
            E::DeleteAsked,
        ) => P::Deleting,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 9] = [
        Phase::Creating,
        Phase::Undoing,
        Phase::Running,
        Phase::Starting,
        Phase::Stopping,
        Phase::Stopped,
        Phase::Deleting,
        Phase::Deleted,
        Phase::Failed,
    ];
    const EVENTS: [Event; 10] = [
        Event::CameUp,
        Event::CreateFailed,
        Event::Undone,
        Event::StartAsked,
        Event::StartFailed,
        Event::StopAsked,
        Event::WentDown,
        Event::FoundDown,
        Event::DeleteAsked,
        Event::Removed,
    ];

    #[test]
    fn a_tombstone_never_lives_again() {
        for phase in PHASES.into_iter().filter(|phase| phase.ended()) {
            for event in EVENTS {
                assert!(next(phase, event).is_none_or(Phase::ended), "{phase:?} {event:?}");
            }
        }
        assert!(EVENTS.into_iter().all(|event| next(Phase::Deleted, event).is_none()));
    }

    #[test]
    fn every_living_phase_can_be_deleted() {
        for phase in PHASES.into_iter().filter(|phase| !phase.ended()) {
            assert_eq!(next(phase, Event::DeleteAsked), Some(Phase::Deleting), "{phase:?}");
        }
    }

    #[test]
    fn a_deleting_sandbox_only_goes() {
        for event in EVENTS {
            let after = next(Phase::Deleting, event);
            assert!(matches!(after, None | Some(Phase::Deleting | Phase::Deleted)), "{event:?}");
        }
    }

    #[test]
    fn a_failed_creation_never_runs() {
        assert_eq!(next(Phase::Undoing, Event::CameUp), None);
        assert_eq!(next(Phase::Undoing, Event::StartAsked), None);
    }
}
