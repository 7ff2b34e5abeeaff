//! `exec`: runs a command, forwards its bytes both ways and ends with its exit code.

mod control;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Read},
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use proto::{
    Reason,
    sandbox::v1::{Argv, ExecExit, ExecStart, WriteExecStdinRequest, exec_request, exec_start},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

pub(super) use self::control::Control;
use self::control::Signals;
use super::targets::One;
use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
    session::{Ended, Session},
    sink::Sink,
    terminal,
    values::{Pair, duration, variable},
};

/// Arguments of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl exec ID ls -l /   flags after the program are its own
  sandboxctl exec -it ID bash  see also `shell`
  sandboxctl exec -e RUST_LOG=debug -u 1000 -w /srv --timeout 30s ID make
  sandboxctl exec ID --shell 'cd /srv && git status | head'
  sandboxctl exec -i ID tar x -C /srv < files.tar
  sandboxctl exec --exec-id build-7 ID make
                               again: still one run, from its first output
  sandboxctl exec --detach ID make
                               prints the exec id, for `ps`, `logs` and `kill`

When the connection breaks, exec reconnects for up to 60 s; no output is
repeated. The third Ctrl-C kills the command. If this program is killed, the
command runs on: see `ps` and `kill`.

The exit code is the command's own: 128 + n when signal n ended it, 124 when its
time was over, 125 when it could not be run or its outcome was lost.")]
pub(crate) struct Exec {
    /// Way to run it.
    #[command(flatten)]
    how: How,
    /// Variable for the command, or K alone for its value here; may be given often
    #[arg(short, long, value_name = "K[=V]", value_parser = variable)]
    env: Vec<Pair>,
    /// Name of the run: it runs once however often it is asked for [default: random]
    #[arg(long, value_name = "KEY")]
    exec_id: Option<String>,
    /// Start it, print its exec id, and leave it running
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// A line for `bash -c`, in place of CMD
    #[arg(long, value_name = "LINE", conflicts_with = "command")]
    shell: Option<String>,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Program and arguments, passed on as they are; `--` before it is allowed
    #[arg(trailing_var_arg = true, required_unless_present = "shell", value_name = "CMD")]
    command: Vec<OsString>,
}

