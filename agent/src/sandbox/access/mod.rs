//! Ways into a sandbox and out of it: its ports and the credentials for them, the calls that wake it, its files, what it reaches.

pub mod credential;
pub mod expose;
pub mod files;
pub mod isolation;
pub mod kill_connections;
pub mod links;
mod listen;
mod names;
pub(super) mod pending_cuts;
pub(super) mod wake;
