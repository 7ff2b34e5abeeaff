//! Runs a command and returns its output: a short one to its end, one with an exec_id over several
//! calls.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, future, stream};
use proto::{
    Reason,
    exec::{self, CHUNK_BYTES_MAX},
    id::Invalid,
    name::Team,
    sandbox::v1::{
        ExecExit, ExecRequest, ExecStart, WriteExecStdinRequest, exec_request, exec_response,
    },
};
use tokio::time::{Instant, sleep, timeout_at};

use crate::sandbox::{Error, Result, Sandboxes};

/// Longest run of a command without an exec_id.
const TIMEOUT_MAX: Duration = Duration::from_secs(20);
/// Time to kill a command that exceeded its timeout and to report that.
const MARGIN: Duration = Duration::from_secs(3);
/// Longest wait of a call for a command with an exec_id.
const ANSWER: Duration = Duration::from_secs(18);
/// Pause before stdin is offered again to a command that does not take it.
const FULL: Duration = Duration::from_millis(100);
/// Largest stdin.
const STDIN_BYTES_MAX: usize = 1024 * 1024;
/// Bytes kept of stdout and of stderr: each under 1 MiB, so that both fit into one message.
const OUTPUT_BYTES_MAX: usize = 1024 * 1024 - 1024;

/// Result of a command.
#[derive(Debug, Default)]
pub struct Output {
    /// Exit; `None` while the command runs.
    pub exit: Option<ExecExit>,
    /// Beginning of its stdout.
    pub stdout: Bytes,
    /// Beginning of its stderr.
    pub stderr: Bytes,
    /// Whether one of them was longer.
    pub truncated: bool,
    /// Name of the run.
    pub exec_id: String,
}

impl Sandboxes {
    /// Runs a command and returns its output: one without an `exec_id` to its end, within 20 s; one
    /// with it for as long as a call may take, with the output up to then.
    ///
    /// # Errors
    /// When it is not valid, cannot be run now, or was lost.
    pub async fn exec_command(
        self: &Arc<Self>,
        team: &Team,
        mut start: ExecStart,
        stdin: Bytes,
    ) -> Result<Output> {
        if stdin.len() > STDIN_BYTES_MAX {
            return Err(Invalid::new("stdin", "must be at most 1 MiB").into());
        }
        if start.tty {
            return Err(Invalid::new("start.tty", "needs the streaming call Exec").into());
        }
        let named = !start.exec_id.is_empty();
        let mut deadline = Instant::now() + ANSWER;
        if !named {
            let limit = limit(&start)?;
            start.timeout = prost_types::Duration::try_from(limit).ok();
            deadline = Instant::now() + limit + MARGIN;
        }
        let sandbox = start.id.clone();
        let messages = messages(start, (!named).then(|| stdin.clone()));
        // With an exec_id the input does not end: another call may write stdin too.
        let input = stream::iter(messages);
        let output = match named {
            true => self.exec(team, input.chain(stream::pending())).await?,
            false => self.exec(team, input).await?,
        };
        let mut feeding: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(future::pending());
        let (mut seen, mut stdout, mut stderr) =
            (Output::default(), Capture::default(), Capture::default());
        let mut output = std::pin::pin!(output);
        loop {
            let message = tokio::select! {
                message = timeout_at(deadline, output.next()) => message,
                () = &mut feeding => {
                    feeding = Box::pin(future::pending());
                    continue;
                }
            };
            let Ok(message) = message else { break };
            let Some(message) = message.transpose()? else {
                return Err(Error::new(Reason::OutcomeUnknown, "the command's stream had no end"));
            };
            match message.message {
                Some(exec_response::Message::Stdout(bytes)) => stdout.add(&bytes),
                Some(exec_response::Message::Stderr(bytes)) => stderr.add(&bytes),
                Some(exec_response::Message::Exit(exit)) => {
                    seen.exit = Some(exit);
                    break;
                }
                Some(exec_response::Message::Started(started)) => {
                    seen.exec_id = started.exec_id;
                    if named {
                        let write = WriteExecStdinRequest {
                            id: sandbox.clone(),
                            exec_id: seen.exec_id.clone(),
                            offset: started.stdin_offset,
                            ..WriteExecStdinRequest::default()
                        };
                        feeding = Box::pin(self.clone().feed(team.clone(), write, stdin.clone()));
                    }
                }
                None => {}
            }
        }
        if seen.exit.is_none() && (!named || seen.exec_id.is_empty()) {
            let what = "it is not known whether the command runs, or has run: it did not start, or \
                        did not end, in time";
            return Err(Error::new(Reason::OutcomeUnknown, what));
        }
        seen.truncated = stdout.truncated || stderr.truncated;
        (seen.stdout, seen.stderr) = (stdout.bytes.freeze(), stderr.bytes.freeze());
        Ok(seen)
    }

    /// Writes the rest of stdin. By offsets, so that concurrent calls write nothing twice.
    async fn feed(self: Arc<Self>, team: Team, mut write: WriteExecStdinRequest, stdin: Bytes) {
        let end = stdin.len() as u64;
        loop {
            let from = usize::try_from(write.offset).unwrap_or(usize::MAX).min(stdin.len());
            let to = stdin.len().min(from + CHUNK_BYTES_MAX);
            write.data = stdin.slice(from..to);
            write.eof = to == stdin.len();
            match self.write_exec_stdin(&team, write.clone()).await {
                Ok(taken) if taken >= end => return,
                Ok(taken) if taken > write.offset => write.offset = taken,
                Ok(_) => sleep(FULL).await,
                Err(error) => {
                    let passing =
                        [Reason::OutcomeUnknown, Reason::NodeUnreachable, Reason::ShuttingDown];
                    if !passing.contains(&error.reason) {
                        // The command has ended, which its stream reports.
                        return;
                    }
                    sleep(FULL).await;
                }
            }
        }
    }
}

/// Beginning of an output; the rest is read and dropped, so that the command can end.
#[derive(Default)]
struct Capture {
    bytes: BytesMut,
    truncated: bool,
}

impl Capture {
    fn add(&mut self, more: &[u8]) {
        let room = OUTPUT_BYTES_MAX - self.bytes.len();
        self.truncated |= more.len() > room;
        self.bytes.extend_from_slice(&more[..more.len().min(room)]);
    }
}

fn limit(start: &ExecStart) -> Result<Duration, Invalid> {
    match exec::timeout("start.timeout", start.timeout)?.unwrap_or(TIMEOUT_MAX) {
        asked if asked <= TIMEOUT_MAX => Ok(asked),
        _ => {
            let why = "must be 0 to 20 s; longer commands need an exec_id, or Exec";
            Err(Invalid::new("start.timeout", why))
        }
    }
}

/// Returns the start, followed by all of stdin when it travels in the same stream.
fn messages(start: ExecStart, stdin: Option<Bytes>) -> Vec<Result<ExecRequest>> {
    let mut messages = vec![exec_request::Message::Start(start)];
    if let Some(mut stdin) = stdin {
        while !stdin.is_empty() {
            let chunk = stdin.split_to(stdin.len().min(CHUNK_BYTES_MAX));
            messages.push(exec_request::Message::Stdin(chunk));
        }
        messages.push(exec_request::Message::StdinEof(true));
    }
    messages.into_iter().map(|message| Ok(ExecRequest { message: Some(message) })).collect()
}
