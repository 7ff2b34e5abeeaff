//! A command's output on its way from its pipes or its terminal into the rings: while the command
//! runs, what is there when it ends, and what its background writes after that.

use std::{io, sync::Arc, time::Duration};

use rustix::event::{PollFd, PollFlags, poll};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::Receiver,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::session::{CHUNK, Session};

/// Bytes at a time once the command has ended: there may be many of these, for long.
const LATER_CHUNK: usize = 8 * 1024;
/// Bytes of one output that are still the command's when it has ended and something else goes on
/// writing: as many as a pipe can hold by default limits (`fs.pipe-max-size`).
const LEFT_MAX: usize = 1024 * 1024;
/// The same on a terminal: its buffers in the kernel hold less than 128 KiB, its relay's pipe 64.
const TERMINAL_LEFT_MAX: usize = 256 * 1024;
/// A terminal that says nothing for so long once its command has ended has said all.
const QUIET: Duration = Duration::from_millis(100);
/// And one that is never quiet has after this.
const TERMINAL_LEFT: Duration = Duration::from_secs(2);

/// Where output comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// A pipe of ours.
    Pipe(Receiver),
    /// A pipe of ours too, from the relay of a terminal.
    Terminal(Receiver),
}

impl Source {
    /// What comes next; 0 at the end, when nobody can write to it any more.
    async fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (Self::Pipe(pipe) | Self::Terminal(pipe)) = self;
        pipe.read(bytes).await
    }
}

/// Passes an output on until the command has ended, and then what is there by then. Returns the
/// source if something else can still write to it.
pub(super) async fn pump(
    session: &Session,
    output: usize,
    mut source: Source,
    ended: &CancellationToken,
) -> io::Result<Option<Source>> {
    let mut chunk = vec![0; usize::try_from(CHUNK).unwrap_or_default()];
    let turn = async {
        loop {
            let room = session.room(output).await;
            let read = source.read(&mut chunk[..room]).await?;
            if read == 0 {
                return Ok::<_, io::Error>(());
            }
            session.write(output, &chunk[..read])?;
        }
    };
    // Nothing is lost when it is dropped: what is read is written at once.
    tokio::select! {
        biased;
        () = ended.cancelled() => {}
        closed = turn => return closed.map(|()| None),
    }
    // Whoever is attached and does not read holds nothing up: the rings have room for this.
    let open = match &mut source {
        Source::Pipe(pipe) => empty_pipe(session, output, pipe, &mut chunk)?,
        Source::Terminal(terminal) => empty_terminal(session, output, terminal, &mut chunk).await?,
    };
    Ok(open.then_some(source))
}

/// Takes what is in a pipe now. True when somebody can still write to it.
fn empty_pipe(
    session: &Session,
    output: usize,
    pipe: &Receiver,
    chunk: &mut [u8],
) -> io::Result<bool> {
    // The kernel is asked, not the runtime, which may not have heard of the last bytes.
    let filled = rustix::io::ioctl_fionread(pipe)?;
    let mut left = usize::try_from(filled).unwrap_or(usize::MAX).min(LEFT_MAX);
    loop {
        let mut fd = [PollFd::new(pipe, PollFlags::IN)];
        poll(&mut fd, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let nobody_writes = fd[0].revents().contains(PollFlags::HUP);
        let most = if nobody_writes { chunk.len() } else { left.min(chunk.len()) };
        if most == 0 {
            return Ok(true);
        }
        match rustix::io::read(pipe, &mut chunk[..most]) {
            Ok(0) => return Ok(false),
            Ok(read) => {
                left = left.saturating_sub(read);
                session.write(output, &chunk[..read])?;
            }
            Err(rustix::io::Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The same for a terminal, where nobody can tell how much it and its relay hold: until it is quiet,
/// or more has come than they can have held.
async fn empty_terminal(
    session: &Session,
    output: usize,
    terminal: &mut Receiver,
    chunk: &mut [u8],
) -> io::Result<bool> {
    let (begun, mut taken) = (Instant::now(), 0);
    while taken < TERMINAL_LEFT_MAX && begun.elapsed() < TERMINAL_LEFT {
        match timeout(QUIET, terminal.read(chunk)).await {
            Ok(Ok(0)) => return Ok(false),
            Ok(Ok(read)) => {
                taken += read;
                session.write(output, &chunk[..read])?;
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => break,
        }
    }
    Ok(true)
}

/// Takes what the background of a command that has ended writes, for as long as it does: whoever
/// writes to what nobody reads is killed at that. It goes into the ring of a command that its caller
/// can ask for by name; of another it is dropped.
pub(super) async fn follow(session: Arc<Session>, output: usize, mut source: Source) {
    let mut chunk = vec![0; LATER_CHUNK];
    loop {
        let most = match session.title.keep {
            true => session.room_after_end(output).await.min(chunk.len()),
            false => chunk.len(),
        };
        match source.read(&mut chunk[..most]).await {
            Ok(0) => return,
            Ok(read) if session.title.keep => {
                if let Err(error) = session.write(output, &chunk[..read]) {
                    tracing::warn!(%error, "output of a background process was lost");
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "output of a background process cannot be read");
                return;
            }
        }
    }
}
