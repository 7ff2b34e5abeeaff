//! One direction of a connection: bytes arrive in order, late if the road is slow, and not at all
//! while it is held up.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep, sleep_until},
};

use crate::chance::Chance;

/// Bytes in transit after which the writer must wait.
const ROOM: usize = 256 * 1024;
/// Longest time, in milliseconds, until a connection notices that its road is open again.
const RETRY_MS: u64 = 20_000;
/// Bytes of a connection that are kept for a replay.
const KEPT: usize = 256 * 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One direction between two hosts, which all their connections share.
#[derive(Debug)]
pub(crate) struct Road {
    chance: Chance,
    state: Mutex<Condition>,
}

#[derive(Debug, Default)]
struct Condition {
    held: bool,
    delay_ms: u64,
    waiting: Vec<Waker>,
}

impl Road {
    pub(crate) fn new(chance: Chance) -> Self {
        Self { chance, state: Mutex::default() }
    }

    /// Sets the longest delay of a piece. Each connection keeps its order, but pieces on different
    /// connections overtake each other.
    pub(crate) fn delay(&self, ms: u64) {
        lock(&self.state).delay_ms = ms;
    }

    /// Holds up all traffic, or lets it pass again. Held pieces then arrive when their connection
    /// retries, as in TCP, and so possibly after pieces on a newer connection.
    pub(crate) fn hold(&self, held: bool) {
        let mut state = lock(&self.state);
        state.held = held;
        for waker in state.waiting.drain(..) {
            waker.wake();
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        !lock(&self.state).held
    }

    fn poll_open(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = lock(&self.state);
        if !state.held {
            return Poll::Ready(());
        }
        state.waiting.push(cx.waker().clone());
        Poll::Pending
    }

    fn resumes(&self) -> Duration {
        Duration::from_millis(self.chance.below(RETRY_MS))
    }

    fn travel(&self) -> Duration {
        let delay_ms = lock(&self.state).delay_ms;
        let ms = if delay_ms == 0 { 0 } else { self.chance.below(delay_ms) };
        Duration::from_millis(ms)
    }

    /// Waits for the travel time of a packet.
    pub(crate) async fn passes(&self) {
        std::future::poll_fn(|cx| self.poll_open(cx)).await;
        sleep(self.travel()).await;
    }
}

/// Data that was written to a connection, in its original pieces.
pub(crate) type Recording = Arc<Mutex<Vec<Vec<u8>>>>;

#[derive(Debug, Default)]
struct Flow {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// Number of bytes of the first piece that were read.
    read: usize,
    closed: bool,
    abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Flow {
    fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }
}

/// Writing end of a pipe.
#[derive(Debug)]
pub(crate) struct Writer {
    flow: Arc<Mutex<Flow>>,
    road: Arc<Road>,
    recording: Option<Recording>,
}

/// Reading end of a pipe.
#[derive(Debug)]
pub(crate) struct Reader {
    flow: Arc<Mutex<Flow>>,
    road: Arc<Road>,
    sleep: Option<Pin<Box<Sleep>>>,
    /// Whether the last poll found the road held up.
    held: bool,
    /// Time before which nothing arrives.
    resumes: Instant,
}

/// Creates a pipe over a road; writes are also added to `recording`, if there is one.
pub(crate) fn pipe(road: &Arc<Road>, recording: Option<Recording>) -> (Writer, Reader) {
    let flow = Arc::<Mutex<Flow>>::default();
    let writer = Writer { flow: Arc::clone(&flow), road: Arc::clone(road), recording };
    let (road, resumes) = (Arc::clone(road), Instant::now());
    (writer, Reader { flow, road, sleep: None, held: false, resumes })
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut flow = lock(&self.flow);
        flow.closed = true;
        flow.wake_reader();
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut flow = lock(&self.flow);
        flow.abandoned = true;
        flow.wake_writer();
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut flow = lock(&self.flow);
        if flow.abandoned {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if flow.bytes >= ROOM {
            flow.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(recording) = &self.recording {
            let mut kept = lock(recording);
            // A recording with a gap is useless, so pieces are only dropped at the end.
            if kept.iter().map(Vec::len).sum::<usize>() < KEPT {
                kept.push(bytes.to_vec());
            }
        }
        let now = Instant::now() + self.road.travel();
        let at = flow.pieces.back().map_or(now, |(before, _)| now.max(*before));
        flow.pieces.push_back((at, bytes.to_vec()));
        flow.bytes += bytes.len();
        flow.wake_reader();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut flow = lock(&self.flow);
        flow.closed = true;
        flow.wake_reader();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.road.poll_open(cx).is_pending() {
                self.held = true;
                return Poll::Pending;
            }
            if std::mem::take(&mut self.held) {
                self.resumes = Instant::now() + self.road.resumes();
            }
            let resumes = self.resumes;
            let flow = Arc::clone(&self.flow);
            let mut flow = lock(&flow);
            let Some(at) = flow.pieces.front().map(|(at, _)| resumes.max(*at)) else {
                if flow.closed {
                    return Poll::Ready(Ok(()));
                }
                flow.reader = Some(cx.waker().clone());
                return Poll::Pending;
            };
            if at > Instant::now() {
                drop(flow);
                let sleep = self.sleep.insert(Box::pin(sleep_until(at)));
                std::task::ready!(sleep.as_mut().poll(cx));
                continue;
            }
            let from = flow.read;
            let (_, piece) = flow.pieces.front().expect("there is one");
            let some = buffer.remaining().min(piece.len() - from);
            buffer.put_slice(&piece[from..from + some]);
            if from + some == piece.len() {
                flow.pieces.pop_front();
                flow.read = 0;
            } else {
                flow.read += some;
            }
            flow.bytes -= some;
            flow.wake_writer();
            return Poll::Ready(Ok(()));
        }
    }
}
