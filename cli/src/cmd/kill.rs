//! `kill`: signals commands and all their descendants.

use std::str::FromStr;

use clap::Args;
use proto::sandbox::v1::{ExecInfo, SignalExecRequest};
use serde_json::json;

use super::{exec_id, targets::One};
use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

/// Arguments of `kill`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl kill ID EXEC_ID          asks it to end
  sandboxctl kill -s KILL ID EXEC_ID  ends it
  sandboxctl kill ID make             the only run of make that is under way, as
                                      `ps` shows it
  sandboxctl kill --all ID make       all of them")]
pub(crate) struct Kill {
    /// Signal by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM")]
    signal: SignalNumber,
    /// Signal every command that matches
    #[arg(short, long)]
    all: bool,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Exec id of the run, or its beginning; or the name of a program that runs
    #[arg(value_name = "EXEC_ID|NAME")]
    exec_id: String,
}

/// `TERM`, `SIGTERM` or `15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SignalNumber(u32);

impl FromStr for SignalNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            let ok = (1..=31).contains(&number);
            return ok.then_some(Self(number)).ok_or_else(|| "must be 1 to 31".into());
        }
        let name = text.to_ascii_uppercase();
        let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
        let signal: nix::sys::signal::Signal =
            name.parse().map_err(|_| "must be a signal, such as TERM, KILL, HUP or 9")?;
        Ok(Self((signal as i32).unsigned_abs()))
    }
}

pub(super) async fn run(controller: Controller, kill: Kill, output: Output) -> Result<u8, Failure> {
    let Kill { signal: SignalNumber(signal), all, sandbox: One { id }, exec_id } = kill;
    let execs = match is_whole(&exec_id) {
        true => vec![exec_id],
        false => meant(&exec_id::list(&controller, &id).await?, &exec_id, all)?,
    };
    for exec_id in execs {
        let request = SignalExecRequest { id: id.clone(), exec_id: exec_id.clone(), signal };
        answer(controller.sandboxes.clone().signal_exec(request)).await?;
        if output.json {
            output.value(&json!({ "id": id, "exec_id": exec_id, "signal": signal }))?;
        }
    }
    Ok(0)
}

/// Whether it is a random exec id, which needs no list.
fn is_whole(typed: &str) -> bool {
    typed.parse::<uuid::Uuid>().is_ok()
}

/// Exec ids of the commands that are meant: the one with this exec id; else those whose exec id begins like
/// this, and those that run a program of this name.
fn meant(execs: &[ExecInfo], typed: &str, all: bool) -> Result<Vec<String>, Failure> {
    if execs.iter().any(|exec| exec.exec_id == typed) {
        return Ok(vec![typed.to_owned()]);
    }
    let is_meant = |exec: &&ExecInfo| {
        let runs = exec.exit.is_none() && exec.lost.is_empty();
        exec.exec_id.starts_with(typed) || runs && program(&exec.command) == typed
    };
    let found: Vec<_> = execs.iter().filter(is_meant).collect();
    match found.as_slice() {
        [] => Err(exec_id::none(typed)),
        _ if typed.is_empty() => Err(exec_id::none(typed)),
        [_, _, ..] if !all => {
            let listed: Vec<_> =
                found.iter().map(|exec| format!("{} ({})", exec.exec_id, exec.command)).collect();
            Err(Failure::usage(
                format!("{} commands are named by {typed}: {}", found.len(), listed.join(", ")),
                "give one of these exec ids, or --all for all of them",
            ))
        }
        found => Ok(found.iter().map(|exec| exec.exec_id.clone()).collect()),
    }
}

/// Name of the program in a command line, without its directory.
fn program(command: &str) -> &str {
    let first = command.split_whitespace().next().unwrap_or_default();
    first.rsplit('/').next().unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_is_named_by_its_exec_id_or_its_program() {
        let exec = |exec_id: &str, command: &str| ExecInfo {
            exec_id: exec_id.into(),
            command: command.into(),
            ..ExecInfo::default()
        };
        let ended = ExecInfo { exit: Some(Default::default()), ..exec("e-1", "sleep 1") };
        let execs = [
            exec("b-1", "/usr/bin/make -j4"),
            exec("b-2", "make test"),
            exec("make-9", "sleep 60"),
            exec("sleepy", "tail -f x"),
            ended,
        ];
        let found = |typed: &str, all| meant(&execs, typed, all).map_err(|error| error.to_string());
        assert_eq!(found("b-1", false).expect("one"), ["b-1"]);
        assert_eq!(found("tail", false).expect("one"), ["sleepy"]);
        assert_eq!(found("make", true).expect("all"), ["b-1", "b-2", "make-9"]);
        let several = found("make", false).expect_err("which one");
        assert!(
            several.contains("3 commands are named by make: b-1 (/usr/bin/make -j4), "),
            "{several}"
        );
        assert!(several.contains("--all"), "{several}");
        assert_eq!(found("sleep", true).expect("both"), ["make-9", "sleepy"], "what ended is left");
        assert!(found("none", true).expect_err("none").contains("EXEC_NOT_FOUND"));
        assert!(found("", true).is_err());
    }

    #[test]
    fn signals_are_parsed_by_name_and_number() {
        for (text, number) in [("TERM", 15), ("sigkill", 9), ("1", 1)] {
            assert_eq!(text.parse(), Ok(SignalNumber(number)));
        }
        for wrong in ["0", "32", "X", ""] {
            assert!(wrong.parse::<SignalNumber>().is_err(), "{wrong}");
        }
    }
}
