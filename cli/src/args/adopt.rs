//! Arguments that adopt and release containers.

use clap::Args as Group;

/// `adopt`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl adopt 207 --team acme              what it would become; nothing is done
  sandboxctl adopt 207 --team acme --yes        it is a sandbox of the team
  sandboxctl release 207                        and somebody's container again

The container runs on as it is. A line is added to its description, its ports are closed to the web
until they are opened with `expose`, and `rm` deletes it, volumes and all.")]
pub struct Adopt {
    /// Number of the container
    pub vmid: u32,
    /// Team that it will belong to
    #[arg(long, value_name = "TEAM")]
    pub team: String,
    /// Node that it is on [default: the one that has it]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Do it; without this it is only told
    #[arg(long)]
    pub yes: bool,
}

/// `release`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl release ID                         the sandbox ends, the container is left as it is

For a sandbox that was adopted; and for one that cannot be deleted, because its container lost its
mark, became a template, or is on another node. Nothing else leads back: the sandbox is DELETED.")]
pub struct Release {
    /// `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    pub id: String,
}
