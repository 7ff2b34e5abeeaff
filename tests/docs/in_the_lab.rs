//! Commands of docs/operations.md that need a second node. `tests/docs` checks that the blocks are there, and
//! `tests/lxc/operations.rs` runs them in the lab.

/// Headings of the blocks, each the first one below its heading.
pub(crate) const IN_THE_LAB: &[&str] = &["Lose a node", "Move a sandbox to another node"];
