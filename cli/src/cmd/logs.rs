//! `logs`: prints a command's output up to now, and with -f also what follows.

use clap::Args;
use tokio::sync::mpsc;

use super::{exec::code, exec_id, targets::One};
use crate::{
    client::Controller,
    failure::Failure,
    output::Output,
    session::{Ended, Session},
    sink::Sink,
};

/// Arguments of `logs`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl logs ID EXEC_ID         what it has said until now
  sandboxctl logs -f ID EXEC_ID      and what it goes on to say; its exit code
                                     is ours then
  sandboxctl logs --json ID EXEC_ID  an object a line: stream, offset, text (or
                                     base64)

The last of the output is kept while the sandbox is up; `sandboxctl ps ID` lists
the exec ids.")]
pub(crate) struct Logs {
    /// Go on until the command ends, and end with its exit code
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Exec id of the run, or its beginning
    exec_id: String,
}

pub(super) async fn run(controller: Controller, logs: Logs, output: Output) -> Result<u8, Failure> {
    let Logs { follow, sandbox: One { id }, exec_id } = logs;
    let (exec_id, until) = match follow {
        true => (exec_id::resolve(&controller, &id, exec_id).await?, None),
        // Stops at the output's present length.
        false => {
            let exec = exec_id::find(&controller, &id, exec_id).await?;
            (exec.exec_id, Some([exec.stdout_bytes, exec.stderr_bytes]))
        }
    };
    // Our half stays open: its end could be taken for the end of the command's stdin.
    let (_sender, input) = mpsc::channel(1);
    let mut sink = if output.json { Sink::lines()? } else { Sink::new(false)? };
    let mut session = Session::attach(controller, id, exec_id, until);
    let ended = session.run(input, &mut sink, output).await;
    sink.end().await?;
    match ended? {
        Ended::Exit(exit) if follow => Ok(code(exit, output)),
        Ended::Exit(_) | Ended::Seen => Ok(0),
    }
}
