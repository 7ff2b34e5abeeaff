//! `exec`: runs a command, forwards its bytes both ways and ends with its exit code.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    time::Duration,
};

use bytes::Bytes;
use proto::{
    Reason,
    sandbox::v1::{
        Argv, ExecExit, ExecStart, ResizeExecRequest, SignalExecRequest, WindowSize,
        WriteExecStdinRequest, exec_request, exec_start,
    },
};
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    time::{Instant, timeout, timeout_at},
};

use crate::{
    args::{Exec, Pair},
    client::{Controller, answer},
    exit,
    failure::Failure,
    output::Output,
    session::{Ended, Session, Sink},
    terminal,
};

/// Messages queued for the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;
const CHUNK: usize = 64 * 1024;
/// Timeout of the API when none is requested.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Longest wait for the command's end after its own timeout.
const GRACE: Duration = Duration::from_secs(90);
/// Interrupts after which we exit: the user means us when the command ignores them.
const INTERRUPTS_MAX: u32 = 3;
/// Longest time for the last signal before the exit.
const LAST_WORD: Duration = Duration::from_secs(2);
const KILL: u32 = 9;

type Message = exec_request::Message;

pub(super) async fn run(controller: Controller, exec: Exec, output: Output) -> Result<u8, Failure> {
    let (tty, interactive, detach) = (exec.tty, exec.interactive, exec.detach);
    let deadline = Instant::now() + exec.timeout.unwrap_or(TIMEOUT) + GRACE;
    let ours = exec.exec_id.is_none() && !detach;
    let start = start(exec)?;
    let control = Control {
        controller: controller.clone(),
        id: start.id.clone(),
        exec_id: start.exec_id.clone(),
    };
    if detach {
        return detached(controller, start, &control, output).await;
    }
    let (sender, input) = mpsc::channel(QUEUE);
    // Before the command can be seen to run: signals from then on are for the command.
    let signals = Signals::listen()
        .map_err(|error| Failure::local(format!("cannot listen for signals: {error}")))?;
    let mut sink = Sink::new(output.json)?;
    let mut session = Session::start(controller, start);
    let started = session.started();
    let ended = {
        let mut running = started.clone();
        let carried = session.run(input, &mut sink, output);
        let terminal = async {
            if interactive {
                // From here on the keys go to the command; the guard restores the terminal.
                running.wait_for(|runs| *runs).await.ok();
                let raw = (tty && terminal::is_terminal()).then(terminal::Raw::enter);
                let _raw = raw
                    .transpose()
                    .map_err(|error| Failure::local(format!("cannot use the terminal: {error}")))?;
                let sender = sender.clone();
                // A thread of its own, which ends with us: a read of stdin cannot be cancelled.
                std::thread::spawn(move || pump_stdin(&sender));
                return std::future::pending::<Result<_, Failure>>().await;
            }
            sender.send(Message::StdinEof(true)).await.ok();
            std::future::pending().await
        };
        let both = async {
            tokio::select! {
                // Raw mode must be on before the command's first output is shown.
                biased;
                failed = terminal => failed,
                ended = carried => ended,
            }
        };
        tokio::select! {
            ended = timeout_at(deadline, both) => ended.unwrap_or_else(|_| {
                Err(Failure::local("the command's end did not come, long after its time was over"))
            }),
            () = signals.forward(&control, started.clone(), tty) => {
                control.kill().await;
                return Ok(exit::INTERRUPTED);
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

/// Exit code of the command, which becomes ours.
pub(super) fn code(ended: ExecExit, output: Output) -> u8 {
    if ended.timed_out {
        output.note("the command was killed: its time was over (--timeout)");
    }
    u8::try_from(ended.code).unwrap_or(u8::MAX)
}

/// Starts the command, waits until it runs, and leaves it.
async fn detached(
    controller: Controller,
    start: ExecStart,
    control: &Control,
    output: Output,
) -> Result<u8, Failure> {
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

fn start(exec: Exec) -> Result<ExecStart, Failure> {
    let command = match exec.shell {
        Some(line) => exec_start::Command::Shell(line),
        None => {
            let utf8 = |arg: std::ffi::OsString| {
                arg.into_string().map_err(|arg| {
                    Failure::usage(
                        format!("the argument {arg:?} is not UTF-8"),
                        "pass such bytes on stdin with -i",
                    )
                })
            };
            let args = exec.command.into_iter().map(utf8).collect::<Result<_, _>>()?;
            exec_start::Command::Argv(Argv { args })
        }
    };
    let mut env: BTreeMap<_, _> =
        exec.env.into_iter().map(|Pair { key, value }| (key, value)).collect();
    #[expect(
        clippy::disallowed_methods,
        reason = "what kind of terminal it is, only the environment says"
    )]
    if exec.tty
        && let Ok(term) = std::env::var("TERM")
    {
        env.entry("TERM".into()).or_insert(term);
    }
    let timeout = exec.timeout.map(|timeout| prost_types::Duration {
        seconds: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(timeout.subsec_nanos()).unwrap_or_default(),
    });
    Ok(ExecStart {
        id: exec.id,
        command: Some(command),
        cwd: exec.cwd.unwrap_or_default(),
        env,
        user: exec.user.unwrap_or_default(),
        timeout,
        tty: exec.tty,
        window: if exec.tty { terminal::size() } else { None },
        exec_id: match exec.exec_id {
            Some(exec_id) => exec_id,
            None => super::create::random_key()?,
        },
        detached: exec.detach,
    })
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

/// Sends actions to the command outside its stream, which may be full of stdin.
struct Control {
    controller: Controller,
    id: String,
    exec_id: String,
}

enum Act {
    Signal(u32),
    Resize(WindowSize),
}

impl Control {
    async fn act(&self, act: Act) -> Result<(), Failure> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let mut client = self.controller.sandboxes.clone();
        match act {
            Act::Signal(signal) => {
                let request = SignalExecRequest { id, exec_id, signal };
                answer(client.signal_exec(request)).await.map(drop)
            }
            Act::Resize(window) => {
                let request = ResizeExecRequest { id, exec_id, window: Some(window) };
                answer(client.resize_exec(request)).await.map(drop)
            }
        }
    }

    /// Kills the command, if that is possible at once.
    async fn kill(&self) {
        timeout(LAST_WORD, self.act(Act::Signal(KILL))).await.ok();
    }
}

/// Signals that are forwarded to the command.
struct Signals {
    int: Signal,
    term: Signal,
    hup: Signal,
    window: Signal,
}

impl Signals {
    /// Catches the signals from now on; those before [`Signals::forward`] are queued for it.
    fn listen() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// Forwards signals and the terminal's size; returns when the user insists.
    async fn forward(mut self, control: &Control, mut started: watch::Receiver<bool>, tty: bool) {
        let (sender, mut acts) = mpsc::channel(QUEUE);
        let take = async {
            let mut interrupts = 0;
            loop {
                let act = tokio::select! {
                    _ = self.int.recv() => {
                        interrupts += 1;
                        if interrupts >= INTERRUPTS_MAX {
                            return;
                        }
                        Act::Signal(2)
                    }
                    _ = self.term.recv() => Act::Signal(15),
                    _ = self.hup.recv() => Act::Signal(1),
                    _ = self.window.recv() => match terminal::size() {
                        Some(size) if tty => Act::Resize(size),
                        _ => continue,
                    },
                };
                // When the queue is full, another signal adds nothing.
                sender.try_send(act).ok();
            }
        };
        let pass = async {
            // A command that does not run yet cannot be signalled.
            started.wait_for(|runs| *runs).await.ok();
            while let Some(act) = acts.recv().await {
                // The command's stream shows its state; a lost signal can be sent again.
                control.act(act).await.ok();
            }
        };
        tokio::select! {
            () = take => {}
            () = async { pass.await; std::future::pending().await } => {}
        }
    }
}