/// Way to run a command.
#[derive(Debug, Default, Args)]
pub(crate) struct How {
    /// Send our stdin to the command
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Working directory [default: the user's home]
    #[arg(short = 'w', long, visible_alias = "workdir", value_name = "DIR")]
    pub(super) cwd: Option<String>,
    /// User by name or number [default: root]
    #[arg(short, long, value_name = "USER")]
    pub(super) user: Option<String>,
    /// Kill the command and all it started after this time, such as 30s or 2h [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) timeout: Option<Duration>,
}

/// Messages queued for the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;
const CHUNK: usize = 64 * 1024;
/// Longest wait for the command's end after its own timeout.
const GRACE: Duration = Duration::from_secs(90);

type Message = exec_request::Message;

pub(super) async fn run(controller: Controller, exec: Exec, output: Output) -> Result<u8, Failure> {
    let Exec { how, env, exec_id, detach, shell, sandbox: One { id }, command } = exec;
    let ours = exec_id.is_none() && !detach;
    let command = match shell {
        Some(line) => exec_start::Command::Shell(line),
        None => argv(command)?,
    };
    let mut start = start(id, &how, env, command)?;
    start.exec_id = exec_id.unwrap_or(start.exec_id);
    start.detached = detach;
    if detach {
        return detached(controller, start, output).await;
    }
    attached(controller, start, how.interactive, ours, output).await
}

/// Runs a command to its end; returns its exit code. When we fail, a command of `ours`, whose exec id
/// nobody else knows, is killed.
pub(super) async fn attached(
    controller: Controller,
    start: ExecStart,
    interactive: bool,
    ours: bool,
    output: Output,
) -> Result<u8, Failure> {
    let tty = start.tty;
    let timeout = start.timeout.and_then(proto::duration::read);
    let late =
        timeout.and_then(|timeout| Instant::now().checked_add(timeout.saturating_add(GRACE)));
    let control = Control::new(&controller, &start);
    let (sender, input) = mpsc::channel(QUEUE);
    // Before the command can be seen to run: signals from then on are for the command.
    let signals = Signals::listen()
        .map_err(|error| Failure::local(format!("cannot listen for signals: {error}")))?;
    let mut sink = Sink::new(output.json)?;
    let mut session = Session::start(controller, start);
    let started = session.started();
    let ended = {
        let carried = Box::pin(session.run(input, &mut sink, output));
        let fed = feed(sender, started.clone(), interactive, tty);
        let both = async {
            tokio::select! {
                // Raw mode must be on before the command's first output is shown.
                biased;
                failed = fed => failed,
                ended = carried => ended,
            }
        };
        tokio::select! {
            () = passed(late) => Err(Failure::local(
                "the timeout of the command has passed, and the controller has not reported its end",
            )),
            ended = both => ended,
            code = signals.forward(&control, started.clone(), tty) => {
                control.kill().await;
                return Ok(code);
            }
        }
    };
    let ended = match ended {
        Ok(Ended::Exit(ended)) => ended,
        Ok(Ended::Seen) => ExecExit::default(),
        Err(failure) => {
            // Kills the command, also if it is unknown whether it runs: nothing else knows its
            // exec_id, so it would only use up its time.
            let unknown = failure.known() == Some(Reason::OutcomeUnknown);
            if ours && (*started.borrow() || unknown) {
                control.kill().await;
            }
            return Err(failure);
        }
    };
    if output.json {
        output.value(&json!({
            "id": control.id,
            "exec_id": control.exec_id,
            "code": ended.code,
            "signal": ended.signal,
            "timed_out": ended.timed_out,
            "stdout": String::from_utf8_lossy(&sink.stdout),
            "stderr": String::from_utf8_lossy(&sink.stderr),
        }))?;
    }
    Ok(code(ended, output))
}

/// Waits until this time; for ever without one.
async fn passed(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Exit code of the command, which becomes ours.
pub(super) fn code(ended: ExecExit, output: Output) -> u8 {
    if ended.timed_out {
        output.note("the command was killed: its time was over (--timeout)");
    }
    u8::try_from(ended.code).unwrap_or(u8::MAX)
}

/// Starts the command, waits until it runs, and leaves it.
async fn detached(controller: Controller, start: ExecStart, output: Output) -> Result<u8, Failure> {
    let control = Control::new(&controller, &start);
    let (sender, input) = mpsc::channel(1);
    let mut sink = Sink::new(true)?;
    // Its output is ignored.
    let mut session = Session::start(controller, start);
    let mut started = session.started();
    tokio::select! {
        biased;
        runs = started.wait_for(|runs| *runs) => {
            runs.map_err(|_| Failure::local("the command did not start"))?;
        }
        ended = session.run(input, &mut sink, output) => drop(ended?),
    }
    drop(sender);
    let eof = WriteExecStdinRequest {
        id: control.id.clone(),
        exec_id: control.exec_id.clone(),
        eof: true,
        ..WriteExecStdinRequest::default()
    };
    // A command that has ended already needs no end of stdin.
    answer(control.controller.sandboxes.clone().write_exec_stdin(eof)).await.ok();
    match output.json {
        true => output.value(&json!({ "id": control.id, "exec_id": control.exec_id }))?,
        false => output.line(&control.exec_id)?,
    }
    Ok(0)
}

/// Program with its arguments.
///
/// # Errors
/// When one is not UTF-8.
pub(super) fn argv(words: Vec<OsString>) -> Result<exec_start::Command, Failure> {
    let utf8 = |arg: OsString| {
        arg.into_string().map_err(|arg| {
            Failure::usage(
                format!("the argument {arg:?} is not UTF-8"),
                "pass such bytes on stdin with -i",
            )
        })
    };
    let args = words.into_iter().map(utf8).collect::<Result<_, _>>()?;
    Ok(exec_start::Command::Argv(Argv { args }))
}

/// Request for a command, under a random exec id.
///
/// # Errors
/// When there are no random numbers.
pub(super) fn start(
    id: String,
    how: &How,
    env: Vec<Pair>,
    command: exec_start::Command,
) -> Result<ExecStart, Failure> {
    let mut env: BTreeMap<_, _> = env.into_iter().map(|Pair { key, value }| (key, value)).collect();
    #[expect(
        clippy::disallowed_methods,
        reason = "what kind of terminal it is, only the environment says"
    )]
    if how.tty
        && let Ok(term) = std::env::var("TERM")
    {
        env.entry("TERM".into()).or_insert(term);
    }
    let timeout = how.timeout.map(|timeout| prost_types::Duration {
        seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(timeout.subsec_nanos()).unwrap_or_default(),
    });
    Ok(ExecStart {
        id,
        command: Some(command),
        cwd: how.cwd.clone().unwrap_or_default(),
        env,
        user: how.user.clone().unwrap_or_default(),
        timeout,
        tty: how.tty,
        window: if how.tty { terminal::size() } else { None },
        exec_id: super::create::random_key()?,
        ..ExecStart::default()
    })
}

