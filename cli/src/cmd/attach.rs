//! `attach`: follows a command that runs already, and gives it what is typed.

use std::io::{self, Read};

use bytes::Bytes;
use clap::Args;
use proto::sandbox::v1::{ExecInfo, exec_request};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};

use super::{
    exec::{Control, code},
    exec_id,
    targets::One,
};
use crate::{
    client::Controller,
    exit,
    failure::Failure,
    output::Output,
    session::{Ended, Session},
    signals::Stops,
    sink::Sink,
    terminal,
};

/// Arguments of `attach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl exec -i --exec-id repl ID python3 -i
  sandboxctl attach ID repl                    what it says from now on; Ctrl-C
                                               leaves it running
  echo 'print(1)' | sandboxctl attach ID repl  a line for its stdin, and the end
                                               of it
  sandboxctl logs ID repl                      what it has said before
  sandboxctl kill -s INT ID repl               Ctrl-C for the command itself

A command whose stdin has ended already, such as one of `exec` without -i, reads
nothing more. The exit code is the command's own; 130 when you left it, 125 when
its outcome was lost.")]
pub(crate) struct Attach {
    /// Do not send our stdin to the command
    #[arg(long)]
    no_stdin: bool,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Exec id of the run, or its beginning
    exec_id: String,
}

/// Messages queued for the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;
const CHUNK: usize = 64 * 1024;
/// Byte that Ctrl-C types on a terminal in raw mode.
const CTRL_C: u8 = 3;

type Message = exec_request::Message;

pub(super) async fn run(
    controller: Controller,
    attach: Attach,
    output: Output,
) -> Result<u8, Failure> {
    let Attach { no_stdin, sandbox: One { id }, exec_id } = attach;
    let exec = exec_id::find(&controller, &id, exec_id).await?;
    if exec.exit.is_some() {
        output.note(format!(
            "it has ended; `sandboxctl logs {id} {}` shows what it said",
            exec.exec_id
        ));
    }
    let control = Control::of(&controller, &id, &exec.exec_id);
    let mut stops = Stops::listen()?;
    let mut sink = Sink::new(false)?;
    let mut session = Session::attach(controller, id, exec.exec_id.clone(), None);
    session.begin([exec.stdout_bytes, exec.stderr_bytes]);
    if terminal::is_terminal() && exec.exit.is_none() {
        output.note("attached; Ctrl-C leaves it running");
    }
    let (sender, input) = mpsc::channel(QUEUE);
    let (leave, left) = oneshot::channel();
    let raw = enter(&exec, no_stdin)?;
    let is_raw = raw.is_some();
    // Held here, too: its end could be taken for the end of the command's stdin.
    let _kept = sender.clone();
    if !no_stdin {
        // A thread of its own, which ends with us: a read of stdin cannot be cancelled.
        std::thread::spawn(move || pump(&sender, leave, is_raw));
    }
    let ended = tokio::select! {
        ended = session.run(input, &mut sink, output) => Some(ended),
        stop = stops.next() => return Ok(detached(raw, &control, stop.exit(), output)),
        () = typed(left) => None,
        () = resized(&control, is_raw) => None,
    };
    match ended {
        Some(Ok(Ended::Exit(exit))) => {
            drop(raw);
            Ok(code(exit, output))
        }
        Some(Err(failure)) => Err(failure),
        Some(Ok(Ended::Seen)) | None => Ok(detached(raw, &control, exit::INTERRUPTED, output)),
    }
}

/// Gives all keys to a command that has a terminal, if ours is one.
fn enter(exec: &ExecInfo, no_stdin: bool) -> Result<Option<terminal::Raw>, Failure> {
    let raw = (exec.tty && exec.exit.is_none() && !no_stdin && terminal::is_terminal())
        .then(terminal::Raw::enter);
    raw.transpose().map_err(|error| Failure::local(format!("cannot use the terminal: {error}")))
}

/// Says how to come back, on a terminal that is as it was.
fn detached(raw: Option<terminal::Raw>, control: &Control, exit: u8, output: Output) -> u8 {
    drop(raw);
    let Control { id, exec_id, .. } = control;
    output.note(format!("\nleft; it runs on, and `sandboxctl attach {id} {exec_id}` comes back"));
    exit
}

/// Waits until Ctrl-C is typed on a terminal in raw mode.
async fn typed(left: oneshot::Receiver<()>) {
    if left.await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Passes the size of our window on, now and when it changes, where we have the command's terminal.
async fn resized(control: &Control, is_raw: bool) {
    if let (true, Ok(mut changes)) = (is_raw, signal(SignalKind::window_change())) {
        loop {
            if let Some(size) = terminal::size() {
                // A lost size can be sent again.
                control.resize(size).await.ok();
            }
            if changes.recv().await.is_none() {
                break;
            }
        }
    }
    std::future::pending::<()>().await;
}

/// Sends stdin to the command. Its end is passed on where somebody meant it: not one without a byte before
/// it, such as that of /dev/null, and not that of a terminal that has gone.
fn pump(sender: &mpsc::Sender<Message>, leave: oneshot::Sender<()>, is_raw: bool) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    let was_terminal = terminal::is_terminal();
    let mut is_meant = was_terminal;
    loop {
        let typed = match stdin.read(&mut buffer) {
            Ok(0) => {
                if is_meant && !is_raw && (terminal::is_terminal() || !was_terminal) {
                    sender.blocking_send(Message::StdinEof(true)).ok();
                }
                return;
            }
            Err(_) => return,
            Ok(length) => &buffer[..length],
        };
        is_meant = true;
        let end = typed.iter().position(|&key| is_raw && key == CTRL_C);
        let bytes = Bytes::copy_from_slice(&typed[..end.unwrap_or(typed.len())]);
        if !bytes.is_empty() && !send(sender, Message::Stdin(bytes), is_raw) {
            return;
        }
        if end.is_some() {
            leave.send(()).ok();
            return;
        }
    }
}

/// Sends what was typed; false when nobody takes it any more. Keys that find the queue full are dropped:
/// Ctrl-C must be seen behind them.
fn send(sender: &mpsc::Sender<Message>, typed: Message, is_raw: bool) -> bool {
    if is_raw {
        return !matches!(sender.try_send(typed), Err(mpsc::error::TrySendError::Closed(_)));
    }
    sender.blocking_send(typed).is_ok()
}
