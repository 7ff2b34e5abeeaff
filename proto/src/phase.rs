//! Properties of a phase that several crates need. Each match lists all phases, so a new phase has
//! to be added to all of them.

use crate::sandbox::v1::Phase;

impl Phase {
    /// Returns true when the sandbox is deleted or its creation has failed: it never runs again.
    pub fn has_ended(self) -> bool {
        match self {
            Self::Deleted | Self::Failed => true,
            Self::Unspecified
            | Self::Creating
            | Self::Running
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Deleting
            | Self::Unreachable
            | Self::Paused => false,
        }
    }

    /// Returns true while an operation works on the sandbox that leads to another phase.
    pub fn is_changing(self) -> bool {
        match self {
            Self::Creating | Self::Starting | Self::Stopping | Self::Deleting => true,
            Self::Unspecified
            | Self::Running
            | Self::Stopped
            | Self::Deleted
            | Self::Failed
            | Self::Unreachable
            | Self::Paused => false,
        }
    }

    /// Returns true when the sandbox has processes, running or frozen, and no operation works on
    /// it.
    pub fn is_up(self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Unspecified
            | Self::Creating
            | Self::Starting
            | Self::Stopping
            | Self::Stopped
            | Self::Deleting
            | Self::Deleted
            | Self::Failed
            | Self::Unreachable => false,
        }
    }
}
