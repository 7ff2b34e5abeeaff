//! Exit codes; `--help` lists them.

/// The call was refused or failed.
pub const REFUSED: u8 = 1;
/// The usage or configuration is wrong.
pub const USAGE: u8 = 2;
/// The named object does not exist.
pub const NOT_FOUND: u8 = 3;
/// The call failed, but may succeed later.
pub const NOT_NOW: u8 = 4;
/// Failure of `exec` itself, not the command's own exit code.
pub const EXEC: u8 = 125;
/// Stopped by the user.
pub const INTERRUPTED: u8 = 130;
/// Ended by SIGHUP: 128 + 1.
pub const HUNG_UP: u8 = 129;
/// Ended by SIGTERM: 128 + 15.
pub const TERMINATED: u8 = 143;
/// The reader of our output has closed it: 128 + SIGPIPE, as with programs that the signal ends.
pub const PIPE: u8 = 141;
