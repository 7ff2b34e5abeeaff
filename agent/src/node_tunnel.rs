//! Runs the commands of the tunnel.

use std::process::ExitCode;

use agent::tunnel::{
    NO_CLOUDFLARED,
    args::TunnelCommand,
    command::{self, Host},
};
use anyhow::Result;

/// Runs a command and prints what it says; returns the exit code.
pub(crate) fn execute(command: &TunnelCommand) -> Result<ExitCode> {
    daemon::logs::init("warn", false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (host, mut say) = (Host::default(), |line: &str| println!("{line}"));
    match runtime.block_on(command::execute(command, &host, &mut say)) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) if command::is_without_cloudflared(&error) => {
            eprintln!("pve-sandbox-agent: {error}");
            Ok(ExitCode::from(NO_CLOUDFLARED))
        }
        Err(error) => Err(error),
    }
}
