//! Arguments that name sandboxes, and that pause and resume them.

use clap::Args as Group;

/// One sandbox.
#[derive(Debug, Group)]
pub struct One {
    /// `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    pub id: String,
}

/// One sandbox or several.
#[derive(Debug, Group)]
pub struct Many {
    /// Each `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// Do not wait for the end of what takes longer than a call
    #[arg(long)]
    pub no_wait: bool,
}

/// `pause`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl pause ID                           frozen where it stands; `resume` goes on from there
  sandboxctl pause --or-stop ID                 stop it where something in it does not freeze
  sandboxctl ls -q | xargs sandboxctl pause     all of them

A paused sandbox keeps its memory, not its CPU. A request for an open port, or an exec, wakes it; see
`wake-on`. A reboot of its node loses what was in its memory.")]
pub struct Pause {
    /// Each `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// Stop it where it cannot be frozen, instead of leaving it running
    #[arg(long)]
    pub or_stop: bool,
}

/// `resume`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl resume ID                          in about a millisecond; nothing in it notices")]
pub struct Resume {
    /// Each `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
}
