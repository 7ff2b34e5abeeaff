//! Whether this node takes another sandbox, and in which order it makes them.

pub(super) mod clone_queue;
pub(super) mod decide;
mod growth;
pub(super) mod lock;
pub(super) mod number;
pub(super) mod reserve;
pub(super) mod scheduling;
pub(super) mod templates;
