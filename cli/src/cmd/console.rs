//! `console`: what a sandbox itself has logged since its boot. The API has no call for it; it is a command
//! in the sandbox.

use std::time::Duration;

use clap::Args;
use proto::sandbox::v1::{Argv, exec_start};

use super::{
    exec::{self, How},
    targets::One,
};
use crate::{client::Controller, exit, failure::Failure, output::Output};

/// Arguments of `console`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl console ID           the last 1000 lines of its journal since its
                                  boot
  sandboxctl console -f -n 20 ID  the last 20, and what follows, until Ctrl-C
  sandboxctl console --json ID    an object on each line, as journalctl writes
                                  it

The image must have a journal (systemd). What your own commands say is in
`sandboxctl logs`.")]
pub(crate) struct Console {
    /// Go on and show what is logged from now on, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Number of lines, from the last one backwards
    #[arg(
        short = 'n',
        long,
        value_name = "NUMBER",
        default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(1..=100_000)
    )]
    lines: u32,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
}

/// Longest time for what is logged until now.
const LIMIT: Duration = Duration::from_secs(30);
/// Exit codes of a program that is not there, or cannot be run.
const NOT_RUN: [u8; 2] = [126, 127];

pub(super) async fn run(
    controller: Controller,
    console: Console,
    output: Output,
) -> Result<u8, Failure> {
    let Console { follow, lines, sandbox: One { id } } = console;
    let how = How { timeout: (!follow).then_some(LIMIT), ..How::default() };
    let start = exec::start(id, &how, Vec::new(), command(follow, lines, output.json))?;
    // What the sandbox writes is the output, whatever its form.
    let raw = Output { json: false, ..output };
    match exec::attached(controller, start, false, true, raw).await? {
        code @ (0 | exit::INTERRUPTED | exit::TERMINATED | exit::HUNG_UP) => Ok(code),
        code if NOT_RUN.contains(&code) => {
            Err(none("the sandbox keeps no journal: its image has no journalctl"))
        }
        code => Err(none(&format!(
            "the journal of the sandbox cannot be read: journalctl ended with {code}"
        ))),
    }
}

fn none(message: &str) -> Failure {
    Failure::local(message).hint(
        "`sandboxctl exec ID ls -l /var/log` shows other logs, and `sandboxctl events ID` why it stopped or started",
    )
}

fn command(follow: bool, lines: u32, json: bool) -> exec_start::Command {
    let mut args = vec!["journalctl".to_owned(), "--no-pager".into(), "--boot".into()];
    args.push(format!("--lines={lines}"));
    if follow {
        args.push("--follow".into());
    }
    if json {
        args.push("--output=json".into());
    }
    exec_start::Command::Argv(Argv { args })
}
