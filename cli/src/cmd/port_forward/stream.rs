//! One connection of a forward: between this machine and a sandbox.

use std::{io, time::Duration};

use bytes::Bytes;
use proto::sandbox::v1::{
    ForwardOpen, ForwardRequest, ForwardResponse, forward_open::Target, forward_request,
    forward_response,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    client::{Controller, answer},
    failure::Failure,
};

/// Silence that counts as a broken connection: the controller sends a heartbeat every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// Most bytes of one message.
const CHUNK: usize = 64 * 1024;
/// Messages that wait to be sent; beyond them, the local end is not read.
const QUEUE: usize = 4;

/// Open connection.
#[derive(Debug)]
pub(super) struct Connection {
    to: mpsc::Sender<ForwardRequest>,
    from: Streaming<ForwardResponse>,
}

/// Connects to a server in a sandbox.
///
/// # Errors
/// When nothing listens there, or the call fails.
pub(super) async fn open(
    controller: &Controller,
    id: &str,
    target: Target,
) -> Result<Connection, Failure> {
    let (to, messages) = mpsc::channel(QUEUE);
    let open = ForwardOpen { id: id.to_owned(), target: Some(target) };
    let first = ForwardRequest { message: Some(forward_request::Message::Open(open)) };
    // The receiver lives, and there is room.
    to.try_send(first).ok();
    let mut client = controller.sandboxes.clone();
    let from = answer(client.forward(ReceiverStream::new(messages))).await?;
    Ok(Connection { to, from })
}

/// Outcome of a connection that did not fail.
#[derive(Debug)]
enum Ended {
    /// Both directions have ended.
    Whole,
    /// The local end has gone.
    Gone,
}

/// Reads the bytes of a local end, up to its end or an error, or until nobody takes them.
pub(super) fn pump(
    mut from: impl AsyncRead + Unpin + Send + 'static,
) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, bytes) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = tokio::select! {
                () = sender.closed() => return,
                read = from.read(&mut chunk) => read,
            };
            let read = match read {
                Ok(0) => return,
                Ok(length) => Ok(Bytes::copy_from_slice(&chunk[..length])),
                Err(error) => Err(error),
            };
            let broken = read.is_err();
            if sender.send(read).await.is_err() || broken {
                return;
            }
        }
    });
    bytes
}

impl Connection {
    /// Passes bytes both ways until both directions have ended, or the local end goes. One that goes before its
    /// end breaks the connection.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn carry(
        self,
        mut bytes: mpsc::Receiver<io::Result<Bytes>>,
        mut write: impl AsyncWrite + Unpin,
    ) -> Result<(), Failure> {
        let Self { to, mut from } = self;
        let up = async {
            while let Some(read) = bytes.recv().await {
                let Ok(bytes) = read else { return Ok::<_, Failure>(Ended::Gone) };
                let message = Some(forward_request::Message::Data(bytes));
                if to.send(ForwardRequest { message }).await.is_err() {
                    break;
                }
            }
            let message = Some(forward_request::Message::Eof(true));
            // A stream that has ended says why on its other half.
            to.send(ForwardRequest { message }).await.ok();
            std::future::pending().await
        };
        let down = async {
            loop {
                let Ok(response) = timeout(SILENCE, from.message()).await else {
                    return Err(Failure::deadline("the controller sent nothing", SILENCE));
                };
                let Some(response) = response? else { return Ok(Ended::Whole) };
                let passed = match response.message {
                    Some(forward_response::Message::Data(data)) if !data.is_empty() => {
                        match write.write_all(&data).await {
                            Ok(()) => write.flush().await,
                            failed => failed,
                        }
                    }
                    Some(forward_response::Message::Eof(true)) => write.shutdown().await,
                    // A heartbeat, the beginning, or a message of a later version.
                    _ => Ok(()),
                };
                // The local end has gone, and the connection goes with it.
                if passed.is_err() {
                    return Ok(Ended::Gone);
                }
            }
        };
        let ended = tokio::select! {
            ended = down => ended,
            ended = up => ended,
        };
        if matches!(ended, Ok(Ended::Gone)) {
            tokio::spawn(break_off(to));
        }
        ended.map(drop)
    }
}

/// Breaks a call. The end of its messages would be the end of the bytes; a second `open` is refused, which
/// ends the call with an error. After the end of the bytes nobody reads it.
async fn break_off(to: mpsc::Sender<ForwardRequest>) {
    let message = Some(forward_request::Message::Open(ForwardOpen::default()));
    timeout(SILENCE, to.send(ForwardRequest { message })).await.ok();
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::{super::abort, *};

    #[tokio::test]
    async fn reset_of_the_local_end_is_no_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        for reset in [true, false] {
            let client = TcpStream::connect(address).await.expect("connected");
            let (stream, _) = listener.accept().await.expect("accepted");
            if reset {
                abort(&client);
            }
            drop(client);
            let mut bytes = pump(stream);
            if reset {
                bytes.recv().await.expect("it is told").expect_err("a reset");
            }
            assert!(bytes.recv().await.is_none());
        }
    }
}
