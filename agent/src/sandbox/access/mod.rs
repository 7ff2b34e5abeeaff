//! Ways into a sandbox: its ports, the calls that wake it, its files.

pub(super) mod expose;
pub mod files;
pub mod kill_connections;
pub(super) mod wake;
