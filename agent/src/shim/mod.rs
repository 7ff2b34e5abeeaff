//! Shim of a sandbox: a process on the host, in its own session, that outlives the agent that
//! started it. It holds the socket to one helper inside the sandbox, and the output, exit and clock
//! of each command. An agent that restarts finds the shim by its socket and continues where it was.
//!
//! ```text
//!  agent --(unix socket, shim.v1)--> shim --(seqpacket)--> helper (inside) --fork--> command
//!                                     \____________________ pipes _____________________/
//! ```
//!
//! The only way in: `lxc-attach` (or `pct exec`) starts the helper once, from a sealed memory file,
//! so it has the container's cgroup, seccomp, AppArmor and capabilities. It is trusted no more than
//! anything else in the sandbox: its messages are bounded and checked, no descriptor is accepted
//! from it, and a killed helper is started again. The shim reads and writes only pipes that it made
//! itself: a terminal is touched only by a process inside, its relay, since root in the sandbox can
//! make any call on a terminal block.
//!
//! Code map: `server` talks to agents and carries forwards, `session` is the state of one command, `life` runs its
//! lifecycle, `output` reads what the command and its background processes write, `ring` keeps the
//! last bytes of that, `keep` decides how long ended commands are kept, `ids` records every exec_id
//! that was run, `helper` talks to the process in the sandbox, `pulse` decides whether that is
//! stuck, `tree` finds the processes of a command, `client` is the agent's side, `frames` the
//! format of both.

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

use crate::pve::{HostPaths, shim_cgroup, shim_io::ShimIo};

/// Subcommand of the agent's program that runs a shim.
pub const COMMAND: &str = "shim";

/// Options of a shim, passed on its command line; nothing in them is secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Number of the container.
    pub vmid: u32,
    /// Socket where agents find the shim.
    pub socket: PathBuf,
    /// Directory for output that does not fit into memory.
    pub dir: PathBuf,
    /// Most bytes of output in that directory, for all commands of the shim together.
    #[serde(default = "output_bytes_max")]
    pub output_bytes_max: u64,
    /// File with the exec_ids of all commands of this sandbox, over all its boots.
    pub ids: PathBuf,
    /// Program and leading arguments that enter the container.
    pub enter: Vec<String>,
    /// Host paths of PVE.
    pub places: HostPaths,
    /// Resource limits of the shim. Unset by an agent older than this field: the shim then stays in
    /// the agent's cgroup.
    #[serde(default)]
    pub limits: Option<shim_cgroup::Limits>,
    /// Limit of its use of disks. An agent older than this field sets none.
    #[serde(default)]
    pub io: ShimIo,
}

/// Most pieces of a forward that are under way in each direction.
pub const FORWARD_WINDOW: usize = 4;
/// Largest piece of a forward, in bytes.
pub const FORWARD_PIECE: usize = 64 * 1024;

/// Default of `Options::output_bytes_max`, in bytes.
pub const OUTPUT_BYTES_MAX: u64 = 64 * 1024 * 1024;

fn output_bytes_max() -> u64 {
    OUTPUT_BYTES_MAX
}

/// Size of a terminal's window, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// Host's view of the sandbox, for its shim.
pub trait Host: Send + Sync + std::fmt::Debug {
    /// Lists the pids of all processes in the sandbox.
    fn processes(&self) -> Vec<u32>;

    /// Returns true while the sandbox is frozen.
    fn frozen(&self) -> bool;

    /// Returns true while the boot that the shim was started for still runs.
    fn runs(&self) -> bool;

    /// Returns a program and its leading arguments that run a command inside.
    fn enter(&self) -> Vec<std::ffi::OsString>;

    /// Reports a process that has entered the sandbox: from now on it belongs to the sandbox,
    /// whoever started it.
    fn entered(&self, _pid: u32) {}
}

/// Inputs of [`serve`].
#[derive(Debug)]
pub struct Parts {
    /// Sandbox, as the host sees it.
    pub host: Arc<dyn Host>,
    /// Sealed executable image of the helper.
    pub image: OwnedFd,
    /// Directory for output that does not fit into memory.
    pub dir: PathBuf,
    /// File with the exec_ids of all commands of the sandbox.
    pub ids: PathBuf,
    /// Socket where agents find the shim.
    pub socket: PathBuf,
    /// Most bytes of output in the directory.
    pub output_bytes_max: u64,
}
