//! Names of the steps of an operation, for people and for the record.

pub(super) const QUEUED: &str = "queued";
pub(super) const CLONE: &str = "clone";
pub(super) const CONFIGURE: &str = "configure";
pub(super) const RESIZE: &str = "resize";
/// Resize before the start, which takes half a minute longer: callers who wait see this step.
pub(super) const RESIZE_OFFLINE: &str = "resize_offline";
pub(super) const START: &str = "start";
pub(super) const PROBE: &str = "probe";
pub(super) const DONE: &str = "done";
/// Adoption of a container: it is in the journal, and its mark is to be written.
pub(super) const ADOPT: &str = "adopt";
/// Release of a sandbox: its mark is to be removed.
pub(super) const RELEASE: &str = "release";

/// Handed over: the record was given to another node, with its container. The record must not
/// change here any more: that node would not learn of it.
pub(super) const HAND_OVER: &str = "hand_over";

/// Taken over: the sandbox came from another node and is in the journal; its container must be
/// connected here.
pub(super) const TAKE_OVER: &str = "take_over";

/// True while a container is becoming a sandbox of this node.
pub fn is_adopting(step: &str) -> bool {
    step == ADOPT || step == TAKE_OVER
}

/// True while a sandbox is on its way to another node.
pub(super) fn is_handed_over(step: &str) -> bool {
    step == HAND_OVER
}

/// True while a sandbox is being released.
pub fn is_releasing(step: &str) -> bool {
    step == RELEASE
}

/// True while a clone is under way, which holds PVE's lock on the template.
pub(super) fn is_cloning(step: &str) -> bool {
    step == CLONE
}

/// True when the clone is known to have been made: the container there now must be ours.
pub(super) fn is_past_clone(step: &str) -> bool {
    step != QUEUED && step != CLONE
}
