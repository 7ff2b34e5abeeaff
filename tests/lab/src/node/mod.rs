//! A node: how it is launched, what its init does, and how one gets into it.
//!
//! `launch` stays outside as the parent of `init`, which makes the namespaces and the `root`,
//! changes into them and then keeps the node's services; `enter` joins them for a command.

pub mod enter;
pub mod init;
pub mod launch;
mod root;
