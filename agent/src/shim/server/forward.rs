//! Byte streams between an agent and a server in the sandbox. The helper's process connects inside and
//! passes bytes over its pipes; nothing is kept here, and nobody attaches again.
//!
//! Both directions have credit: at most [`WINDOW`] pieces are under way, so both ends read the
//! conversation at all times, and a stalled direction holds up neither the other nor the end.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use bytes::Bytes;
use daemon::sync::Mutex;
use futures_util::StreamExt;
use prost::Message as _;
use proto::{
    Reason,
    sandbox::v1::{ExecExit, ExecInfo},
    shim::v1::{self as wire, request, response},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::{Receiver, Sender},
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Shim, WORD,
    attached::say,
    refusals::{Refused, refused, why},
};
use crate::shim::{
    FORWARD_WINDOW as WINDOW,
    frames::Frames,
    helper::{Ended, Ends, Spawned, Third},
    session::CHUNK,
    tree::Tree,
};

/// Most forwards of a sandbox at the same time: as many as a controller opens streams to one.
const FORWARDS_MAX: usize = 128;
/// Longest silence of the pipe of a forward that has ended, before its rest counts as read.
const LEFT: Duration = Duration::from_secs(1);
/// Time that the helper's process has to end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// Forwards that are open.
#[derive(Debug, Default)]
pub(super) struct Forwards(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// Time of the last byte of each.
    active: BTreeMap<u64, Instant>,
}

/// Place of a forward; released on drop.
#[derive(Debug)]
struct Place {
    forwards: Arc<Forwards>,
    number: u64,
}

impl Forwards {
    fn take(self: &Arc<Self>) -> Option<Place> {
        let mut open = self.0.lock();
        if open.active.len() >= FORWARDS_MAX {
            return None;
        }
        open.next += 1;
        let number = open.next;
        open.active.insert(number, Instant::now());
        Some(Place { forwards: Arc::clone(self), number })
    }

    /// Describes the forwards as commands without a start: they are not listed, and count as uses while
    /// bytes pass.
    pub(super) fn infos(&self) -> Vec<ExecInfo> {
        let open = self.0.lock();
        let info = |(number, active): (&u64, &Instant)| ExecInfo {
            exec_id: format!("forward-{number}"),
            inactive: prost_types::Duration::try_from(active.elapsed()).ok(),
            ..ExecInfo::default()
        };
        open.active.iter().map(info).collect()
    }
}

impl Place {
    fn touch(&self) {
        self.forwards.0.lock().active.insert(self.number, Instant::now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.forwards.0.lock().active.remove(&self.number);
    }
}

/// Open byte stream.
struct Stream {
    place: Place,
    stdin: Sender,
    stdout: Receiver,
    /// Closed with the stream, before stdin: so the helper's process learns that nobody is there, and not that
    /// the caller's half has ended.
    stderr: Option<Receiver>,
    exit: oneshot::Receiver<Ended>,
    tree: Tree,
}

impl Shim {
    /// Opens a forward and carries it to its end.
    pub(super) async fn forward(
        self: &Arc<Self>,
        forward: wire::Forward,
        mut frames: Frames,
    ) -> io::Result<()> {
        match self.open(forward).await {
            Ok(stream) => stream.carry(frames).await,
            Err(refused) => say(&mut frames, response::Message::Refused(refused)).await,
        }
    }

    /// Opens a forward. Answers at the latest [`WORD`] after its deadline; one that opens later is closed.
    async fn open(self: &Arc<Self>, forward: wire::Forward) -> Result<Stream, Refused> {
        let place = self.forwards.take().ok_or_else(|| {
            let message = format!("{FORWARDS_MAX} connections into this sandbox are open already");
            refused(Reason::TooManyCalls, message)
        })?;
        let deadline = Instant::now() + super::left(forward.start_by_ms) + WORD;
        let (tell, told) = oneshot::channel();
        let shim = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(Ok(stream)) = tell.send(shim.connect(forward, place).await) {
                stream.end().await;
            }
        });
        match timeout_at(deadline, told).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(_)) | Err(_) => Err(refused(
                Reason::ForwardRefused,
                "the sandbox has not said whether it is connected; it is frozen or overloaded",
            )),
        }
    }

    async fn connect(
        self: &Arc<Self>,
        forward: wire::Forward,
        place: Place,
    ) -> Result<Stream, Refused> {
        let wire::Forward { order, mark, start_by_ms } = forward;
        let helper =
            self.helper_by(start_by_ms).await.map_err(|not_started| not_started.refused)?;
        let spawned = helper.spawn(&order, None, start_by_ms).await;
        let Spawned { ends, leader, exit, never_ran: _ } =
            spawned.map_err(|failure| why(failure).refused)?;
        let Ends { stdin, stdout, third } = ends;
        let stderr = match third {
            Third::Stderr(stderr) => Some(stderr),
            Third::Sizes(_) => None,
        };
        let tree = Tree { host: Arc::clone(&self.host), leader, mark };
        Ok(Stream { place, stdin, stdout, stderr, exit, tree })
    }
}

