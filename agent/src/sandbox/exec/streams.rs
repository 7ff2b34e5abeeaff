//! The bytes of a command: from its outputs to the caller, from the caller to its stdin. Every
//! buffer is bounded: a caller that does not read stops the command at its next write, and nothing
//! else.

use std::{collections::VecDeque, io, os::fd::AsFd, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::order::{Input, Output, Window};
use crate::{run::Terminal, sandbox::Error};

/// Bytes that one message holds at most.
const CHUNK: usize = 32 * 1024;
/// Bytes for a stdin that does not take them. While there are more, nothing further is received.
const PENDING_MAX: usize = 256 * 1024;
/// End of file, typed on a terminal.
const EOT: &[u8] = b"\x04";

/// Where output goes.
pub(super) type Sender = mpsc::Sender<Result<Output, Error>>;

/// Passes a pipe on to its end. Once the command has ended (`ended`), only what is in the pipe by
/// then: something that it left in the background may hold the other end open for ever.
pub(super) async fn pump<R: AsyncRead + AsFd + Unpin>(
    mut from: R,
    as_output: fn(Bytes) -> Output,
    to: Sender,
    ended: CancellationToken,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        tokio::select! {
            biased;
            () = ended.cancelled() => break,
            read = from.read_buf(&mut buffer) => {
                if read? == 0 {
                    return Ok(());
                }
                if to.send(Ok(as_output(buffer.split().freeze()))).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
    // The kernel is asked, not the runtime, which may not have heard of the last bytes yet.
    let mut left = rustix::io::ioctl_fionread(&from)?;
    while left > 0 {
        let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        match rustix::io::read(&from, &mut chunk) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
            Ok(read) => {
                left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
                chunk.truncate(read);
                if to.send(Ok(as_output(chunk.into()))).await.is_err() {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Passes a terminal on to its end, which comes with the end of `lxc-attach`, the only one on it:
/// what runs inside is on another, of the container's own.
pub(super) async fn pump_terminal(mut from: Terminal, to: Sender) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        if from.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        if to.send(Ok(Output::Stdout(buffer.split().freeze()))).await.is_err() {
            return Ok(());
        }
    }
}

/// What the input of a command acts on.
pub(super) trait Target: Send {
    /// Bytes go here.
    type Stdin: AsyncWrite + Unpin + Send;

    /// The way to its stdin.
    fn stdin(&mut self) -> Option<&mut Self::Stdin>;

    /// No more bytes will come, and all have been written.
    fn close(&mut self) -> impl Future<Output = ()> + Send;

    /// The terminal's new size.
    fn resize(&self, window: Window);
}

/// The stdin of a command with pipes.
#[derive(Debug)]
pub(super) struct Pipe(pub(super) Option<tokio::process::ChildStdin>);

impl Target for Pipe {
    type Stdin = tokio::process::ChildStdin;

    fn stdin(&mut self) -> Option<&mut Self::Stdin> {
        self.0.as_mut()
    }

    async fn close(&mut self) {
        self.0 = None;
    }

    fn resize(&self, _: Window) {}
}

/// The keyboard of a command on a terminal.
#[derive(Debug)]
pub(super) struct Keyboard {
    /// Our end of it.
    pub(super) terminal: Terminal,
    /// End of file has been typed.
    pub(super) closed: bool,
}

impl Target for Keyboard {
    type Stdin = Terminal;

    fn stdin(&mut self) -> Option<&mut Terminal> {
        (!self.closed).then_some(&mut self.terminal)
    }

    async fn close(&mut self) {
        if !self.closed {
            self.closed = true;
            // Nobody may be reading any more.
            drop(timeout(Duration::from_secs(1), self.terminal.write_all(EOT)).await);
        }
    }

    fn resize(&self, window: Window) {
        if let Err(error) = self.terminal.resize(window) {
            tracing::debug!(%error, "a terminal kept its size");
        }
    }
}

/// Feeds a command until it has ended. Signals and sizes overtake bytes that it does not read.
pub(super) async fn feed<T: Target>(
    mut input: mpsc::Receiver<Input>,
    mut to: T,
    signals: mpsc::Sender<i32>,
    ended: CancellationToken,
) {
    let (mut pending, mut size) = (VecDeque::<Bytes>::new(), 0usize);
    let (mut open, mut eof) = (true, false);
    loop {
        if eof && pending.is_empty() {
            to.close().await;
        }
        if !open && pending.is_empty() {
            return;
        }
        let written = async {
            match (to.stdin(), pending.front()) {
                (Some(stdin), Some(bytes)) => stdin.write(bytes).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            received = input.recv(), if open && size < PENDING_MAX => match received {
                Some(Input::Stdin(bytes)) if !eof && !bytes.is_empty() => {
                    size += bytes.len();
                    pending.push_back(bytes);
                }
                Some(Input::Stdin(_)) => {}
                Some(Input::Eof) => eof = true,
                Some(Input::Resize(window)) => to.resize(window),
                Some(Input::Signal(number)) => {
                    if signals.try_send(number).is_err() {
                        tracing::debug!(number, "too many signals wait: one was dropped");
                    }
                }
                None => (open, eof) = (false, true),
            },
            written = written => match written {
                Ok(bytes) => {
                    size -= bytes;
                    if let Some(front) = pending.front_mut() {
                        front.advance(bytes);
                    }
                    while pending.front().is_some_and(Bytes::is_empty) {
                        pending.pop_front();
                    }
                }
                // It reads no more; what comes is dropped.
                Err(_) => {
                    to.close().await;
                    (pending, size, eof) = (VecDeque::new(), 0, true);
                }
            },
        }
    }
}
