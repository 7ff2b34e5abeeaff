//! Keeps services running, on the machine and in each node: the same code is the init of a node.
//!
//! `service` is what a service is, `order` how the lab gives orders, `supervisor` the loop,
//! `spawn` how a process starts.

pub mod order;
pub mod service;
mod spawn;
pub mod supervisor;

pub use order::{Order, Services};
pub use service::{Restart, Service, State, Status};