impl Stream {
    /// Passes bytes both ways until both directions have ended, the connection breaks, or the agent goes.
    async fn carry(self, frames: Frames) -> io::Result<()> {
        let Self { place, stdin, mut stdout, stderr, mut exit, tree } = self;
        let (mut to, mut from) = frames.split();
        let mut stdin = Some(stdin);
        let (queue, pieces) = mpsc::channel(WINDOW);
        let (ack, mut acks) = mpsc::channel(WINDOW);
        let credit = Semaphore::new(WINDOW);
        let mut exited = false;
        let out = async {
            say(&mut to, response::Message::Started(wire::Started::default())).await?;
            let mut chunk = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
            let (mut open, mut ended) = (true, None);
            loop {
                if !open && let Some(how) = &ended {
                    return say(&mut to, last(how)).await;
                }
                let idle = open && ended.is_some() && credit.available_permits() > 0;
                let message = tokio::select! {
                    biased;
                    Some(()) = acks.recv() => response::Message::Done(wire::Done::default()),
                    read = pull(&mut stdout, &credit, &mut chunk), if open => match read {
                        Ok(read) if read > 0 => {
                            place.touch();
                            response::Message::Stdout(Bytes::copy_from_slice(&chunk[..read]))
                        }
                        Ok(_) | Err(_) => {
                            open = false;
                            response::Message::Eof(true)
                        }
                    },
                    how = &mut exit, if ended.is_none() => {
                        ended = Some(how);
                        exited = true;
                        continue;
                    }
                    // Another process of the sandbox holds the pipe.
                    () = sleep(LEFT), if idle => {
                        open = false;
                        continue;
                    }
                };
                say(&mut to, message).await?;
            }
        };
        let done = tokio::select! {
            biased;
            () = heed(&mut from, queue, &credit) => Ok(()),
            () = feed(&mut stdin, pieces, ack, &place) => Ok(()),
            done = out => done,
        };
        // First what tells a break: the end of stdin alone is the end of the caller's half.
        drop(stderr);
        drop((stdin, stdout));
        if !exited {
            end(exit, tree).await;
        }
        drop(place);
        done
    }

    /// Closes a stream that nobody waits for.
    async fn end(self) {
        let Self { place, stdin, stdout, stderr, exit, tree } = self;
        drop(stderr);
        drop((stdin, stdout));
        end(exit, tree).await;
        drop(place);
    }
}

/// Reads from the pipe once there is credit. Dropping the future loses neither bytes nor credit.
async fn pull(from: &mut Receiver, credit: &Semaphore, chunk: &mut [u8]) -> io::Result<usize> {
    let permit = credit.acquire().await.map_err(io::Error::other)?;
    let read = from.read(chunk).await?;
    permit.forget();
    Ok(read)
}

/// Handles the agent's messages until it goes or breaks the protocol.
async fn heed(
    from: &mut (impl futures_util::Stream<Item = io::Result<bytes::BytesMut>> + Unpin),
    queue: mpsc::Sender<wire::Stdin>,
    credit: &Semaphore,
) {
    while let Some(Ok(frame)) = from.next().await {
        let Ok(request) = wire::Request::decode(frame.freeze()) else { return };
        match request.message {
            Some(request::Message::Stdin(stdin)) => {
                // An agent keeps to its window.
                if queue.try_send(stdin).is_err() {
                    return;
                }
            }
            Some(request::Message::Taken(wire::Taken { pieces })) => {
                let pieces = usize::try_from(pieces).unwrap_or(WINDOW);
                if credit.available_permits() + pieces > WINDOW {
                    return;
                }
                credit.add_permits(pieces);
            }
            Some(request::Message::HangUp(_)) => return,
            Some(_) | None => {}
        }
    }
}

/// Writes the agent's bytes to the pipe. Returns never: when the pipe is closed, bytes are dropped until
/// the stream ends.
async fn feed(
    stdin: &mut Option<Sender>,
    mut pieces: mpsc::Receiver<wire::Stdin>,
    ack: mpsc::Sender<()>,
    place: &Place,
) {
    while let Some(wire::Stdin { data, eof, .. }) = pieces.recv().await {
        ack.send(()).await.ok();
        place.touch();
        if let Some(pipe) = stdin.as_mut()
            && (pipe.write_all(&data).await.is_err() || eof)
        {
            *stdin = None;
        }
    }
    std::future::pending().await
}

/// Waits for the helper's process, which ends by itself once its pipes are closed; kills it otherwise.
async fn end(mut exit: oneshot::Receiver<Ended>, tree: Tree) {
    if timeout(GRACE, &mut exit).await.is_err() {
        tree.end().await;
    }
}

/// Builds the last message.
fn last(how: &Result<Ended, oneshot::error::RecvError>) -> response::Message {
    let lost = |why: &str| response::Message::Refused(refused(Reason::ForwardLost, why));
    match how {
        Ok(Ok((0, 0))) => response::Message::Exit(ExecExit::default()),
        Ok(Ok((_, 0))) => lost("the server in the sandbox broke the connection off"),
        Ok(Ok(_)) => lost("what carried the connection inside the sandbox was killed"),
        Ok(Err(why)) => lost(why),
        Err(_) => lost("what carried the connection inside the sandbox was killed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let forwards = Arc::new(Forwards::default());
        let held: Vec<_> = std::iter::from_fn(|| forwards.take()).collect();
        assert_eq!((held.len(), forwards.infos().len()), (FORWARDS_MAX, FORWARDS_MAX));
        drop(held);
        assert!(forwards.infos().is_empty() && forwards.take().is_some());
    }

    #[tokio::test]
    async fn credit_is_not_lost_with_a_read_that_is_given_up() {
        let (_write, mut read) = tokio::net::unix::pipe::pipe().expect("a pipe");
        let credit = Semaphore::new(1);
        for _ in 0..3 {
            let pulled = timeout(Duration::ZERO, pull(&mut read, &credit, &mut [0; 8])).await;
            pulled.expect_err("nothing was written");
        }
        assert_eq!(credit.available_permits(), 1);
    }
}
