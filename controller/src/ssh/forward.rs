//! Forwards: an SSH channel to a server inside the sandbox, on its loopback or a unix socket, or to a program
//! inside that has connected to a listener of ours.

use std::{sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use proto::{
    Reason,
    forward::check_unix_path,
    id::Invalid,
    name::Port,
    sandbox::v1::{
        ForwardOpen, ForwardRequest, ForwardTcp, forward_open::Target, forward_request,
        forward_response,
    },
};
use russh::{
    ChannelOpenFailure, ChannelWriteHalf,
    server::{ChannelOpenHandle, Msg},
};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    inputs::{Input, Inputs},
    record::Action,
    session::Session,
};
use crate::sandbox::{Error, Forwarded, Result};

/// Time in which a client may be the first to close a channel whose directions have ended: russh forgets such
/// a channel, and keeps others to the end of the connection.
const CLOSE: Duration = Duration::from_secs(1);
/// Longest time in which a server takes the bytes of a client that has closed its channel: one that reads no more would
/// keep its place in the connection, and among the team's streams.
const DRAIN: Duration = Duration::from_secs(60);
/// Time after that in which the last of them get to the sandbox.
const LINGER: Duration = Duration::from_secs(5);

/// Parses the target of a TCP forward: a port of the sandbox itself, under one of its own names.
pub(super) fn tcp(session: &Session, host: &str, port: u32) -> Result<Target, Invalid> {
    let local = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    let own = session.names();
    let is_own = local
        || host.eq_ignore_ascii_case("localhost")
        || own.iter().any(|name| name.eq_ignore_ascii_case(host));
    if !is_own {
        return Err(Invalid::new(
            "host",
            "must be localhost: a forward ends in the sandbox itself",
        ));
    }
    let port = Port::try_from(port)?.into();
    Ok(Target::Tcp(ForwardTcp { host: String::new(), port }))
}

/// Parses the target of a forward to a unix socket.
pub(super) fn unix(path: &str) -> Result<Target, Invalid> {
    check_unix_path(path)?;
    Ok(Target::UnixPath(path.to_owned()))
}

/// Connects, answers the client, and carries bytes until both directions have ended.
pub(super) async fn run(
    session: Arc<Session>,
    target: Result<Target, Invalid>,
    (out, inputs): (ChannelWriteHalf<Msg>, Inputs),
    reply: ChannelOpenHandle,
) {
    let ready = target.map_err(Error::from);
    let ready = ready.and_then(|target| Ok((target, session.enter()?)));
    let (target, permit) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            tracing::debug!(%error, "forward refused");
            session.refuse(Action::Forward, &error);
            return reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
    };
    let entry = session.begin(Action::Forward);
    let connected = Box::pin(async {
        session.wake().await?;
        connect(&session, target).await
    });
    match session.until_closed(connected).await {
        Some(Ok(connection)) => {
            session.channels.keep();
            reply.accept().await;
            let gone = inputs.gone();
            let carried = session.until_closed(carry(connection, &out, inputs)).await;
            entry.end(session.shared(), carried.as_ref().and_then(Carried::audit));
            drop(permit);
            close(&session, &out, gone, carried).await;
        }
        Some(Err(error)) => {
            tracing::debug!(%error, "forward refused");
            entry.end(session.shared(), Some(Err(&error)));
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
        None => entry.end(session.shared(), None),
    }
}

/// Connection inside the sandbox.
pub(super) struct Connection {
    answers: Forwarded,
    /// Takes the end of the channel that the bytes come from. Without it the connection is broken off.
    from: oneshot::Sender<Inputs>,
    /// Cancelled when all bytes of the channel were passed on.
    drained: CancellationToken,
}

/// Connects inside the sandbox.
pub(super) async fn connect(session: &Session, target: Target) -> Result<Connection> {
    let open = ForwardOpen { id: session.sandbox(), target: Some(target) };
    let (from, inputs) = oneshot::channel();
    let drained = CancellationToken::new();
    let input = upwards(inputs, drained.clone().drop_guard());
    let answers = session.shared().sandboxes.forward(session.team(), open, input).await?;
    Ok(Connection { answers, from, drained })
}

