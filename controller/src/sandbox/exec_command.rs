//! Running a short command to its end.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use proto::{
    id::Invalid,
    name::Team,
    reason,
    sandbox::v1::{ExecExit, ExecRequest, ExecStart, exec_request, exec_response},
};
use tokio::time::{Instant, timeout_at};

use super::{Error, Sandboxes};

/// Longest time that such a command may run.
const TIMEOUT_MAX: Duration = Duration::from_secs(20);
/// Until a command that ran out of time is gone and has been told of.
const MARGIN: Duration = Duration::from_secs(3);
/// Largest stdin.
const STDIN_BYTES_MAX: usize = 1024 * 1024;
/// Kept of stdout and of stderr each: a little under 1 MiB, so that both fit into one message.
const OUTPUT_BYTES_MAX: usize = 1024 * 1024 - 1024;
/// One message of stdin.
const CHUNK: usize = 256 * 1024;

/// How a command ended, and what it said.
#[derive(Debug, Default)]
pub struct Output {
    /// How it ended.
    pub exit: ExecExit,
    /// The beginning of its stdout.
    pub stdout: Bytes,
    /// The beginning of its stderr.
    pub stderr: Bytes,
    /// There was more of one of them.
    pub truncated: bool,
}

impl Sandboxes {
    /// Runs a command of at most 20 s and returns its output.
    ///
    /// # Errors
    /// When it is not valid, cannot be run now, or was lost.
    pub async fn exec_command(
        self: &Arc<Self>,
        team: &Team,
        start: ExecStart,
        stdin: Bytes,
    ) -> Result<Output, Error> {
        let limit = limit(&start)?;
        if stdin.len() > STDIN_BYTES_MAX {
            return Err(Invalid::new("stdin", "must be at most 1 MiB").into());
        }
        if start.tty {
            return Err(Invalid::new("start.tty", "needs the streaming call Exec").into());
        }
        let timeout = i64::try_from(limit.as_secs()).unwrap_or_default();
        let nanos = i32::try_from(limit.subsec_nanos()).unwrap_or_default();
        let start =
            ExecStart { timeout: Some(prost_types::Duration { seconds: timeout, nanos }), ..start };
        let (node, start) = self.runnable(team, start)?;
        let deadline = Instant::now() + limit + MARGIN;
        let output = node.client.exec(stream::iter(messages(start, stdin))).await;
        let mut output = pin!(output.map_err(|error| self.of_node(&node, error))?);
        let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
        loop {
            let message = timeout_at(deadline, output.next()).await.map_err(|_| {
                let what = "the command did not end in time and it is not known whether it runs on";
                Error::new(reason::OUTCOME_UNKNOWN, format!("node {}: {what}", node.name))
            })?;
            let message = message.transpose().map_err(|error| self.lost(&node, error))?;
            let Some(message) = message else {
                let what = "ended the stream before the command's end";
                return Err(Error::new(reason::EXEC_FAILED, format!("node {} {what}", node.name)));
            };
            match message.message {
                Some(exec_response::Message::Stdout(bytes)) => stdout.add(&bytes),
                Some(exec_response::Message::Stderr(bytes)) => stderr.add(&bytes),
                Some(exec_response::Message::Exit(exit)) => {
                    let truncated = stdout.truncated || stderr.truncated;
                    let (stdout, stderr) = (stdout.bytes.freeze(), stderr.bytes.freeze());
                    return Ok(Output { exit, stdout, stderr, truncated });
                }
                Some(exec_response::Message::Started(_)) | None => {}
            }
        }
    }
}

/// The beginning of an output; the rest is read and dropped, so that the command can end.
#[derive(Default)]
struct Kept {
    bytes: BytesMut,
    truncated: bool,
}

impl Kept {
    fn add(&mut self, more: &[u8]) {
        let room = OUTPUT_BYTES_MAX - self.bytes.len();
        self.truncated |= more.len() > room;
        self.bytes.extend_from_slice(&more[..more.len().min(room)]);
    }
}

fn limit(start: &ExecStart) -> Result<Duration, Invalid> {
    let bad = || Invalid::new("start.timeout", "must be 0 to 20 s; longer commands need Exec");
    let timeout = start.timeout.unwrap_or_default();
    let asked = Duration::try_from(timeout).map_err(|_| bad())?;
    match asked {
        Duration::ZERO => Ok(TIMEOUT_MAX),
        asked if asked <= TIMEOUT_MAX => Ok(asked),
        _ => Err(bad()),
    }
}

fn messages(start: ExecStart, mut stdin: Bytes) -> Vec<ExecRequest> {
    let mut messages = vec![exec_request::Message::Start(start)];
    while !stdin.is_empty() {
        let chunk = stdin.split_to(stdin.len().min(CHUNK));
        messages.push(exec_request::Message::Stdin(chunk));
    }
    messages.push(exec_request::Message::StdinEof(true));
    messages.into_iter().map(|message| ExecRequest { message: Some(message) }).collect()
}
