//! Byte stream below SSH, with a gate: how much of a client's bytes may wait here, and the end from outside.
//!
//! russh grants a client more of a channel's window as soon as bytes have arrived, whether or not anybody
//! has taken them. So the bytes that wait are counted here, for all channels of a connection. Above
//! [`CROWDED`] the windows shrink to nearly nothing and reading slows down; above [`FULL`] nothing is read.
//! Output to the client always goes on, so that a command that writes before it reads is not stuck.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use daemon::sync::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// Bytes that wait from which on a client is slowed down: a window of one channel.
pub(super) const CROWDED: usize = 1024 * 1024;
/// Bytes that wait from which on nothing more is read.
pub(super) const FULL: usize = 8 * CROWDED;
/// Pause before each read while the connection is crowded.
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct State {
    /// Bytes that were received and not taken yet.
    waiting: usize,
    is_shut: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// State that the stream and the channels of a connection share.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<State>);

impl Gate {
    /// Counts bytes that were received.
    pub(super) fn put(&self, bytes: usize) {
        self.0.lock().waiting += bytes;
    }

    /// Counts bytes that were taken.
    pub(super) fn take(&self, bytes: usize) {
        let mut state = self.0.lock();
        state.waiting = state.waiting.saturating_sub(bytes);
        let reader = if state.waiting < FULL { state.reader.take() } else { None };
        drop(state);
        reader.into_iter().for_each(Waker::wake);
    }

    /// Returns true while so much waits that the client is slowed down.
    pub(super) fn is_crowded(&self) -> bool {
        self.0.lock().waiting >= CROWDED
    }

    /// Ends the connection: every read and write fails from now on.
    pub(super) fn shut(&self) {
        let mut state = self.0.lock();
        state.is_shut = true;
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// Waits with a read while too much waits; an error once the connection is shut.
    fn poll_read(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        if state.is_shut {
            return Poll::Ready(Err(shut()));
        }
        state.reader = Some(cx.waker().clone());
        if state.waiting >= FULL { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn check_write(&self, cx: &Context<'_>) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.is_shut {
            return Err(shut());
        }
        state.writer = Some(cx.waker().clone());
        Ok(())
    }
}

fn shut() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

/// Stream with its gate.
#[derive(Debug)]
pub(super) struct Transport<S> {
    stream: S,
    gate: Arc<Gate>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<S> Transport<S> {
    pub(super) fn new(stream: S, gate: Arc<Gate>) -> Self {
        Self { stream, gate, pause: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Transport<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.gate.poll_read(cx))?;
        if self.gate.is_crowded() {
            let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
            ready!(pause.as_mut().poll(cx));
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if read.is_ready() {
            self.pause = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Transport<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.gate.check_write(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.gate.check_write(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn full_connection_reads_again_once_something_is_taken() {
        let (mut far, near) = tokio::io::duplex(64);
        let gate = Arc::<Gate>::default();
        let mut transport = Transport::new(near, gate.clone());
        far.write_all(b"ab").await.expect("written");
        gate.put(FULL);
        let second = Duration::from_secs(1);
        timeout(second, transport.read_u8()).await.expect_err("nothing is read");
        transport.write_all(b"x").await.expect("what goes out goes on");
        gate.take(FULL - CROWDED);
        assert_eq!(
            timeout(second, transport.read_u8()).await.expect("in time").expect("read"),
            b'a'
        );
        gate.take(CROWDED);
        assert_eq!(transport.read_u8().await.expect("read"), b'b');
    }

    #[tokio::test]
    async fn shut_ends_reads_and_writes_that_wait() {
        let (_far, near) = tokio::io::duplex(4);
        let gate = Arc::<Gate>::default();
        let (mut reader, mut writer) = tokio::io::split(Transport::new(near, gate.clone()));
        let both = tokio::spawn(async move {
            tokio::join!(reader.read_u8(), writer.write_all(b"more than fits"))
        });
        tokio::task::yield_now().await;
        gate.shut();
        let (read, written) = both.await.expect("ended");
        assert!(read.is_err() && written.is_err());
    }
}
