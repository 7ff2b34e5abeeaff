//! One connection of a forward: between this machine and a sandbox.

use std::time::Duration;

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

/// Reads the bytes of a local end, up to its end or until nobody takes them.
pub(super) fn pump(mut from: impl AsyncRead + Unpin + Send + 'static) -> mpsc::Receiver<Bytes> {
    let (sender, bytes) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = tokio::select! {
                () = sender.closed() => return,
                read = from.read(&mut chunk) => read,
            };
            let Ok(length @ 1..) = read else { return };
            if sender.send(Bytes::copy_from_slice(&chunk[..length])).await.is_err() {
                return;
            }
        }
    });
    bytes
}

impl Connection {
    /// Passes bytes both ways until both directions have ended, or the local end goes.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn carry(
        self,
        mut bytes: mpsc::Receiver<Bytes>,
        mut write: impl AsyncWrite + Unpin,
    ) -> Result<(), Failure> {
        let Self { to, mut from } = self;
        let up = async {
            while let Some(bytes) = bytes.recv().await {
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
                let Some(response) = response? else { return Ok(()) };
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
                    return Ok(());
                }
            }
        };
        tokio::select! {
            ended = down => ended,
            ended = up => ended,
        }
    }
}
