//! What is typed to take containers over, to let them go, and to give up a node.

use clap::{Args as Group, Subcommand};

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

/// `node`.
#[derive(Debug, Subcommand)]
pub enum Node {
    /// Give up a node that will not come back, and the sandboxes that were on it
    #[command(after_help = "\
Examples:
  sandboxctl node forget pve3 --dry-run         which sandboxes go with it
  sandboxctl node forget pve3 --lost            they are DELETED, with the cause node_lost

A node that answers is not forgotten. Should it come back after all, it and its sandboxes are found
again. Take it out of the cluster with `pvecm delnode` first, and out of the controller's
configuration if it stands there.")]
    Forget {
        /// PVE's name of it
        node: String,
        /// Its sandboxes are lost
        #[arg(long)]
        lost: bool,
        /// Only tell
        #[arg(long)]
        dry_run: bool,
    },
}
