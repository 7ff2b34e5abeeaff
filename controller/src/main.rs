//! `pve-sandbox-controller`.

use clap::Parser;
use controller::commands::Command;

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
