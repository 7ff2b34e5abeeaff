//! `pve-sandbox-controller`.

use std::process::ExitCode;

use clap::Parser as _;
use controller::commands::Cli;

/// Process-wide allocator. With the C library's allocator, the many small allocations of a few
/// threads contend and creations per second drop by a fifth (docs/scale.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    if let Err(error) = daemon::core_dumps::forbid() {
        eprintln!("pve-sandbox-controller: a crash may write secrets to the disk: {error}");
    }
    Cli::parse().command.execute().await
}
