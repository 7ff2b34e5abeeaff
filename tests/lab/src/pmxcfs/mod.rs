//! A small /etc/pve: one daemon on the machine, one tree, one FUSE mount for each node.
//!
//! `tree` and `cluster` are pure; `store` keeps the tree on disk; `fs` answers the kernel; `daemon`
//! mounts and takes orders; `control` sends them.
//!
//! Not modelled: a node that is cut off still sees what the others write (it only loses the right
//! to write itself), the cluster log is empty, and locks do not expire.

pub mod cluster;
pub mod control;
pub mod daemon;
mod fs;
mod shared;
mod store;
pub mod tree;