/// Bytes of a channel, once there is one. A channel that closes before the end of its bytes is an error, so
/// that the server sees a break.
fn upwards(
    inputs: oneshot::Receiver<Inputs>,
    drained: DropGuard,
) -> impl Stream<Item = Result<ForwardRequest>> + Send + Unpin {
    enum From {
        Asked(oneshot::Receiver<Inputs>),
        Open(Inputs),
    }
    let next = |from: Option<(From, DropGuard)>| async move {
        let (from, drained) = from?;
        let mut inputs = match from {
            From::Open(inputs) => inputs,
            From::Asked(inputs) => match inputs.await {
                Ok(inputs) => inputs,
                Err(_) => return Some((Err(left()), None)),
            },
        };
        loop {
            let (message, over) = match inputs.next().await {
                Some(Input::Data(bytes)) => (forward_request::Message::Data(bytes), false),
                Some(Input::Eof) => (forward_request::Message::Eof(true), true),
                Some(Input::Resize(_) | Input::Signal(_)) => continue,
                None => return Some((Err(left()), None)),
            };
            let request = ForwardRequest { message: Some(message) };
            let rest = (!over).then_some((From::Open(inputs), drained));
            return Some((Ok(request), rest));
        }
    };
    stream::unfold(Some((From::Asked(inputs), drained)), next).boxed()
}

fn left() -> Error {
    Error::new(Reason::ForwardLost, "the client has closed its channel")
}

/// End of a forward.
pub(super) enum Carried {
    /// Both directions have ended.
    Whole,
    /// Broke off, and why.
    Broken(Error),
    /// The client has closed the channel.
    Left,
}

impl Carried {
    /// Returns the end for the audit log.
    pub(super) fn audit(&self) -> Option<Result<(), &Error>> {
        match self {
            Self::Whole => Some(Ok(())),
            Self::Broken(error) => Some(Err(error)),
            Self::Left => None,
        }
    }
}

/// Carries bytes between a connection and a channel.
pub(super) async fn carry(
    connection: Connection,
    out: &ChannelWriteHalf<Msg>,
    inputs: Inputs,
) -> Carried {
    let Connection { mut answers, from, drained } = connection;
    let gone = inputs.gone();
    // A connection that has ended says so in its answers.
    drop(from.send(inputs));
    let down = async {
        let mut over = false;
        while let Some(answer) = answers.next().await {
            let sent = match answer.map(|answer| answer.message) {
                Ok(Some(forward_response::Message::Data(bytes))) if !bytes.is_empty() => {
                    out.data_bytes(bytes).await
                }
                Ok(Some(forward_response::Message::Eof(true))) => {
                    over = true;
                    out.eof().await
                }
                Ok(_) => Ok(()),
                Err(_) if gone.is_cancelled() => return Carried::Left,
                Err(error) => return Carried::Broken(error),
            };
            if sent.is_err() {
                return Carried::Left;
            }
        }
        if !over && out.eof().await.is_err() { Carried::Left } else { Carried::Whole }
    };
    let left = async {
        gone.cancelled().await;
        timeout(DRAIN, drained.cancelled()).await.ok();
        sleep(LINGER).await;
    };
    tokio::select! {
        carried = down => carried,
        () = left => Carried::Left,
    }
}

/// Closes the channel of a forward that has ended. One that broke is closed without an end of its bytes.
pub(super) async fn close(
    session: &Session,
    out: &ChannelWriteHalf<Msg>,
    gone: CancellationToken,
    carried: Option<Carried>,
) {
    let closing = async {
        if matches!(carried, Some(Carried::Whole)) {
            // In either case it is closed afterwards.
            timeout(CLOSE, gone.cancelled()).await.ok();
        }
        out.close().await
    };
    // A client that has gone need not be told.
    drop(session.until_closed(closing).await);
}
