//! Agent of one PVE node: the source of truth about the sandboxes on it.
//!
//! # Code map
//! `agent` assembles the parts. At the edge are `rpc` (`agent.v1` for the controller), `ingress`
//! (route questions of Caddy) and `reconcile` (makes the host match the journal); they depend on
//! `sandbox`, the domain with one file per operation, and not on each other. `sandbox` depends on
//! `journal` (durable state), `saga` (steps with undos), `pve` (the host: `pct`, its files) and
//! `sys` (the kernel). It reaches into sandboxes through `shim`, one process per sandbox that
//! outlives the agent; the process inside is the crate `helper`. `firewall` isolates them from each
//! other and from the host's networks. `resolver` answers the DNS questions of those with an
//! allow-list. `name_directory` knows the named sandboxes of all nodes. `tunnel` sets up cloudflared and
//! keeps its configuration. `hand_edits` records changes by hand of what the agent keeps. `run` starts every
//! process. `load` and `detect` read the host, `config` records where each value comes from, `clock` is the time.
//!
//! # What must always hold
//! - Intent before effect, record before answer: nothing is touched that the journal does not know,
//!   and an answer survives a power cut.
//! - Nothing is destroyed that does not have our mark and a record in our journal with this very
//!   vmid. Absence proves nothing; without quorum nothing is changed.
//! - A change runs on a task of its own, one at a time for each sandbox: a caller that hangs up
//!   stops nothing.
//! - Undoing after a failure and after a crash is the same code.
//! - No process is started outside of `run`, no `unsafe` is outside of `sys`, no tonic outside of
//!   `rpc`, no `pct` outside of `pve`, no wall clock but `clock`.
//! - Every queue, stream and number of tasks has a bound; every wait has a deadline.
//! - HTTP requests, lists and reads start no process and query no database.

pub mod agent;
pub mod bridge;
pub mod caddy_settings;
pub mod certificates;
pub mod clock;
pub mod commands;
pub mod config;
pub mod detect;
pub mod dhcp;
pub mod doctor;
pub mod firewall;
pub mod hand_edits;
pub mod ingress;
pub mod join;
pub mod journal;
pub mod load;
pub mod name_directory;
pub mod pve;
pub mod reconcile;
pub mod resolver;
pub mod revoked;
pub mod rpc;
pub mod run;
pub mod saga;
pub mod sandbox;
pub mod shim;
pub mod sys;
pub mod tasks;
pub mod template;
pub mod tunnel;
pub mod uninstall;

pub use agent::{Agent, Parts};
