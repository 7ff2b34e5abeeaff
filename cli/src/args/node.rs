//! Arguments for operations on a whole node.

use clap::{Args as Group, Subcommand};

/// `cordon`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl cordon pve2 --why 'new disks'      no new sandboxes there; those that are there live on
  sandboxctl uncordon pve2                      new ones again

The node itself keeps it, over restarts of everything.")]
pub struct Cordon {
    /// PVE's name of the node
    pub node: String,
    /// For whoever wonders
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub why: String,
}

/// `uncordon`.
#[derive(Debug, Group)]
pub struct Uncordon {
    /// PVE's name of the node
    pub node: String,
}

/// `drain`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl drain pve2                         no new ones, and what is there still; exit 1 if any
  sandboxctl drain pve2 --wait --timeout 8h     until nothing is there
  sandboxctl uncordon pve2                      call it off

Sandboxes end by their lifetimes, or are deleted by their owners. What is stopped is moved to nodes that
see its disk (shared storage); what runs or is paused is not: containers cannot be moved alive.")]
pub struct Drain {
    /// PVE's name of the node
    pub node: String,
    /// For whoever wonders
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub why: String,
    /// Wait until nothing is there
    #[arg(long)]
    pub wait: bool,
    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = super::values::duration)]
    pub timeout: std::time::Duration,
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
