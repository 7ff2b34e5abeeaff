//! Arguments that clean up.

use std::{path::PathBuf, time::Duration};

use clap::Args as Group;

use super::values::age;

/// `gc`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl gc --dry-run                       what the nodes would do, and why
  sandboxctl gc --node pve2                     let one do it now, and not at its next round

Nodes clean up by themselves every ten seconds. What carries our mark and stands in no journal is only
told of; `recover` takes it back.")]
pub struct Gc {
    /// Only tell
    #[arg(long)]
    pub dry_run: bool,
    /// One node [default: all]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
}

/// `prune`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl prune --older-than 14d --dry-run   which have been stopped for two weeks
  sandboxctl prune --older-than 14d             delete them, for good")]
pub struct Prune {
    /// Stopped for so long at least, such as 12h or 14d; one hour is the least
    #[arg(long, value_name = "TIME", value_parser = age)]
    pub older_than: Duration,
    /// Those that have been paused for so long, too
    #[arg(long)]
    pub paused: bool,
    /// Only tell
    #[arg(long)]
    pub dry_run: bool,
}

/// `compare`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl compare known.txt                  one id a line, as a backend's database has them
  psql -Atc 'select id from sandboxes' | sandboxctl compare -")]
pub struct Compare {
    /// File with an id on each line; `-` is stdin
    pub file: PathBuf,
}

/// `recover`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl gc --dry-run                       shows them as `quarantined`
  sandboxctl recover --node pve2 100017 --dry-run
  sandboxctl recover --node pve2 100017         it is a sandbox again, its ports closed
  sandboxctl rm 100017                          or, after that, delete it")]
pub struct Recover {
    /// Number of the container
    pub vmid: u32,
    /// Node that it is on
    #[arg(long, value_name = "NODE")]
    pub node: String,
    /// Only tell what it would become
    #[arg(long)]
    pub dry_run: bool,
}
