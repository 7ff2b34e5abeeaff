//! Exit codes; `--help` lists them.

/// Refused or failed.
pub const REFUSED: u8 = 1;
/// Wrong usage or configuration.
pub const USAGE: u8 = 2;
/// What was named is not there.
pub const NOT_FOUND: u8 = 3;
/// The same call may work later.
pub const NOT_NOW: u8 = 4;
/// `exec`: not the command's own exit code.
pub const EXEC: u8 = 125;
/// Stopped by the user.
pub const INTERRUPTED: u8 = 130;
/// The reader of our output went away: 128 + SIGPIPE, as other programs die of it.
pub const PIPE: u8 = 141;
