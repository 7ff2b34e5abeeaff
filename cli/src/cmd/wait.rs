//! `wait`: waits until a sandbox is in a phase, or until something listens on one of its ports.

use std::{str::FromStr, time::Duration};

use clap::Args;
use proto::{
    Reason,
    sandbox::v1::{Argv, ExecCommandRequest, ExecStart, Phase, Sandbox, exec_start},
};
use tokio::time::{Instant, sleep};

use super::targets::One;
use crate::{
    client::{Controller, answer},
    exit,
    failure::Failure,
    output::{Output, json},
    progress::Spinner,
    values::duration,
};

/// Arguments of `wait`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  id=$(sandboxctl create --no-wait) && sandboxctl wait $id --for running
  sandboxctl wait ID --for port=8000 --timeout 1m
  sandboxctl wait ID --for stopped  until somebody stops it, or its time is over

A port counts when something listens on it on an address that others reach.
Looking for it wakes a paused sandbox. Exit code 4: it did not come in time; 1:
it cannot come any more.")]
pub(crate) struct Wait {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Goal of the wait: running, paused, stopped, deleted, or port=N
    #[arg(long = "for", value_name = "WHAT")]
    goal: Goal,
    /// How long to wait at most [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

/// Goal of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Goal {
    /// A phase.
    Phase(Phase),
    /// Something that listens on a port.
    Port(u16),
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self::Phase(match text {
            "running" => Phase::Running,
            "paused" => Phase::Paused,
            "stopped" => Phase::Stopped,
            "deleted" => Phase::Deleted,
            _ => {
                let port = text.strip_prefix("port=").and_then(|port| port.parse().ok());
                return match port {
                    Some(port) if port > 0 => Ok(Self::Port(port)),
                    _ => {
                        Err("must be running, paused, stopped, deleted, or port=1 to 65535".into())
                    }
                };
            }
        }))
    }
}

/// Time between two looks at a port.
const LOOK: Duration = Duration::from_millis(500);
/// Longest time that a look takes inside of the sandbox.
const LOOK_MAX: Duration = Duration::from_secs(5);

pub(super) async fn run(controller: Controller, wait: Wait, output: Output) -> Result<u8, Failure> {
    let Wait { sandbox: One { id }, goal, timeout } = wait;
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let spinner = Spinner::new(output.json, format!("waiting for {id}"));
    let until = |goal| {
        let controller = &controller;
        let id = &id;
        async move { controller.follow(id, deadline, |sandbox| reached(sandbox, goal)).await }
    };
    let sandbox = match goal {
        Goal::Phase(phase) => match until(Goal::Phase(phase)).await {
            // It is gone so long that nobody knows more of it.
            Err(failure)
                if phase == Phase::Deleted && failure.known() == Some(Reason::SandboxDeleted) =>
            {
                return Ok(0);
            }
            ended => ended?,
        },
        Goal::Port(port) => {
            let sandbox = until(goal).await?;
            listening(&controller, &sandbox, port, deadline, output).await?;
            sandbox
        }
    };
    drop(spinner);
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    }
    Ok(0)
}

/// Whether the phase is reached; an error when it never will be. A port needs one that runs.
fn reached(sandbox: &Sandbox, goal: Goal) -> Result<bool, Failure> {
    let phase = sandbox.phase();
    let there = match goal {
        Goal::Phase(Phase::Deleted) => matches!(phase, Phase::Deleted | Phase::Failed),
        Goal::Phase(goal) => phase == goal,
        Goal::Port(_) => matches!(phase, Phase::Running | Phase::Paused),
    };
    match phase {
        _ if there => Ok(true),
        Phase::Failed => {
            let recorded = sandbox.failure.as_ref().map(Failure::recorded);
            Err(recorded.unwrap_or_else(|| Failure::local("the creation failed")))
        }
        Phase::Deleted => {
            Err(Failure::local(format!("{} was deleted", sandbox.id)).exit(exit::NOT_FOUND))
        }
        Phase::Unspecified
        | Phase::Creating
        | Phase::Running
        | Phase::Paused
        | Phase::Starting
        | Phase::Stopping
        | Phase::Stopped
        | Phase::Deleting
        | Phase::Unreachable => Ok(false),
    }
}

/// Listener on a port, by who reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listener {
    None,
    /// Only the sandbox itself reaches it.
    Loopback,
    Open,
}

