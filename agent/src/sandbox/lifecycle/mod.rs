//! From the first intent to the deletion: what changes whether a container exists and runs.
//!
//! Each operation is one file; `boot`, `probe` and `address` are the parts that several of them use.

pub mod address;
pub(super) mod boot;
pub(super) mod cancel;
pub(super) mod cgroup_limits;
mod clone;
pub(super) mod create;
mod default_services;
pub(super) mod delete;
pub(super) mod enforce_pause;
mod limit_boots;
pub(super) mod pause;
pub(super) mod probe;
pub mod resize;
pub(super) mod resume;
pub(super) mod start;
pub(super) mod stop;
pub(super) mod undo;
pub(super) mod unlock;
mod update;
