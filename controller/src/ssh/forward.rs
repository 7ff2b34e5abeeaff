//! Forwards: an SSH channel to a server inside the sandbox, on its loopback or a unix socket.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::BytesMut;
use proto::id::Invalid;
use russh::{
    ChannelOpenFailure, ChannelWriteHalf,
    server::{ChannelOpenHandle, Msg},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::timeout,
};

use super::{
    inputs::{Input, Inputs},
    record::Action,
    session::Session,
};
use crate::sandbox::{Error, ForwardTarget, Result};

/// Bytes that are read at once: a packet of a channel.
const CHUNK: usize = 32 * 1024;
/// Time in which a client may be the first to close a channel whose directions have ended: russh forgets such
/// a channel, and keeps others to the end of the connection.
const CLOSE: Duration = Duration::from_secs(1);

/// Parses the target of a TCP forward: a port of the sandbox itself, under one of its own names.
pub(super) fn tcp(session: &Session, host: &str, port: u32) -> Result<ForwardTarget, Invalid> {
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
    port.to_string().parse().map(ForwardTarget::Tcp)
}

/// Connects, answers the client, and carries bytes until both directions have ended.
pub(super) async fn run(
    session: Arc<Session>,
    target: Result<ForwardTarget, Invalid>,
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
        let sandboxes = &session.shared().sandboxes;
        sandboxes.forward(session.team(), &session.sandbox(), target).await
    });
    match session.until_closed(connected).await {
        Some(Ok(stream)) => {
            session.kept.fetch_add(1, Ordering::Relaxed);
            reply.accept().await;
            let gone = inputs.gone();
            let carried = session.until_closed(carry(stream, &out, inputs)).await;
            entry.end(session.shared(), carried.map(|()| Ok(())));
            drop(permit);
            let closing = async {
                // In either case it is closed afterwards.
                timeout(CLOSE, gone.cancelled()).await.ok();
                out.close().await
            };
            // A client that has gone need not be told.
            drop(session.until_closed(closing).await);
        }
        Some(Err(error)) => {
            tracing::debug!(%error, "forward refused");
            entry.end(session.shared(), Some(Err(&error)));
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
        None => entry.end(session.shared(), None),
    }
}

async fn carry(stream: DuplexStream, out: &ChannelWriteHalf<Msg>, mut inputs: Inputs) {
    let (mut from, mut to) = tokio::io::split(stream);
    // Ends with an error when the client closes the channel: then the other direction ends, too.
    let up = async {
        loop {
            match inputs.next().await {
                Some(Input::Data(bytes)) => {
                    // A server that takes no more may still have something to say.
                    if to.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
                Some(Input::Eof) => {
                    drop(to.shutdown().await);
                    break;
                }
                Some(Input::Resize(_) | Input::Signal(_)) => {}
                None => return Err(()),
            }
        }
        Ok(())
    };
    let down = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match from.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => out.data_bytes(buffer.split().freeze()).await.map_err(|_| ())?,
            }
        }
        out.eof().await.map_err(|_| ())
    };
    // Either way both are over.
    tokio::try_join!(up, down).ok();
}
