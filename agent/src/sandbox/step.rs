//! Names of the steps of a creation, for people and for the record.

pub(super) const QUEUED: &str = "queued";
pub(super) const CLONE: &str = "clone";
pub(super) const CONFIGURE: &str = "configure";
pub(super) const RESIZE: &str = "resize";
/// Before the start, which takes half a minute longer: whoever waits is told.
pub(super) const RESIZE_OFFLINE: &str = "resize_offline";
pub(super) const START: &str = "start";
pub(super) const PROBE: &str = "probe";
pub(super) const DONE: &str = "done";
/// Somebody's container becomes a sandbox: it stands in the journal, and its mark is to be written.
pub(super) const ADOPT: &str = "adopt";
/// A sandbox becomes somebody's container: its mark is to be taken off.
pub(super) const RELEASE: &str = "release";

/// Its record was given to another node, with its container. Nothing of it may change here any more:
/// that node would not hear of it.
pub(super) const HAND_OVER: &str = "hand_over";

/// A sandbox has come from another node: it stands in the journal, and its container is to be
/// connected to this one.
pub(super) const TAKE_OVER: &str = "take_over";

/// A container is becoming a sandbox of this node.
pub fn is_adopting(step: &str) -> bool {
    step == ADOPT || step == TAKE_OVER
}

/// A sandbox is on its way to another node.
pub(super) fn is_handed_over(step: &str) -> bool {
    step == HAND_OVER
}

/// A sandbox is being given back.
pub fn is_releasing(step: &str) -> bool {
    step == RELEASE
}

/// True while a clone is under way, which holds PVE's lock on the template.
pub(super) fn is_cloning(step: &str) -> bool {
    step == CLONE
}

/// True when the clone is known to have been made: what stands there now must be ours.
pub(super) fn is_past_clone(step: &str) -> bool {
    step != QUEUED && step != CLONE
}
