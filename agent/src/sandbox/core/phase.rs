//! State machine of a sandbox's phases. Pure.
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
//!
//!              PauseAsked
//!    RUNNING -----------------> PAUSED --StopAsked--> STOPPING
//!       ^                        |  |
//!       +--ResumeAsked-----------+  +--FoundDown----> STOPPED
//!          FreezeFailed
//! ```
//!
//! Released: from every live phase but CREATING and UNDOING to DELETED; the container stays.
//! FoundUp: from STOPPED to RUNNING. Rebooted: from RUNNING to STARTING. StopRefused: from STOPPING
//! to RUNNING.
//!
//! PAUSED and RUNNING are intended states: they are written before the container is frozen or
//! thawed. There is no phase in between, so a crash leaves nothing to find out.

use std::fmt;

use crate::journal::Phase;

/// Event in the life of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The sandbox runs and is ready.
    CameUp,
    /// The creation failed or was cancelled.
    CreateFailed,
    /// The rollback of a failed creation is complete.
    Undone,
    /// A start was requested.
    StartAsked,
    /// The start failed; the container was stopped.
    StartFailed,
    /// A pause was requested.
    PauseAsked,
    /// A resume was requested.
    ResumeAsked,
    /// The container could not be frozen; it was thawed.
    FreezeFailed,
    /// A stop was requested.
    StopAsked,
    /// The requested stop is complete.
    WentDown,
    /// The container could not be stopped; it keeps running.
    StopRefused,
    /// The container was found stopped, without a request.
    FoundDown,
    /// The container was found running, without a request.
    FoundUp,
    /// The node was rebooted while the sandbox ran; it is started again.
    Rebooted,
    /// The container is no longer a sandbox; it stays as it is.
    Released,
    /// A deletion was requested.
    DeleteAsked,
    /// Nothing of the sandbox is left.
    Removed,
}

/// Name for a sentence: "... cannot happen to it".
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CameUp => "the end of a boot",
            Self::CreateFailed => "the failure of a creation",
            Self::Undone => "the end of a rollback",
            Self::StartAsked => "a start",
            Self::StartFailed => "the failure of a start",
            Self::PauseAsked => "a pause",
            Self::ResumeAsked => "a resume",
            Self::FreezeFailed => "the failure of a pause",
            Self::StopAsked => "a stop",
            Self::WentDown => "the end of a stop",
            Self::StopRefused => "the failure of a stop",
            Self::FoundDown => "an end without a request",
            Self::FoundUp => "a start without a request",
            Self::Rebooted => "a reboot of its node",
            Self::Released => "a release",
            Self::DeleteAsked => "a deletion",
            Self::Removed => "the end of a deletion",
        })
    }
}

/// Returns the phase that follows; `None` when the event cannot happen in this phase.
pub const fn next(phase: Phase, event: Event) -> Option<Phase> {
    use Event as E;
    use Phase as P;
    Some(match (phase, event) {
        (P::Creating | P::Starting, E::CameUp) => P::Running,
        (P::Creating | P::Undoing, E::CreateFailed) => P::Undoing,
        (P::Undoing, E::Undone) => P::Failed,
        (P::Stopped | P::Starting, E::StartAsked) => P::Starting,
        (P::Starting, E::StartFailed) => P::Stopped,
        (P::Running, E::PauseAsked) => P::Paused,
        (P::Paused, E::ResumeAsked | E::FreezeFailed) => P::Running,
        (P::Running | P::Paused | P::Starting | P::Stopping, E::StopAsked) => P::Stopping,
        (P::Stopping, E::WentDown) => P::Stopped,
        (P::Stopping, E::StopRefused) => P::Running,
        (P::Running | P::Paused, E::FoundDown) => P::Stopped,
        (P::Stopped | P::Running, E::FoundUp) => P::Running,
        (P::Running, E::Rebooted) => P::Starting,
        (P::Deleting, E::Removed) => P::Deleted,
        (
            P::Running | P::Paused | P::Starting | P::Stopping | P::Stopped | P::Deleting,
            E::Released,
        ) => P::Deleted,
        (P::Failed, E::DeleteAsked) => P::Deleted,
        (
            P::Creating
            | P::Undoing
            | P::Running
            | P::Paused
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

    const PHASES: [Phase; 10] = [
        Phase::Creating,
        Phase::Undoing,
        Phase::Running,
        Phase::Paused,
        Phase::Starting,
        Phase::Stopping,
        Phase::Stopped,
        Phase::Deleting,
        Phase::Deleted,
        Phase::Failed,
    ];
    const EVENTS: [Event; 17] = [
        Event::CameUp,
        Event::CreateFailed,
        Event::Undone,
        Event::StartAsked,
        Event::StartFailed,
        Event::PauseAsked,
        Event::ResumeAsked,
        Event::FreezeFailed,
        Event::StopAsked,
        Event::WentDown,
        Event::StopRefused,
        Event::FoundDown,
        Event::FoundUp,
        Event::Rebooted,
        Event::Released,
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
    fn every_event_has_a_name_of_its_own_in_words() {
        let names: std::collections::BTreeSet<_> = EVENTS.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), EVENTS.len(), "{names:?}");
        assert!(names.iter().all(|name| name.contains(' ')), "{names:?}");
    }

    #[test]
    fn deleting_sandbox_can_only_become_deleted() {
        for event in EVENTS {
            let after = next(Phase::Deleting, event);
            assert!(matches!(after, None | Some(Phase::Deleting | Phase::Deleted)), "{event:?}");
        }
    }

    #[test]
    fn failed_creation_never_becomes_running() {
        assert_eq!(next(Phase::Undoing, Event::CameUp), None);
        assert_eq!(next(Phase::Undoing, Event::StartAsked), None);
    }

    #[test]
    fn only_running_can_be_paused_and_only_paused_can_be_resumed() {
        for phase in PHASES {
            let paused = next(phase, Event::PauseAsked);
            assert_eq!(paused, (phase == Phase::Running).then_some(Phase::Paused), "{phase:?}");
            let resumed = next(phase, Event::ResumeAsked);
            assert_eq!(resumed, (phase == Phase::Paused).then_some(Phase::Running), "{phase:?}");
        }
        assert_eq!(next(Phase::Paused, Event::StartAsked), None, "it would boot what runs");
    }
}
