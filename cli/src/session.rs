//! The stream of a command that survives broken connections: when the connection to the controller
//! breaks, the stream attaches again at its position. No byte is repeated or lost.

use std::{
    io::{self, Write},
    os::fd::AsFd,
    time::Duration,
};

use proto::{
    Reason,
    reattach::{Received, Sent},
    sandbox::v1::{
        ExecAttach, ExecExit, ExecRequest, ExecResponse, ExecStart, ExecStarted, exec_request,
        exec_response,
    },
};
use tokio::{
    fs::File,
    io::AsyncWriteExt,
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
};

/// Longest absence of the controller.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(500);
/// Longest absence of the node's agent before the command has started: an agent that restarts is
/// back within seconds.
const AGENT_AWAY: Duration = Duration::from_secs(15);
/// Silence that counts as a broken connection: the controller sends a keep-alive every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// Messages queued for the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;
/// Bytes of output that `--json` holds in memory at most.
const JSON_BYTES_MAX: usize = 16 * 1024 * 1024;

type Message = exec_request::Message;

/// Reason why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The command ended.
    Exit(ExecExit),
    /// All requested output has arrived, and the command continues.
    Seen,
}

/// Session with a command, which its exec_id names.
#[derive(Debug)]
pub struct Session {
    controller: Controller,
    id: String,
    exec_id: String,
    /// Command to start; none to attach only.
    start: Option<ExecStart>,
    started: watch::Sender<bool>,
    /// Offsets in stdout and stderr to stop at, when not waiting for the command's end.
    until: Option<[u64; 2]>,
    have: [Received; 2],
    stdin: Sent,
}

impl Session {
    /// Starts a command; its `exec_id` makes it run once, even if the call is repeated.
    pub fn start(controller: Controller, start: ExecStart) -> Self {
        let (id, exec_id) = (start.id.clone(), start.exec_id.clone());
        Self { start: Some(start), ..Self::attach(controller, id, exec_id, None) }
    }

    /// Attaches to a command that runs or ran, from its first output to its end or to `until`.
    pub fn attach(
        controller: Controller,
        id: String,
        exec_id: String,
        until: Option<[u64; 2]>,
    ) -> Self {
        Self {
            controller,
            id,
            exec_id,
            start: None,
            started: watch::channel(false).0,
            until,
            have: Default::default(),
            stdin: Sent::default(),
        }
    }

    /// Receiver that turns true when the command is known to run.
    pub fn started(&self) -> watch::Receiver<bool> {
        self.started.subscribe()
    }

    /// Sends `input` to the command and its output to `sink`, until it ends.
    ///
    /// # Errors
    /// When the command cannot be run, or its end did not arrive.
    pub async fn run(
        &mut self,
        mut input: mpsc::Receiver<Message>,
        sink: &mut Sink,
        output: Output,
    ) -> Result<Ended, Failure> {
        let mut lost: Option<Instant> = None;
        loop {
            let mut heard = false;
            let failure = match self.once(&mut input, sink, &mut heard, output).await {
                Err(failure) if self.may_come_back(&failure) => failure,
                ended => return ended,
            };
            if heard {
                lost = None;
            }
            let since = *lost.get_or_insert_with(|| {
                output.note(format!("connection lost, attaching again ... ({})", failure.message));
                Instant::now()
            });
            let early = !*self.started.borrow() && failure.is_of_a_restart();
            if early && since.elapsed() >= AGENT_AWAY {
                return Err(failure);
            }
            if since.elapsed() >= PATIENCE {
                let hint = format!(
                    "the command may run on: `sandboxctl logs -f {} {}` attaches to it",
                    self.id, self.exec_id
                );
                return Err(failure.hint(hint));
            }
            sleep(AGAIN).await;
        }
    }

    /// True when nothing was decided, so that asking again can help. Before the start, a clear
    /// refusal or an unreachable controller is final.
    fn may_come_back(&self, failure: &Failure) -> bool {
        let unknown = failure.known() == Some(Reason::OutcomeUnknown);
        let early = !*self.started.borrow();
        // The exec_id makes the command run once, so a restart of the agent is waited for.
        let restart = failure.is_of_a_restart();
        let decided = failure.reason.is_some() && !unknown && !restart;
        failure.transient && !(early && (failure.unreached || decided))
    }

