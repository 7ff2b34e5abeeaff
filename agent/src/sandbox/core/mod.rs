//! What every operation stands on: the records and the only place that writes them, the phases and
//! what may follow what, the operations under way, and the options.

pub(super) mod deadline;
pub(super) mod error;
pub(super) mod forwards;
mod index;
pub(super) mod operations;
pub(super) mod options;
pub(super) mod phase;
pub(super) mod queries;
mod records;
pub(super) mod transitions;

pub use index::{Known, Tombstone};
pub(super) use records::Records;
