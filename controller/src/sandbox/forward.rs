//! Byte streams to servers inside a sandbox, and listeners for programs inside. Nothing is kept of them:
//! a stream whose connection to its node breaks has ended.

use std::{future::ready, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use proto::{
    Reason,
    exec::{check_chunk, pieces},
    forward::Target,
    id::Invalid,
    name::{Port, Team},
    sandbox::v1::{
        ForwardListenRequest, ForwardListenResponse, ForwardOpen, ForwardOpened, ForwardRequest,
        ForwardResponse, ListeningPort, Sandbox, forward_listen_response as listened,
        forward_request, forward_response,
    },
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

use super::{Error, REST, RETRY, Result, Sandboxes, exec::owner};
use crate::node::{self, Node};

/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Time after which a silent stream gets a message without content.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Buffered messages for a slow end. What is behind them waits in the window of its stream.
const AHEAD: usize = 1;
/// Longest wait until a stream that was broken off has ended at the node.
const HANG_UP: Duration = Duration::from_secs(15);

type FromNode = Pin<Box<dyn Stream<Item = Result<ForwardResponse, node::Error>> + Send>>;
type ToNode = mpsc::Sender<ForwardRequest>;

/// Messages of an open connection.
pub type Forwarded = ReceiverStream<Result<ForwardResponse>>;
/// Messages of a listener.
pub type Accepted = ReceiverStream<Result<ForwardListenResponse>>;

/// Open connection of a node.
struct Connection {
    node: Arc<Node>,
    opened: ForwardOpened,
    to: ToNode,
    from: FromNode,
}

impl Sandboxes {
    /// Connects to a server inside a sandbox. The first message of `input` says to which.
    ///
    /// # Errors
    /// When the first message is no `open`, or as `forward`. Later errors end the stream.
    pub async fn forward_stream<S>(self: &Arc<Self>, team: &Team, mut input: S) -> Result<Forwarded>
    where
        S: Stream<Item = Result<ForwardRequest>> + Send + Unpin + 'static,
    {
        let first = match timeout(FIRST, input.next()).await {
            Ok(Some(first)) => first?.message,
            Ok(None) | Err(_) => None,
        };
        let Some(forward_request::Message::Open(open)) = first else {
            return Err(Invalid::new("open", "must be the first message").into());
        };
        self.forward(team, open, input).await
    }

    /// Connects to a server inside a sandbox. The end of `input` is the end of the caller's bytes, an error breaks
    /// the connection off, and so does dropping the answer before that end.
    ///
    /// # Errors
    /// When there is no such sandbox, it does not run, or nothing listens there. Later errors end the stream.
    pub async fn forward<S>(
        self: &Arc<Self>,
        team: &Team,
        open: ForwardOpen,
        input: S,
    ) -> Result<Forwarded>
    where
        S: Stream<Item = Result<ForwardRequest>> + Send + Unpin + 'static,
    {
        let connection = self.connect(team, open).await?;
        let (to_caller, answer) = mpsc::channel(AHEAD);
        let this = self.clone();
        self.tasks.spawn(async move { this.carry(connection, input, to_caller).await });
        Ok(ReceiverStream::new(answer))
    }

    /// Listens on a port inside a sandbox, until the stream is dropped.
    ///
    /// # Errors
    /// When the port is taken, or as `forward`. Later errors end the stream.
    pub async fn forward_listen(
        self: &Arc<Self>,
        team: &Team,
        request: &ForwardListenRequest,
    ) -> Result<Accepted> {
        let port = Port::try_from(request.port)?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, &request.id)?;
        let heard = node.client.forward_listen(&owner(&entry), port).await;
        let mut heard = Box::pin(heard.map_err(|error| self.node_error(&node, error))?);
        let (to_caller, answer) = mpsc::channel(AHEAD);
        let this = self.clone();
        self.tasks.spawn(async move {
            loop {
                let message = tokio::select! {
                    () = to_caller.closed() => return,
                    () = this.stop.cancelled() => Err(stopping()),
                    heard = timeout(HEARTBEAT, heard.next()) => match heard {
                        Ok(Some(Ok(message))) => Ok(message),
                        Ok(Some(Err(error))) => Err(this.broke(&node, error)),
                        Ok(None) => Err(lost(&node, "its agent ended it")),
                        Err(_) => Ok(ForwardListenResponse {
                            message: Some(listened::Message::Heartbeat(true)),
                        }),
                    },
                };
                let over = message.is_err();
                if to_caller.send(message).await.is_err() || over {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(answer))
    }

    /// Lists the ports that something inside a sandbox listens on. Also returns the sandbox, whose
    /// services say which of them are open.
    ///
    /// # Errors
    /// When there is no such sandbox, it is not up, or its node does not answer.
    pub async fn ports(&self, team: &Team, id: &str) -> Result<(Vec<ListeningPort>, Sandbox)> {
        let (entry, node) = self.on_node(team, id)?;
        let ports = self.calls(&node, team)?.list_ports(&entry.id).await;
        let ports = ports.map_err(|error| self.node_error(&node, error))?;
        let gone = || Error::new(Reason::SandboxDeleted, format!("{} is deleted", entry.id));
        Ok((ports, self.view(&entry.id).ok_or_else(gone)?))
    }

    /// Opens a connection at the sandbox's node.
    async fn connect(&self, team: &Team, mut open: ForwardOpen) -> Result<Connection> {
        Target::read(open.target.clone()).map_err(|invalid| invalid.under("open"))?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, &open.id)?;
        open.id = entry.id.to_string();
        let (to, messages) = mpsc::channel(AHEAD);
        let first = ForwardRequest { message: Some(forward_request::Message::Open(open)) };
        let messages = stream::once(ready(first)).chain(ReceiverStream::new(messages));
        let epoch = self.nodes.epoch.get();
        let from = node.client.forward(epoch, &owner(&entry), messages).await;
        let mut from = from.map_err(|error| self.node_error(&node, error))?.boxed();
        let late = || node::Error::Unknown("it did not say that the connection is open".into());
        let first =
            timeout(FIRST, from.next()).await.map_err(|_| self.node_error(&node, late()))?;
        let first = first.transpose().map_err(|error| self.node_error(&node, error))?;
        match first.and_then(|first| first.message) {
            Some(forward_response::Message::Opened(opened)) => {
                Ok(Connection { node, opened, to, from })
            }
            _ => Err(self.node_error(&node, node::Error::Nonsense("it opened nothing".into()))),
        }
    }

    /// Passes messages both ways until the connection ends, it breaks, or its caller goes. Each direction
    /// waits for its own reader alone.
    async fn carry<S>(
        &self,
        connection: Connection,
        input: S,
        to_caller: mpsc::Sender<Result<ForwardResponse>>,
    ) where
        S: Stream<Item = Result<ForwardRequest>> + Send + Unpin,
    {
        let Connection { node, opened, to, from } = connection;
        let mut half = Some(to);
        let up = async {
            if let Some(to) = &half
                && let Err(error) = upwards(input, to).await
            {
                return error;
            }
            // The end of the messages is the end of the bytes.
            half = None;
            std::future::pending().await
        };
        let failed = tokio::select! {
            error = up => Some(error),
            failed = self.downwards(&node, opened, from, &to_caller) => failed,
            () = self.stop.cancelled() => Some(stopping()),
        };
        // A half that has not ended is broken off.
        if let Some(to) = half {
            tokio::spawn(break_off(to));
        }
        if let Some(error) = failed {
            // The caller may have gone.
            drop(to_caller.send(Err(error)).await);
        }
    }

    /// Passes the server's messages to the caller. Returns the error with which the stream ends.
    async fn downwards(
        &self,
        node: &Node,
        opened: ForwardOpened,
        mut from: FromNode,
        to_caller: &mpsc::Sender<Result<ForwardResponse>>,
    ) -> Option<Error> {
        let respond = |message| ForwardResponse { message: Some(message) };
        let mut message = respond(forward_response::Message::Opened(opened));
        loop {
            to_caller.send(Ok(message)).await.ok()?;
            let next = tokio::select! {
                () = to_caller.closed() => return None,
                next = timeout(HEARTBEAT, from.next()) => next,
            };
            message = match next {
                Ok(Some(Ok(message))) => message,
                Ok(Some(Err(error))) => return Some(self.broke(node, error)),
                Ok(None) => return None,
                Err(_) => respond(forward_response::Message::Data(Bytes::new())),
            };
        }
    }

    /// Builds the error of a connection that was open. The end of an agent is its end.
    fn broke(&self, node: &Node, error: node::Error) -> Error {
        match error {
            node::Error::Refused { .. } | node::Error::Nonsense(_) => self.node_error(node, error),
            node::Error::Unreachable(why)
            | node::Error::Unknown(why)
            | node::Error::Silent(why) => lost(node, &why),
        }
    }
}

fn lost(node: &Node, why: &str) -> Error {
    let node = &node.name;
    let what = format!("the connection to node {node} broke, and the forward with it: {why}");
    Error::new(Reason::ForwardLost, what)
}

fn stopping() -> Error {
    Error::new(Reason::ShuttingDown, "the controller is stopping").retry(RETRY)
}

/// Passes the caller's messages on, up to the end of its half. Returns never while the connection lives
/// and the node takes no more.
async fn upwards<S>(mut input: S, to: &ToNode) -> Result<()>
where
    S: Stream<Item = Result<ForwardRequest>> + Send + Unpin,
{
    while let Some(message) = input.next().await {
        match message?.message {
            Some(forward_request::Message::Data(data)) if !data.is_empty() => {
                check_chunk("data", &data)?;
                for piece in pieces(data) {
                    let message = Some(forward_request::Message::Data(piece));
                    if to.send(ForwardRequest { message }).await.is_err() {
                        // The node's next message says why.
                        return std::future::pending().await;
                    }
                }
            }
            Some(forward_request::Message::Open(_)) => {
                return Err(Invalid::new("open", "must be the first message, and only that").into());
            }
            Some(forward_request::Message::Eof(true)) => break,
            // Nothing, or from a later version of the caller.
            Some(forward_request::Message::Data(_) | forward_request::Message::Eof(false))
            | None => sleep(REST).await,
        }
    }
    Ok(())
}

/// Breaks the caller's half off. The end of its messages would be the end of its bytes: so a second `open` comes
/// before it, which the agent refuses, and it waits until the stream has ended.
async fn break_off(to: ToNode) {
    let message = Some(forward_request::Message::Open(ForwardOpen::default()));
    let told = async {
        to.send(ForwardRequest { message }).await.ok();
        to.closed().await;
    };
    timeout(HANG_UP, told).await.ok();
}