/// Waits until something listens on the port.
async fn listening(
    controller: &Controller,
    sandbox: &Sandbox,
    port: u16,
    deadline: Option<Instant>,
    output: Output,
) -> Result<(), Failure> {
    let since = Instant::now();
    let mut told = false;
    loop {
        let found = match look(controller, &sandbox.id).await {
            Ok(table) => listener(&table, port),
            Err(failure) if failure.transient => Listener::None,
            Err(failure) => return Err(failure),
        };
        match found {
            Listener::Open => return Ok(()),
            Listener::Loopback if !std::mem::replace(&mut told, true) => output.note(format!(
                "something listens on 127.0.0.1:{port} only; it must listen on 0.0.0.0 to be reached"
            )),
            Listener::Loopback | Listener::None => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() + LOOK >= deadline) {
            let what = format!("nothing listens on port {port} of {}", sandbox.id);
            let failure = Failure::deadline(&what, since.elapsed());
            return Err(failure.hint("`sandboxctl ps ID` and `logs` show what its commands do"));
        }
        sleep(LOOK).await;
    }
}

/// Reads the kernel's table of TCP sockets in the sandbox.
async fn look(controller: &Controller, id: &str) -> Result<String, Failure> {
    let args = ["cat", "/proc/net/tcp", "/proc/net/tcp6"].map(str::to_owned).into();
    let start = ExecStart {
        id: id.to_owned(),
        command: Some(exec_start::Command::Argv(Argv { args })),
        timeout: prost_types::Duration::try_from(LOOK_MAX).ok(),
        ..ExecStart::default()
    };
    let request = ExecCommandRequest { start: Some(start), ..ExecCommandRequest::default() };
    let told = answer(controller.sandboxes.clone().exec_command(request)).await?;
    Ok(String::from_utf8_lossy(&told.stdout).into_owned())
}

/// Finds the port in the kernel's table: local addresses in hexadecimal, state 0A listens.
fn listener(table: &str, port: u16) -> Listener {
    let mut found = Listener::None;
    for line in table.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, local, _, "0A", ..] = fields.as_slice() else { continue };
        let Some((address, number)) = local.split_once(':') else { continue };
        if u16::from_str_radix(number, 16) != Ok(port) {
            continue;
        }
        let loopback = match address.len() {
            8 => address.ends_with("7F"),
            _ => {
                address == "00000000000000000000000001000000"
                    || address.starts_with("0000000000000000FFFF0000") && address.ends_with("7F")
            }
        };
        if !loopback {
            return Listener::Open;
        }
        found = Listener::Loopback;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listener_is_found_with_the_addresses_that_reach_it() {
        let line = |local: &str, state: &str| {
            format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 0 0 1\n")
        };
        let loopback = line("0100007F:1F40", "0A");
        let table = format!("  sl  local_address rem_address st\n{loopback}");
        assert_eq!(listener(&table, 8000), Listener::Loopback);
        assert_eq!(listener(&table, 8001), Listener::None);
        let open = format!("{table}{}", line("00000000000000000000000000000000:1F40", "0A"));
        assert_eq!(listener(&open, 8000), Listener::Open);
        let v6 = line("00000000000000000000000001000000:1F40", "0A");
        assert_eq!(listener(&v6, 8000), Listener::Loopback);
        assert_eq!(listener(&line("00000000:1F40", "01"), 8000), Listener::None, "a connection");
    }

    #[test]
    fn goals_are_phases_and_ports() {
        assert_eq!("port=8000".parse(), Ok(Goal::Port(8000)));
        assert_eq!("stopped".parse(), Ok(Goal::Phase(Phase::Stopped)));
        for wrong in ["", "up", "port=0", "port=70000", "creating"] {
            assert!(wrong.parse::<Goal>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn waiting_ends_where_the_goal_cannot_come() {
        let check = |phase: Phase, goal: &str| {
            let sandbox = Sandbox { phase: phase.into(), ..Sandbox::default() };
            reached(&sandbox, goal.parse().expect(goal)).ok()
        };
        assert_eq!(check(Phase::Creating, "running"), Some(false));
        assert_eq!(check(Phase::Stopped, "running"), Some(false), "somebody may start it");
        assert_eq!(check(Phase::Failed, "running"), None);
        assert_eq!(check(Phase::Deleted, "stopped"), None);
        assert_eq!(check(Phase::Failed, "deleted"), Some(true));
        assert_eq!(check(Phase::Paused, "port=80"), Some(true));
    }
}