    async fn once(
        &mut self,
        input: &mut mpsc::Receiver<Message>,
        sink: &mut Sink,
        heard: &mut bool,
        output: Output,
    ) -> Result<Ended, Failure> {
        let (to_command, messages) = mpsc::channel(QUEUE);
        let first = match &self.start {
            Some(start) if !*self.started.borrow() => Message::Start(start.clone()),
            _ => Message::Attach(ExecAttach {
                id: self.id.clone(),
                exec_id: self.exec_id.clone(),
                stdout_offset: self.have[0].bytes(),
                stderr_offset: self.have[1].bytes(),
            }),
        };
        send(&to_command, first).await;
        let mut client = self.controller.sandboxes.clone();
        let mut responses = answer(client.exec(ReceiverStream::new(messages))).await?;
        let (begin, begun) = oneshot::channel();
        let Self { stdin, have, started, until, .. } = self;
        let forward = async {
            // The answer says at which offset stdin continues.
            let Ok(offset) = begun.await else { return std::future::pending().await };
            let Some(missing) = stdin.from(offset) else {
                return Failure::local("stdin that the command had not taken is not held any more");
            };
            for bytes in missing {
                send(&to_command, Message::Stdin(bytes)).await;
            }
            if stdin.eof {
                send(&to_command, Message::StdinEof(true)).await;
            }
            while let Some(message) = input.recv().await {
                match &message {
                    Message::Stdin(bytes) => stdin.keep(bytes.clone()),
                    Message::StdinEof(eof) => stdin.eof |= eof,
                    Message::Start(_)
                    | Message::Attach(_)
                    | Message::Resize(_)
                    | Message::Signal(_) => {}
                }
                send(&to_command, message).await;
            }
            std::future::pending().await
        };
        let receive = async {
            let mut begin = Some(begin);
            loop {
                if until.is_some_and(|until| {
                    begin.is_none() && (0..2).all(|n| have[n].bytes() >= until[n])
                }) {
                    return Ok(Ended::Seen);
                }
                match next(&mut responses).await? {
                    exec_response::Message::Started(told) => {
                        *heard = true;
                        resume(have, &told, *started.borrow(), output)?;
                        started.send_replace(true);
                        // Tasks that wait for the start run first.
                        tokio::task::yield_now().await;
                        if let Some(begin) = begin.take() {
                            begin.send(told.stdin_offset).ok();
                        }
                    }
                    exec_response::Message::Stdout(bytes) => {
                        if let Some(bytes) = have[0].fresh(bytes) {
                            sink.take(&bytes, false).await?;
                        }
                    }
                    exec_response::Message::Stderr(bytes) => {
                        if let Some(bytes) = have[1].fresh(bytes) {
                            sink.take(&bytes, true).await?;
                        }
                    }
                    exec_response::Message::Exit(exit) => return Ok(Ended::Exit(exit)),
                }
            }
        };
        tokio::select! {
            ended = receive => ended,
            failure = forward => Err(failure),
        }
    }
}

/// Sends a message; if nothing receives it, the end of the stream gives the reason.
async fn send(to: &mpsc::Sender<ExecRequest>, message: Message) {
    to.send(ExecRequest { message: Some(message) }).await.ok();
}

async fn next(responses: &mut Streaming<ExecResponse>) -> Result<exec_response::Message, Failure> {
    loop {
        let Ok(response) = timeout(SILENCE, responses.message()).await else {
            return Err(Failure::deadline("the controller gave no sign of life", SILENCE));
        };
        match response? {
            Some(ExecResponse { message: Some(message) }) => return Ok(message),
            // Message of a later version of the controller.
            Some(ExecResponse { message: None }) => {}
            None => {
                return Err(Failure::local(
                    "the connection ended before the command's exit code came",
                )
                .hint("the command may still run; `sandboxctl ps ID` shows it"));
            }
        }
    }
}

/// Continues both outputs at the controller's offsets.
fn resume(
    have: &mut [Received; 2],
    told: &ExecStarted,
    again: bool,
    output: Output,
) -> Result<(), Failure> {
    let begins = [(told.stdout_offset, "stdout"), (told.stderr_offset, "stderr")];
    for (received, (offset, name)) in have.iter_mut().zip(begins) {
        if received.resume(offset) {
            continue;
        }
        if again {
            let what = format!("{name} that came while the connection was lost is not kept");
            return Err(Failure::local(what).hint(
                "the command may still run; `sandboxctl logs ID EXEC_ID` has its last output",
            ));
        }
        output.note(format!("the first {offset} bytes of {name} are not kept any more"));
        received.begin(offset);
    }
    Ok(())
}

/// Destination of output: the process's own, or memory for `--json`.
#[derive(Debug)]
pub struct Sink {
    json: bool,
    /// Collected stdout.
    pub stdout: Vec<u8>,
    /// Collected stderr.
    pub stderr: Vec<u8>,
    // Files of tokio: a slow reader of ours must not delay the connection's pings.
    to_stdout: File,
    to_stderr: File,
}

impl Sink {
    /// Creates a sink to our own stdout and stderr.
    ///
    /// # Errors
    /// When they are closed.
    pub fn new(json: bool) -> io::Result<Self> {
        let to_stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let to_stderr = io::stderr().as_fd().try_clone_to_owned()?;
        io::stdout().flush()?;
        Ok(Self {
            json,
            stdout: Vec::new(),
            stderr: Vec::new(),
            to_stdout: File::from_std(to_stdout.into()),
            to_stderr: File::from_std(to_stderr.into()),
        })
    }

    async fn take(&mut self, bytes: &[u8], is_stderr: bool) -> Result<(), Failure> {
        if !self.json {
            return match is_stderr {
                true => write(&mut self.to_stderr, bytes).await,
                false => write(&mut self.to_stdout, bytes).await,
            };
        }
        if self.stdout.len() + self.stderr.len() + bytes.len() > JSON_BYTES_MAX {
            return Err(Failure::local(
                "the command wrote more than 16 MiB, which is more than --json holds",
            )
            .hint("leave --json out: the output then goes through as it comes"));
        }
        let kept = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        kept.extend_from_slice(bytes);
        Ok(())
    }
}

async fn write(to: &mut File, bytes: &[u8]) -> Result<(), Failure> {
    to.write_all(bytes).await?;
    Ok(to.flush().await?)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_first_look_takes_what_there_is_and_a_later_one_misses_nothing() {
        let output = Output { json: true, colour: false };
        let told = |stdout_offset| ExecStarted { stdout_offset, ..ExecStarted::default() };
        let mut have = [Received::default(); 2];
        have[0].begin(10);
        resume(&mut have, &told(8), true, output).expect("whole");
        assert_eq!(have[0].fresh(Bytes::from_static(b"abc")).as_deref(), Some(&b"c"[..]));
        assert!(resume(&mut have, &told(12), true, output).is_err(), "some is missing");
        resume(&mut have, &told(12), false, output).expect("a first look takes what there is");
        assert_eq!(have[0].bytes(), 12);
    }
}
