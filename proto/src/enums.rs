//! Short names of enums of the wire, for people and for scripts.

use crate::sandbox::v1::{Filtered, GarbageAction, Invariant, ScorePartKind};

impl Invariant {
    /// Returns the name, such as `I1`.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches("INVARIANT_")
    }
}

impl GarbageAction {
    /// Returns the name in UPPER_SNAKE, such as `ENFORCE_PAUSE`.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches("GARBAGE_ACTION_")
    }
}

impl Filtered {
    /// Returns the name in UPPER_SNAKE; empty for a node that was not filtered out.
    pub fn name(self) -> &'static str {
        let named = self != Self::Unspecified;
        if named { self.as_str_name().trim_start_matches("FILTERED_") } else { "" }
    }
}

impl ScorePartKind {
    /// Returns the name in UPPER_SNAKE, such as `CPU`.
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches("SCORE_PART_KIND_")
    }
}
