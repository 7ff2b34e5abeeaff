//! `pve-sandbox-controller`.

use std::process::ExitCode;

use clap::Parser;
use controller::commands::Command;

/// Process-wide allocator. With the C library's allocator, the many small allocations of a few
/// threads contend and creations per second drop by a fifth (docs/scale.md).
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
async fn main() -> anyhow::Result<ExitCode> {
    if let Err(error) = daemon::core_dumps::forbid() {
        eprintln!("pve-sandbox-controller: a crash may write secrets to the disk: {error}");
    }
    Arguments::parse().command.execute().await
}
