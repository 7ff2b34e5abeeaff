//! How a container differs from its record, and what an operator can ask about that.

mod boots;
pub mod detect;
pub mod fsck;
pub mod garbage;
pub mod observe;
pub(super) mod orphans;
