//! Reads of callers: sandboxes, their events, usage and placement. Changes nothing.

mod events;
pub(super) mod explain;
mod list;
mod snapshots;
mod usage;
mod watch;
mod watch_many;

pub use events::{EventItem, EventQuery};
