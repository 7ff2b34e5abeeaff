//! A node: its launch, its init, and how a command enters it.
//!
//! `launch` stays outside as the parent of `init`, which creates the namespaces and the `root`,
//! changes into them and then keeps the node's services running; `enter` joins them for a command.

pub mod enter;
pub mod init;
pub mod launch;
mod root;
