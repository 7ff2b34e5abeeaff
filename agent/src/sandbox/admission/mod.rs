//! Whether this node takes another sandbox, and in which order it makes and starts them.

pub(super) mod clone_queue;
pub(super) mod decide;
pub(super) mod fair_slots;
mod growth;
pub(super) mod lock;
pub(super) mod number;
pub(super) mod reserve;
mod round_robin;
pub(super) mod scheduling;
pub(super) mod templates;
