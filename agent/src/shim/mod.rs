//! The shim of a sandbox: a process of the host, in a session of its own, that outlives the agent
//! which started it. It holds the socket to one helper inside, and of every command its output, its
//! end and its clock. An agent that restarts finds it by its socket and goes on where it was.
//!
//! ```text
//!  agent --(unix socket, shim.v1)--> shim --(seqpacket)--> helper (inside) --fork--> command
//!                                     \____________________ pipes _____________________/
//! ```
//!
//! One way in: the helper is started once, by `lxc-attach` (or `pct exec`), from a sealed memory
//! file, so it has the container's cgroup, seccomp, AppArmor and capabilities. It is trusted no more
//! than anything else in there: what it says is bounded and checked, no descriptor is taken from
//! it, and one that was killed is started anew. All that a shim reads or writes are pipes of its
//! own making: a terminal is touched by a process inside only, its relay, since whoever is root in
//! there can make every touch of a terminal wait.
//!
//! Code map: `server` talks to agents, `session` is the state of one command, `life` looks after it,
//! `output` reads what it and its background write, `ring` keeps the last of that, `keep` decides how
//! long ended commands are kept, `ids` records every name that was run, `helper` talks to the process
//! in the sandbox, `pulse` decides whether that is stuck, `tree` finds the processes of a command,
//! `client` is the agent's side, `frames` the format of both.

pub mod client;
mod frames;
mod helper;
mod host;
mod ids;
mod keep;
mod life;
mod output;
pub mod process;
mod pulse;
mod ring;
mod server;
mod session;
mod tree;

use std::{os::fd::OwnedFd, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

pub use host::Container;
pub use server::serve;

use crate::pve::{pct::Places, shim_cgroup};

/// The subcommand of the agent's program that is a shim.
pub const COMMAND: &str = "shim";

/// What a shim is told on its command line. Nothing in it is secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The container.
    pub vmid: u32,
    /// Where agents find it.
    pub socket: PathBuf,
    /// Where output is kept that does not fit into memory.
    pub dir: PathBuf,
    /// How much of that, bytes; the outputs of all its commands together.
    #[serde(default = "output_bytes_max")]
    pub output_bytes_max: u64,
    /// Names of all runs of this sandbox, over all its boots.
    pub ids: PathBuf,
    /// How to get in: a program and its leading arguments.
    pub enter: Vec<String>,
    /// Where things are on the host.
    pub places: Places,
    /// What the shim may use; unset, by an agent that was before this field: it stays in the agent's
    /// cgroup.
    #[serde(default)]
    pub limits: Option<shim_cgroup::Limits>,
}

/// What the outputs of a sandbox's commands may take on the disk unless the configuration says, bytes.
pub const OUTPUT_BYTES_MAX: u64 = 64 * 1024 * 1024;

fn output_bytes_max() -> u64 {
    OUTPUT_BYTES_MAX
}

/// Size of a terminal's window, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// The sandbox, as its shim sees it from the host.
pub trait Host: Send + Sync + std::fmt::Debug {
    /// Pids of all that runs in it.
    fn processes(&self) -> Vec<u32>;

    /// Nothing in it gets to run.
    fn frozen(&self) -> bool;

    /// It still runs, and it is the boot that the shim was started for.
    fn runs(&self) -> bool;

    /// A program and its leading arguments that run a command inside.
    fn enter(&self) -> Vec<std::ffi::OsString>;

    /// This process has got in: from now on it is the sandbox's, whoever started it.
    fn entered(&self, _pid: u32) {}
}

/// Everything that a shim needs.
#[derive(Debug)]
pub struct Parts {
    /// The sandbox.
    pub host: Arc<dyn Host>,
    /// The helper's image, sealed.
    pub image: OwnedFd,
    /// As in `Options`.
    pub dir: PathBuf,
    /// As in `Options`.
    pub ids: PathBuf,
    /// As in `Options`.
    pub socket: PathBuf,
    /// As in `Options`.
    pub output_bytes_max: u64,
}
