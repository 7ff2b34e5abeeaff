//! The stream of a command that survives broken connections: when the connection to the controller
//! breaks, the stream attaches again at its position. No byte is repeated or lost.

use std::time::Duration;

use proto::{
    Reason,
    reattach::{Received, Sent},
    sandbox::v1::{
        ExecAttach, ExecExit, ExecRequest, ExecResponse, ExecStart, ExecStarted, exec_request,
        exec_response,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::Output,
    sink::Sink,
};

/// Longest absence of the controller.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(500);
/// Longest absence of the node's agent, or of a controller that has too much to do, before the
/// command has started: an agent that restarts is back within seconds.
const AWAY: Duration = Duration::from_secs(15);
/// Silence that counts as a broken connection: the controller sends a keep-alive every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// Messages queued for the command; beyond them, reading stdin waits.
const QUEUE: usize = 16;

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

    /// Begins with the output behind these offsets in stdout and stderr.
    pub fn begin(&mut self, offsets: [u64; 2]) {
        self.have.iter_mut().zip(offsets).for_each(|(have, offset)| have.begin(offset));
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
            let may_pass = failure.is_of_a_restart() || failure.is_overload();
            let early = !*self.started.borrow() && may_pass;
            if early && since.elapsed() >= AWAY {
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
        let may_pass = failure.is_of_a_restart() || failure.is_overload();
        let decided = failure.reason.is_some() && !unknown && !may_pass;
        let unreached = failure.unreached && !failure.is_overload();
        (failure.transient || early && failure.is_overload()) && !(early && (unreached || decided))
    }

    /// Message that starts the command, or attaches to it once it runs.
    fn first(&self) -> Message {
        match &self.start {
            Some(start) if !*self.started.borrow() => Message::Start(start.clone()),
            _ => Message::Attach(ExecAttach {
                id: self.id.clone(),
                exec_id: self.exec_id.clone(),
                stdout_offset: self.have[0].bytes(),
                stderr_offset: self.have[1].bytes(),
            }),
        }
    }

    async fn once(
        &mut self,
        input: &mut mpsc::Receiver<Message>,
        sink: &mut Sink,
        heard: &mut bool,
        output: Output,
    ) -> Result<Ended, Failure> {
        let (to_command, messages) = mpsc::channel(QUEUE);
        send(&to_command, self.first()).await;
        let mut client = self.controller.sandboxes.clone();
        let mut responses = answer(client.exec(ReceiverStream::new(messages))).await?;
        let (begin, begun) = oneshot::channel();
        let Self { stdin, have, started, until, .. } = self;
        let forward = async {
            // The answer says at which offset stdin continues.
            match begun.await {
                Ok(offset) => forward(stdin, offset, input, &to_command).await,
                Err(_) => std::future::pending().await,
            }
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
                            let offset = have[0].bytes() - bytes.len() as u64;
                            sink.take(&bytes, offset, false).await?;
                        }
                    }
                    exec_response::Message::Stderr(bytes) => {
                        if let Some(bytes) = have[1].fresh(bytes) {
                            let offset = have[1].bytes() - bytes.len() as u64;
                            sink.take(&bytes, offset, true).await?;
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

/// Sends stdin from `offset` on, then what comes. Ends only when a part is not held any more.
async fn forward(
    stdin: &mut Sent,
    offset: u64,
    input: &mut mpsc::Receiver<Message>,
    to_command: &mpsc::Sender<ExecRequest>,
) -> Failure {
    let Some(missing) = stdin.from(offset) else {
        return Failure::local(
            "the connection was lost, and input that the command had not read is gone",
        );
    };
    for bytes in missing {
        send(to_command, Message::Stdin(bytes)).await;
    }
    if stdin.eof {
        send(to_command, Message::StdinEof(true)).await;
    }
    while let Some(message) = input.recv().await {
        match &message {
            Message::Stdin(bytes) => stdin.keep(bytes),
            Message::StdinEof(eof) => stdin.eof |= eof,
            Message::Start(_) | Message::Attach(_) | Message::Resize(_) | Message::Signal(_) => {}
        }
        send(to_command, message).await;
    }
    std::future::pending().await
}

/// Sends a message; if nothing receives it, the end of the stream gives the reason.
async fn send(to: &mpsc::Sender<ExecRequest>, message: Message) {
    to.send(ExecRequest { message: Some(message) }).await.ok();
}

async fn next(responses: &mut Streaming<ExecResponse>) -> Result<exec_response::Message, Failure> {
    loop {
        let Ok(response) = timeout(SILENCE, responses.message()).await else {
            return Err(Failure::deadline("the controller sent nothing", SILENCE));
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
            let what = format!("a part of {name} was lost while the connection was down");
            return Err(Failure::local(what).hint(
                "the command may still run; `sandboxctl logs ID EXEC_ID` has its last output",
            ));
        }
        output.note(format!("the first {offset} bytes of {name} are not kept any more"));
        received.begin(offset);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn new_reader_starts_anywhere_and_a_resumed_one_misses_nothing() {
        let output = Output::plain(true);
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
