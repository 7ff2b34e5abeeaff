//! `completion`: prints completion scripts for shells.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{args::Args, failure::Failure, output::Output};

pub(super) fn run(shell: Shell, output: Output) -> Result<u8, Failure> {
    // Written to memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "sandboxctl", &mut script);
    output.line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(0)
}
