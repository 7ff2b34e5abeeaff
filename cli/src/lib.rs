//! `sandboxctl`: the controller's public API for people and for scripts.
//!
//! Code map: `args` defines the command line; `settings` finds the controller; `client` calls it;
//! `session` keeps a command's stream when the connection breaks; `cmd` has one file a verb;
//! `failure` and `hint` turn an error into a sentence, a next step and an exit code; `output`
//! prints tables and JSON. Uses sandbox.v1 only, nothing of agents.

pub mod args;
pub mod client;
pub mod cmd;
pub mod exit;
pub mod failure;
pub mod hint;
pub mod output;
pub mod printable;
pub mod progress;
pub mod session;
pub mod settings;
pub mod terminal;

use std::process::ExitCode;

use clap::Parser;

use crate::{args::Args, failure::Failure};

/// Reads the command line, runs the verb and reports the result.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        // clap's own results: usage errors, --help and --version. A closed pipe is ignored.
        Err(error) => {
            error.print().ok();
            let exec = || std::env::args_os().any(|arg| arg == "exec" || arg == "logs");
            let code = match error.use_stderr() {
                false => 0,
                // 2 could be the exit code of the command itself.
                true if exec() => exit::EXEC,
                true => exit::USAGE,
            };
            return ExitCode::from(code);
        }
    };
    let json = args.global.json;
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::local(format!("cannot start: {error}")))
        .and_then(|runtime| {
            let ended = runtime.block_on(cmd::run(args));
            // A pending read of the terminal must not delay the exit.
            runtime.shutdown_background();
            ended
        });
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print(json);
            ExitCode::from(failure.exit)
        }
    }
}
