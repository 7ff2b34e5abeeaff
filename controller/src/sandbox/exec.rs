//! Running a command as a stream: the caller's messages go to the node, the node's to the caller.
//! Each side is read only as fast as the other takes it; nothing is collected here.

use std::{future::ready, pin::pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use proto::{
    id::Invalid,
    name::Team,
    reason,
    sandbox::v1::{ExecRequest, ExecResponse, ExecStart, exec_request, exec_response, exec_start},
    spec,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{Error, RETRY, Sandboxes};
use crate::node::{self, Node};

/// How long the first message may take.
const FIRST: Duration = Duration::from_secs(10);
/// A command that says nothing gets an empty message in between, so that the stream is never silent.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Messages that may wait for a slow caller.
const AHEAD: usize = 4;
/// Bytes of a command line, its directory and its user.
const COMMAND_BYTES_MAX: usize = 128 * 1024;
/// Longest time that a command may run, seconds.
const TIMEOUT_S_MAX: i64 = 24 * 3600;

impl Sandboxes {
    /// Runs a command. The first message of `input` says which and where.
    ///
    /// # Errors
    /// When the first message is not a valid start, or the sandbox cannot run anything now. Later
    /// errors end the stream.
    pub async fn exec<S>(
        self: &Arc<Self>,
        team: &Team,
        mut input: S,
    ) -> Result<ReceiverStream<Result<ExecResponse, Error>>, Error>
    where
        S: Stream<Item = Result<ExecRequest, Error>> + Send + Unpin + 'static,
    {
        let first = timeout(FIRST, input.next()).await;
        let Ok(Some(Ok(ExecRequest { message: Some(exec_request::Message::Start(start)) }))) =
            first
        else {
            if let Ok(Some(Err(error))) = first {
                return Err(error);
            }
            return Err(Invalid::new("start", "must be the first message").into());
        };
        let (node, start) = self.runnable(team, start)?;
        let (fault, faulted) = oneshot::channel();
        let output = node
            .client
            .exec(requests(start, input, fault))
            .await
            .map_err(|error| self.of_node(&node, error))?;
        let (to_caller, answer) = mpsc::channel(AHEAD);
        let this = self.clone();
        self.tasks.spawn(async move { this.pump(&node, output, faulted, to_caller).await });
        Ok(ReceiverStream::new(answer))
    }

    /// Checks a start and puts the sandbox's own id into it.
    pub(super) fn runnable(
        &self,
        team: &Team,
        mut start: ExecStart,
    ) -> Result<(Arc<Node>, ExecStart), Error> {
        check(&start)?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, &start.id)?;
        start.id = entry.id.to_string();
        Ok((node, start))
    }

    async fn pump(
        &self,
        node: &Node,
        output: impl Stream<Item = Result<ExecResponse, node::Error>>,
        faulted: oneshot::Receiver<Error>,
        to_caller: mpsc::Sender<Result<ExecResponse, Error>>,
    ) {
        let mut output = pin!(output);
        // Without a fault this never ends: the sender is dropped with the caller's last message.
        let mut faulted = pin!(async {
            match faulted.await {
                Ok(error) => error,
                Err(_) => std::future::pending().await,
            }
        });
        let mut ended = false;
        loop {
            let message = tokio::select! {
                // The caller has gone: dropping the node's stream tells the node.
                () = to_caller.closed() => return,
                () = self.stop.cancelled() => {
                    Err(Error::new(reason::SHUTTING_DOWN, "the controller is stopping").retry(RETRY))
                }
                error = &mut faulted => Err(error),
                message = timeout(HEARTBEAT, output.next()) => match message {
                    Ok(Some(Ok(message))) => Ok(message),
                    Ok(Some(Err(error))) => Err(self.lost(node, error)),
                    // A stream that ends without an exit code must not look like success.
                    Ok(None) if !ended => Err(Error::new(
                        reason::EXEC_FAILED,
                        format!("node {} ended the stream before the command's end", node.name),
                    )),
                    Ok(None) => return,
                    Err(_) => Ok(ExecResponse {
                        message: Some(exec_response::Message::Stdout(bytes::Bytes::new())),
                    }),
                },
            };
            let over = message.is_err();
            ended |= matches!(
                &message,
                Ok(ExecResponse { message: Some(exec_response::Message::Exit(_)) })
            );
            if to_caller.send(message).await.is_err() || over {
                return;
            }
        }
    }

    /// A command that was lost on the way: never repeated, its outcome is not known.
    pub(super) fn lost(&self, node: &Node, error: node::Error) -> Error {
        match error {
            node::Error::Unknown(why) | node::Error::Unreachable(why) => Error::new(
                reason::EXEC_FAILED,
                format!("the command was lost with the connection to node {}: {why}", node.name),
            ),
            refused @ (node::Error::Refused { .. } | node::Error::Nonsense(_)) => {
                self.of_node(node, refused)
            }
        }
    }
}

/// The start, then what the caller sends. What must not be sent on ends it and goes to `fault`.
fn requests<S>(
    start: ExecStart,
    input: S,
    fault: oneshot::Sender<Error>,
) -> impl Stream<Item = ExecRequest> + Send + 'static
where
    S: Stream<Item = Result<ExecRequest, Error>> + Send + 'static,
{
    let mut fault = Some(fault);
    let rest = tokio_stream::StreamExt::map_while(input, move |message| {
        let error = match message {
            Ok(ExecRequest { message: Some(exec_request::Message::Start(_)) }) => {
                Error::from(Invalid::new("start", "must be the first message only"))
            }
            Ok(message) => return Some(message),
            Err(error) => error,
        };
        if let Some(fault) = fault.take() {
            // Nobody listens when the command has ended already.
            drop(fault.send(error));
        }
        None
    });
    let start = ExecRequest { message: Some(exec_request::Message::Start(start)) };
    stream::once(ready(start)).chain(rest)
}

fn check(start: &ExecStart) -> Result<(), Invalid> {
    let mut bytes = start.cwd.len() + start.user.len();
    let mut nul = start.cwd.contains('\0') || start.user.contains('\0');
    match &start.command {
        Some(exec_start::Command::Argv(argv)) => {
            if argv.args.first().is_none_or(String::is_empty) {
                return Err(Invalid::new("argv", "must hold a program"));
            }
            bytes += argv.args.iter().map(String::len).sum::<usize>();
            nul |= argv.args.iter().any(|arg| arg.contains('\0'));
        }
        Some(exec_start::Command::Shell(line)) => {
            if line.is_empty() {
                return Err(Invalid::new("shell", "must not be empty"));
            }
            bytes += line.len();
            nul |= line.contains('\0');
        }
        None => return Err(Invalid::new("command", "must be argv or shell")),
    }
    if nul {
        return Err(Invalid::new("command", "must not hold a NUL"));
    }
    if bytes > COMMAND_BYTES_MAX {
        return Err(Invalid::new("command", "must be at most 128 KiB"));
    }
    spec::check_env(&start.env)?;
    let timeout = start.timeout.unwrap_or_default();
    if timeout.seconds < 0 || timeout.nanos < 0 || timeout.seconds > TIMEOUT_S_MAX {
        return Err(Invalid::new("timeout", "must be 0 to 24 h"));
    }
    if let Some(window) = &start.window
        && !((1..=1000).contains(&window.rows) && (1..=1000).contains(&window.cols))
    {
        return Err(Invalid::new("window", "must be 1 to 1000 rows and columns"));
    }
    Ok(())
}
