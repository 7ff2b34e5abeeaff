//! `sandboxctl`: the controller's public API for people and for scripts.
//!
//! Code map: `args` is the top of the command line; `cmd` has one file a verb, its arguments included;
//! `values`, `sizes` and `listing` are arguments of several verbs; `complete` finds what can come next in a command line; `settings` finds the controller, in `config_file` among others; `client` calls it, through `trace`; `ask` puts questions;
//! `resolve` finds the sandbox that a short name means, `state` remembers the current and the last one;
//! `session` keeps a command's stream when the connection breaks, `sink` is where its output goes, `log_lines` makes JSON of it; `failure` and `hint` turn an error into a sentence, a next step and an exit code; `output`
//! prints tables and JSON. Uses sandbox.v1 only, nothing of agents.

pub mod args;
pub mod ask;
pub mod client;
mod cmd;
mod complete;
pub mod config_file;
pub mod exit;
pub mod failure;
pub mod hint;
mod listing;
mod log_lines;
pub mod output;
pub mod printable;
pub mod progress;
pub mod resolve;
pub mod session;
pub mod settings;
pub mod signals;
pub mod sink;
mod sizes;
pub mod state;
mod suggest;
pub mod terminal;
pub mod trace;
mod values;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, error::ErrorKind};

use crate::{args::Args, failure::Failure, output::Output};

/// Reads the command line, runs the verb and reports the result.
pub fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(error) => return not_run(error),
    };
    let Args { connection, json, output, verb } = args;
    let output = Output::new(json, output);
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::local(format!("cannot start: {error}")))
        .and_then(|runtime| {
            let ended = runtime.block_on(cmd::run(verb, &connection, output, Args::command));
            // A pending read of the terminal must not delay the exit.
            runtime.shutdown_background();
            ended
        });
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print(output.json);
            ExitCode::from(failure.exit)
        }
    }
}

/// Reads the command line and the environment.
fn parse() -> Result<Args, clap::Error> {
    let matches = Args::command().try_get_matches()?;
    let mut args =
        Args::from_arg_matches(&matches).map_err(|error| error.format(&mut Args::command()))?;
    args.connection.order_sources(&matches);
    Ok(args)
}

/// Prints clap's own results: help, the version, and usage errors. A closed pipe is ignored.
fn not_run(error: clap::Error) -> ExitCode {
    // Without a verb the help is what was asked for.
    if std::env::args_os().len() == 1 {
        args::for_help().print_help().ok();
        return ExitCode::SUCCESS;
    }
    let help = [ErrorKind::DisplayHelp, ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand];
    let grouped = || args::for_help().try_get_matches().err();
    let shown = help.contains(&error.kind()).then(grouped).flatten();
    let error = suggest::careful(shown.unwrap_or(error));
    error.print().ok();
    let of_a_command =
        |arg: &OsString| ["exec", "run", "shell", "logs", "attach"].iter().any(|verb| arg == verb);
    ExitCode::from(match error.use_stderr() {
        false => 0,
        // 2 could be the exit code of the command itself.
        true if std::env::args_os().any(|arg| of_a_command(&arg)) => exit::EXEC,
        true => exit::USAGE,
    })
}
