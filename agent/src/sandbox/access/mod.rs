//! Ways into a sandbox and out of it: its ports, the calls that wake it, its files, what it reaches.

pub(super) mod expose;
pub mod files;
pub mod isolation;
pub mod kill_connections;
mod names;
pub(super) mod wake;
