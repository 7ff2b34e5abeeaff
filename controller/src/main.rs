//! `pve-sandbox-controller`.

use clap::Parser;
use controller::commands::Command;

/// Many small messages on a few threads: with the C library's they wait for each other at it, and a
/// fifth of the creations a second is lost (docs/scale.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes what callers ask for and spreads it over the nodes of a cluster.
#[derive(Debug, Parser)]
#[command(name = "pve-sandbox-controller", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    Arguments::parse().command.execute().await
}
