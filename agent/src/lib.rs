//! The agent on one PVE node: it owns the truth about the sandboxes on it.
//!
//! # Code map
//! `agent` puts the parts together. At the edge stand `rpc` (`agent.v1` for the controller),
//! `ingress` (route questions of Caddy) and `reconcile` (brings the host to what the journal says);
//! they know `sandbox`, the domain with one file an operation, and not each other. `sandbox` knows
//! `journal` (what is durable), `saga` (steps with undos), `pve` (the host: `pct`, its files) and
//! `sys` (the kernel), and reaches into sandboxes through `shim`, the one process a sandbox that
//! outlives us; its other end inside is the crate `helper`. `run` starts every process. `load` and `detect` read the host, `dhcp` sees which addresses the DHCP server gives, `config` says
//! where each value comes from, `clock` is the time.
//!
//! # What must always hold
//! - Intent before effect, record before answer: nothing is touched that the journal does not know
//!   of, and an answer survives a power cut.
//! - Nothing is destroyed that does not carry our mark and stand in our journal with this very
//!   vmid. Absence proves nothing; without quorum nothing is changed.
//! - A change runs on a task of its own, one at a time on a sandbox: a caller that hangs up stops
//!   nothing.
//! - Undoing after a failure and after a crash is the same code.
//! - No process is started outside of `run`, no `unsafe` is outside of `sys`, no tonic outside of
//!   `rpc`, no `pct` outside of `pve`, no wall clock but `clock`.
//! - Every queue, stream and number of tasks has a bound; every wait has a deadline.
//! - HTTP requests, lists and reads start no process and ask no database.

pub mod agent;
pub mod clock;
pub mod config;
pub mod detect;
pub mod dhcp;
pub mod expire;
pub mod ingress;
pub mod journal;
pub mod load;
pub mod pve;
pub mod reconcile;
pub mod rpc;
pub mod run;
pub mod saga;
pub mod sandbox;
pub mod shim;
pub mod sys;
pub mod tasks;

pub use agent::{Agent, Parts};
