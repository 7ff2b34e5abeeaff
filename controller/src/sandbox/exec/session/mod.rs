//! One caller's stream with one command, for as long as the command lives, across lost connections
//! to its node.
//!
//! ```text
//!  connect -> carry both ways -> exit, or an error: the caller's stream ends
//!     ^            |
//!     +-- 250 ms --+  the connection broke: attach at the caller's position, for up to 60 s
//! ```
//! Invariants: the caller gets each byte and the exit once; a command without an exec_id is never
//! started twice; stdin continues from the offset that the node has taken; each side is read only
//! as fast as the other takes it, and the buffers here are bounded.

mod kept;
mod loss;

use std::{collections::VecDeque, future::ready, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use proto::{
    Reason,
    agent::v1 as wire,
    exec,
    id::Invalid,
    reattach::Received,
    sandbox::v1::{
        ExecAttach, ExecExit, ExecRequest, ExecResponse, ExecStart, ExecStarted, WindowSize,
        exec_request, exec_response,
    },
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;

pub(crate) use self::kept::StdinMemory;
use self::{
    kept::KeptStdin,
    loss::{is_break, is_full},
};
use crate::{
    inventory::commands::End as Ended,
    node::{self, Node, StreamOwner},
    sandbox::{Error, REST, Result, Sandboxes, quota::AdmittedExec},
};

/// Time after which a silent command gets an empty message, so that the stream is never silent.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Time without the node after which its command counts as lost. Its sessions live as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause before each try to attach again.
const AGAIN: Duration = Duration::from_millis(250);

type Message = exec_request::Message;
type ToCaller = mpsc::Sender<Result<ExecResponse>>;

/// First message of the stream.
#[derive(Debug, Clone)]
pub(super) enum Opening {
    /// Starts a command.
    Start(ExecStart),
    /// Attaches to one.
    Attach(ExecAttach),
}

/// Stream over one connection.
pub(super) struct Link {
    /// `None` once there is nothing more to send.
    to_node: Option<mpsc::Sender<ExecRequest>>,
    output: Pin<Box<dyn Stream<Item = Result<wire::ExecResponse, node::Error>> + Send>>,
}

/// End of the stream over one connection.
enum End {
    /// The exit is delivered, or the caller has gone.
    Done,
    /// The caller's stream ends with this error.
    Failed(Error),
    /// The connection broke; the command continues.
    Broken(node::Error),
}

/// Kind of a message that was taken from the caller.
enum Took {
    /// Bytes for stdin.
    Bytes,
    /// Anything else, after which the caller is not read for `REST`.
    NoBytes,
}

/// Stream between a caller and a command.
pub(super) struct Session {
    sandboxes: Arc<Sandboxes>,
    node: Arc<Node>,
    owner: StreamOwner,
    opening: Opening,
    /// Name of the run at the node; empty until it started.
    exec_id: String,
    /// Whether the caller was told that it runs.
    started: bool,
    /// Whether a try to start it may have started it, or one that is under way may.
    in_doubt: bool,
    stdout: Received,
    stderr: Received,
    stdin: KeptStdin,
    /// Last size of the terminal.
    window: Option<WindowSize>,
    /// Time since which there is no connection to the command.
    broken: Option<Instant>,
    /// Place of a started command in its team's limits.
    admitted: Option<AdmittedExec>,
    /// Exit of the command, once it has come.
    exit: Option<ExecExit>,
}

impl Drop for Session {
    fn drop(&mut self) {
        let end = match self.exit {
            // Its name is free again: no program was run.
            Some(exit) => Ended::Ended(!matches!(exit.code, 126 | 127)),
            None if self.may_run() => Ended::MayRun,
            None => Ended::NeverRan,
        };
        if let Some(admitted) = self.admitted.take() {
            admitted.end(end);
        }
    }
}

impl Session {
    pub(super) fn new(
        sandboxes: Arc<Sandboxes>,
        (node, owner): (Arc<Node>, StreamOwner),
        opening: Opening,
        admitted: Option<AdmittedExec>,
    ) -> Self {
        let stdin = sandboxes.stdin.command(&owner.team);
        Self {
            sandboxes,
            node,
            owner,
            opening,
            exec_id: String::new(),
            started: false,
            in_doubt: false,
            stdout: Received::default(),
            stderr: Received::default(),
            stdin,
            window: None,
            broken: None,
            admitted,
            exit: None,
        }
    }

    /// Opens the first connection: a refusal of the node is the call's own error.
    pub(super) async fn open(&mut self) -> Result<Result<Link, node::Error>> {
        match self.connect().await {
            Err(error) if is_break(&error) && self.may_repeat() => Ok(Err(error)),
            Err(error) => Err(self.lost(error)),
            Ok(link) => Ok(Ok(link)),
        }
    }

    /// Carries messages both ways until the command ends.
    pub(super) async fn run<S>(
        mut self,
        opened: Result<Link, node::Error>,
        mut input: S,
        to_caller: ToCaller,
    ) where
        S: Stream<Item = Result<ExecRequest>> + Send + Unpin,
    {
        let mut input = Some(&mut input);
        let mut link = opened;
        loop {
            let end = match link {
                Ok(link) => self.carry(link, &mut input, &to_caller).await,
                Err(error) => End::Broken(error),
            };
            let failed = match end {
                End::Done => return,
                End::Failed(error) => error,
                End::Broken(why) => match self.reattach(why, &to_caller).await {
                    Some(Ok(again)) => {
                        link = Ok(again);
                        continue;
                    }
                    Some(Err(error)) => error,
                    None => return,
                },
            };
            // The caller may have gone.
            drop(to_caller.send(Err(failed)).await);
            return;
        }
    }

    async fn connect(&mut self) -> Result<Link, node::Error> {
        let (to_node, messages) = mpsc::channel(1);
        let first = match &self.opening {
            Opening::Start(start) if !self.started => Message::Start(start.clone()),
            Opening::Attach(attach) if !self.started => Message::Attach(attach.clone()),
            Opening::Start(ExecStart { id, .. }) | Opening::Attach(ExecAttach { id, .. }) => {
                Message::Attach(ExecAttach {
                    id: id.clone(),
                    exec_id: self.exec_id.clone(),
                    stdout_offset: self.stdout.bytes(),
                    stderr_offset: self.stderr.bytes(),
                })
            }
        };
        let was_in_doubt = self.in_doubt;
        // Until the answer: the node starts it whether or not a caller is left to hear of it.
        self.in_doubt |= matches!(first, Message::Start(_));
        let first = ExecRequest { message: Some(first) };
        let epoch = self.sandboxes.nodes.epoch.get();
        let messages = stream::once(ready(first)).chain(ReceiverStream::new(messages));
        let connected = self.node.client.exec(epoch, &self.owner, messages).await;
        let connected = connected.map(StreamExt::boxed);
        if connected.as_ref().is_err_and(never_ran) {
            self.in_doubt = was_in_doubt;
        }
        Ok(Link { to_node: Some(to_node), output: connected? })
    }

    /// Returns true when the caller chose the exec_id.
    fn is_named(&self) -> bool {
        match &self.opening {
            Opening::Start(start) => !start.exec_id.is_empty(),
            Opening::Attach(_) => true,
        }
    }

    /// Returns true when a repeated request cannot run anything a second time.
    fn may_repeat(&self) -> bool {
        if self.started { !self.exec_id.is_empty() } else { self.is_named() }
    }

    async fn carry<S>(
        &mut self,
        mut link: Link,
        input: &mut Option<&mut S>,
        to_caller: &ToCaller,
    ) -> End
    where
        S: Stream<Item = Result<ExecRequest>> + Send + Unpin,
    {
        let stop = self.sandboxes.stop.clone();
        let mut beat = Instant::now() + HEARTBEAT;
        // Stdin waits for the first answer, which has the offset to continue from.
        let mut ready = false;
        let mut pending: VecDeque<Message> = VecDeque::new();
        let mut rest = Instant::now();
        let mut permit = None;
        let mut deaf = false;
        loop {
            // The end of the input means end of stdin only where no other call can write stdin.
            if ready && input.is_none() && pending.is_empty() && !self.is_named() {
                link.to_node = None;
            }
            let may_read = ready && input.is_some() && pending.is_empty();
            tokio::select! {
                () = to_caller.closed() => return End::Done,
                () = stop.cancelled() => return End::Failed(self.stopping()),
                got = to_caller.reserve(), if permit.is_none() => match got {
                    Ok(got) => permit = Some(got),
                    Err(_) => return End::Done,
                },
                // A caller that does not read needs no heartbeat.
                () = sleep_until(beat), if permit.is_some() => {
                    if let Some(permit) = permit.take() {
                        permit.send(Ok(nothing()));
                    }
                    beat = Instant::now() + HEARTBEAT;
                }
                message = link.output.next(), if permit.is_some() => {
                    let message = match message {
                        Some(Ok(message)) => message,
                        Some(Err(error)) => return self.broke(error),
                        // A stream that ends without an exit code must not look like success.
                        None => return End::Failed(self.unknown("its stream ended before it did")),
                    };
                    self.stdin.accepted(message.stdin_offset);
                    let message = message.message.unwrap_or_default();
                    ready |= matches!(message.message, Some(exec_response::Message::Started(_)));
                    let pass = match self.pass(message, &mut pending) {
                        Ok(pass) => pass,
                        Err(error) => return End::Failed(error),
                    };
                    let over = matches!(pass, Some(exec_response::Message::Exit(_)));
                    if let Some(message) = pass
                        && let Some(permit) = permit.take()
                    {
                        permit.send(Ok(ExecResponse { message: Some(message) }));
                        beat = Instant::now() + HEARTBEAT;
                    }
                    if over {
                        return End::Done;
                    }
                }
                room = room(link.to_node.as_ref()), if !pending.is_empty() && !deaf => match room {
                    Some(room) => room.send(ExecRequest { message: pending.pop_front() }),
                    // The node takes no more; its next message says why.
                    None => deaf = true,
                },
                message = next(input, rest), if may_read => match message {
                    Some(message) => {
                        let took = message.and_then(|message| self.take(message, &mut pending));
                        match took {
                            Ok(Took::Bytes) => {}
                            Ok(Took::NoBytes) => rest = Instant::now() + REST,
                            Err(error) => return End::Failed(error),
                        }
                    }
                    None => {
                        *input = None;
                        // With a caller that ends its stream, a command without a name has all of its stdin.
                        if !self.is_named() {
                            self.stdin.end();
                        }
                    }
                },
            }
        }
    }

    /// Returns what the caller gets of a message of the node.
    fn pass(
        &mut self,
        message: ExecResponse,
        pending: &mut VecDeque<Message>,
    ) -> Result<Option<exec_response::Message>> {
        Ok(match message.message {
            Some(exec_response::Message::Started(started)) => {
                self.begin(started, pending)?.map(exec_response::Message::Started)
            }
            Some(exec_response::Message::Stdout(bytes)) => {
                self.stdout.fresh(bytes).map(exec_response::Message::Stdout)
            }
            Some(exec_response::Message::Stderr(bytes)) => {
                self.stderr.fresh(bytes).map(exec_response::Message::Stderr)
            }
            Some(exec_response::Message::Exit(exit)) => {
                self.exit = Some(exit);
                Some(exec_response::Message::Exit(exit))
            }
            // From a later version of the agent.
            None => None,
        })
    }

    /// Handles the first message of a connection: returns what the caller gets of it, and queues
    /// the stdin that the node still needs.
    fn begin(
        &mut self,
        started: ExecStarted,
        pending: &mut VecDeque<Message>,
    ) -> Result<Option<ExecStarted>> {
        self.broken = None;
        if !self.started {
            self.started = true;
            self.exec_id.clone_from(&started.exec_id);
            self.stdout.begin(started.stdout_offset);
            self.stderr.begin(started.stderr_offset);
            self.stdin.begin(started.stdin_offset);
            return Ok(Some(started));
        }
        let whole =
            self.stdout.resume(started.stdout_offset) && self.stderr.resume(started.stderr_offset);
        if !whole {
            let why = "output that came meanwhile is not kept; the command may still run";
            return Err(self.unknown(why));
        }
        let Some(missing) = self.stdin.from(started.stdin_offset) else {
            return Err(self.gone("stdin that it had not taken was no longer held"));
        };
        pending.extend(self.window.map(Message::Resize));
        pending.extend(missing.into_iter().map(Message::Stdin));
        if self.stdin.has_ended() {
            pending.push_back(Message::StdinEof(true));
        }
        tracing::info!(node = %self.node.name, exec_id = self.exec_id, "reattached to a command");
        Ok(None)
    }

    /// Checks a message of the caller, keeps what may have to be sent again, and queues what the node gets of it:
    /// nothing of a message that says nothing.
    fn take(&mut self, message: ExecRequest, pending: &mut VecDeque<Message>) -> Result<Took> {
        match message.message {
            Some(Message::Start(_) | Message::Attach(_)) => {
                return Err(Invalid::new("start", "must be the first message only").into());
            }
            Some(Message::Stdin(bytes)) => {
                exec::check_chunk("stdin", &bytes)?;
                if !bytes.is_empty() {
                    self.stdin.keep(&bytes);
                    pending.extend(exec::pieces(bytes).map(Message::Stdin));
                    return Ok(Took::Bytes);
                }
            }
            Some(message @ Message::StdinEof(true)) => {
                self.stdin.end();
                pending.push_back(message);
            }
            Some(Message::Resize(window)) => {
                exec::check_window(&window)?;
                self.window = Some(window);
                pending.push_back(Message::Resize(window));
            }
            // A signal lost with the connection is not sent again: it might arrive twice.
            Some(Message::Signal(signal)) => {
                exec::check_signal(signal)?;
                pending.push_back(Message::Signal(signal));
            }
            Some(Message::StdinEof(false)) | None => {}
        }
        Ok(Took::NoBytes)
    }

    fn broke(&self, error: node::Error) -> End {
        if is_break(&error) && self.may_repeat() {
            return End::Broken(error);
        }
        End::Failed(self.lost(error))
    }

    /// Attaches again. `None` when the caller has gone meanwhile.
    async fn reattach(&mut self, why: node::Error, to_caller: &ToCaller) -> Option<Result<Link>> {
        let since = *self.broken.get_or_insert_with(Instant::now);
        let node = &self.node.name;
        tracing::info!(%node, exec_id = self.exec_id, error = %why, "connection to a command lost");
        let stop = self.sandboxes.stop.clone();
        let attempts = self.attempts(since, why);
        let beats = async {
            loop {
                sleep(HEARTBEAT).await;
                // When the channel is full, other messages keep the stream alive.
                drop(to_caller.try_send(Ok(nothing())));
            }
        };
        let done = tokio::select! {
            () = to_caller.closed() => return None,
            () = stop.cancelled() => None,
            done = attempts => Some(done),
            () = beats => None,
        };
        Some(match done {
            Some(done) => done.map_err(|error| self.lost(error)),
            None => Err(self.stopping()),
        })
    }

    async fn attempts(&mut self, since: Instant, why: node::Error) -> Result<Link, node::Error> {
        let mut last = why;
        loop {
            // A node that was turned away is not waited for.
            let revoked = self.sandboxes.nodes.certificates().is_revoked(&self.node.name);
            if revoked || since.elapsed() >= PATIENCE {
                return Err(last);
            }
            sleep(AGAIN).await;
            match self.connect().await {
                // Many sessions come back at once, and those that had a stream must get one again.
                Err(error) if is_break(&error) || is_full(&error) => last = error,
                done => return done,
            }
        }
    }
}

fn nothing() -> ExecResponse {
    ExecResponse { message: Some(exec_response::Message::Stdout(Bytes::new())) }
}

async fn room(
    to_node: Option<&mpsc::Sender<ExecRequest>>,
) -> Option<mpsc::Permit<'_, ExecRequest>> {
    match to_node {
        Some(to_node) => to_node.reserve().await.ok(),
        None => std::future::pending().await,
    }
}

/// Waits for the next message of the caller, which is not read before `from`.
async fn next<S: Stream + Unpin>(input: &mut Option<&mut S>, from: Instant) -> Option<S::Item> {
    match input {
        Some(input) => {
            if from > Instant::now() {
                sleep_until(from).await;
            }
            input.next().await
        }
        None => std::future::pending().await,
    }
}

/// Returns true when the answer to a start proves that the command has not run, and will not.
fn never_ran(error: &node::Error) -> bool {
    match error {
        node::Error::Refused { reason, .. } => *reason != Reason::ExecLost,
        node::Error::Unreachable(_) => true,
        node::Error::Unknown(_) | node::Error::Silent(_) | node::Error::Nonsense(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_counts_unless_the_answer_proves_that_nothing_ran() {
        let refused = |reason| node::Error::Refused {
            reason,
            message: String::new(),
            retry_after: None,
            files_written: None,
        };
        assert!(never_ran(&refused(Reason::TooManyCalls)));
        assert!(never_ran(&refused(Reason::ExecIdReused)));
        assert!(never_ran(&node::Error::Unreachable(String::new())));
        for doubtful in [
            refused(Reason::ExecLost),
            node::Error::Unknown(String::new()),
            node::Error::Silent(String::new()),
            node::Error::Nonsense(String::new()),
        ] {
            assert!(!never_ran(&doubtful), "{doubtful:?}");
        }
    }
}
