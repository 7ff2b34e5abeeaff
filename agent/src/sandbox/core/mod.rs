//! The records of the sandboxes: the only place that writes them.

mod index;
mod records;

pub use index::{Known, Tombstone};
pub(super) use records::Records;