/// Gives the command our stdin once it runs, or its end at once. Ends only with a failure.
async fn feed(
    sender: mpsc::Sender<Message>,
    mut running: watch::Receiver<bool>,
    interactive: bool,
    tty: bool,
) -> Result<Ended, Failure> {
    if !interactive {
        sender.send(Message::StdinEof(true)).await.ok();
        return std::future::pending().await;
    }
    // From here on the keys go to the command; the guard restores the terminal.
    running.wait_for(|runs| *runs).await.ok();
    let raw = (tty && terminal::is_terminal()).then(terminal::Raw::enter);
    let _raw = raw
        .transpose()
        .map_err(|error| Failure::local(format!("cannot use the terminal: {error}")))?;
    // A thread of its own, which ends with us: a read of stdin cannot be cancelled.
    std::thread::spawn(move || pump_stdin(&sender));
    std::future::pending().await
}

fn pump_stdin(sender: &mpsc::Sender<Message>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    loop {
        let message = match stdin.read(&mut buffer) {
            Ok(0) | Err(_) => Message::StdinEof(true),
            Ok(length) => Message::Stdin(Bytes::copy_from_slice(&buffer[..length])),
        };
        let last = matches!(message, Message::StdinEof(_));
        if sender.blocking_send(message).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::parse, *};

    #[test]
    fn exec_takes_its_flags_before_the_command_only() {
        let exec: Exec =
            parse("-it --timeout 2h 100001 -- ls --timeout -t -- x").expect("a command");
        assert!(exec.how.interactive && exec.how.tty);
        assert_eq!(exec.how.timeout, Some(Duration::from_secs(7200)));
        assert_eq!(exec.command, ["ls", "--timeout", "-t", "--", "x"]);
        let exec: Exec =
            parse("-e A=1 -e B=2 -u ada -w /srv 100001 ls -l -t --").expect("docker's");
        assert_eq!((exec.env.len(), exec.how.user.as_deref()), (2, Some("ada")));
        assert_eq!(exec.how.cwd.as_deref(), Some("/srv"));
        assert_eq!(exec.command, ["ls", "-l", "-t", "--"]);
        assert!(!exec.how.tty, "a flag of the command");
        let exec: Exec = parse("100001 -t bash").expect("kubectl's");
        assert!(exec.how.tty && exec.command == ["bash"]);
        let exec: Exec = parse("100001 --shell true").expect("a line for the shell");
        assert_eq!(exec.shell.as_deref(), Some("true"));
        for wrong in ["100001", "100001 --shell true -- ls", "100001 --no-such ls"] {
            assert!(parse::<Exec>(wrong).is_err(), "{wrong}");
        }
    }
}
