//! Names of a node's operations.

/// An operation that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// `clone_template`.
    Clone,
    /// `configure`.
    Set,
    /// `resize`.
    Resize,
    /// `hand_to`.
    HandTo,
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
    /// `hold`.
    PauseLock,
    /// `release`.
    PauseUnlock,
    /// `freeze`.
    Freeze,
    /// `thaw`.
    Thaw,
}

impl Op {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Clone => "clone",
            Self::Set => "set",
            Self::Resize => "resize",
            Self::HandTo => "hand over",
            Self::Start => "start",
            Self::Halt => "halt",
            Self::Stop => "stop",
            Self::Destroy => "destroy",
            Self::Unlock => "unlock",
            Self::Mark => "mark",
            Self::Unmark => "unmark",
            Self::PauseLock => "pause lock",
            Self::PauseUnlock => "pause unlock",
            Self::Freeze => "freeze",
            Self::Thaw => "thaw",
        }
    }
}
