//! Names of a node's operations.

use crate::pve::Operation;

/// An operation that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// `clone_template`.
    Clone,
    /// `configure` and `set_limits`.
    Set,
    /// `resize`.
    Resize,
    /// `move_config_to`.
    MoveConfig,
    /// `start`.
    Start,
    /// `halt`.
    Halt,
    /// `stop`.
    Stop,
    /// `destroy_owned`.
    Destroy,
    /// `unlock_template`.
    Unlock,
    /// `mark`.
    Mark,
    /// `unmark`.
    Unmark,
    /// `acquire_pause_lock`.
    PauseLock,
    /// `release_pause_lock`.
    PauseUnlock,
    /// `freeze`.
    Freeze,
    /// `thaw`.
    Thaw,
}

impl Op {
    pub(super) fn operation(self) -> Operation {
        match self {
            Self::Clone => Operation::Clone,
            Self::Set => Operation::Set,
            Self::Resize => Operation::Resize,
            Self::MoveConfig => Operation::MoveConfig,
            Self::Start => Operation::Start,
            Self::Halt => Operation::Halt,
            Self::Stop => Operation::Stop,
            Self::Destroy => Operation::Destroy,
            Self::Unlock => Operation::Unlock,
            Self::Mark => Operation::Mark,
            Self::Unmark => Operation::Unmark,
            Self::PauseLock => Operation::PauseLock,
            Self::PauseUnlock => Operation::PauseUnlock,
            Self::Freeze => Operation::Freeze,
            Self::Thaw => Operation::Thaw,
        }
    }
}
