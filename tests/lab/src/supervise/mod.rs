//! Keeps services running on the machine and in each node, where the same code is the init.
//!
//! `service` defines a service, `order` sends orders, `supervisor` is the loop, `spawn` starts
//! processes.

pub mod order;
pub mod service;
mod spawn;
pub mod supervisor;

pub use order::{Order, Services};
pub use service::{Restart, Service, State, Status};
