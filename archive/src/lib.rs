//! Tar archives of files, for copies between a sandbox and another machine. The helper inside a
//! sandbox and `sandboxctl` pack and unpack by the same rules, which docs/copying.md has as a table.
//!
//! An archive is not trusted: nothing outside of the destination is written, no symbolic link that
//! the archive brought is followed, and a file appears under its name when it is whole.

mod error;
mod new_file;
mod pack;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

pub use error::Error;
pub use new_file::{Attributes, NewFile};
pub use pack::{LEFT_OUT_MAX, pack};
pub use unpack::{Destination, First, Owner, Report, Root, Rules, unpack};

/// Beginning of a comment in an archive that names a file which the archive cannot hold.
const LEFT_OUT: &str = "left out: ";
