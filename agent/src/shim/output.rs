//! Moves a command's output from its pipes or its terminal into the rings: while the command runs,
//! what remains when it ends, and what its background processes write after that.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::read,
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::Receiver,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::session::{CHUNK, Session};

/// Buffer size once the command has ended, in bytes: many of these buffers may exist for a long
/// time.
const LATER_CHUNK: usize = 8 * 1024;
/// Most bytes of one output that still belong to a command that has ended, while another process
/// continues to write: as many as a pipe can hold by default limits (`fs.pipe-max-size`).
const LEFT_MAX: usize = 1024 * 1024;
/// Same limit for a terminal: its buffers in the kernel hold less than 128 KiB, its relay's pipe 64
/// KiB.
const TERMINAL_LEFT_MAX: usize = 256 * 1024;
/// Silence of a terminal, after its command has ended, that means that no output remains.
const QUIET: Duration = Duration::from_millis(100);
/// Time after which a terminal that is never silent is read no more.
const TERMINAL_LEFT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) enum Source {
    Pipe(Receiver),
    /// Pipe of a terminal's relay.
    Terminal(Receiver),
}

impl Source {
    /// Reads the next bytes; 0 at the end, when nobody can write any more.
    async fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (Self::Pipe(pipe) | Self::Terminal(pipe)) = self;
        pipe.read(bytes).await
    }
}

/// Reads an output until the command has ended, and then what remains of it. Returns the source if
/// another process can still write to it.
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
    // Dropping this future loses nothing: bytes are written as soon as they are read.
    tokio::select! {
        biased;
        () = ended.cancelled() => {}
        closed = turn => return closed.map(|()| None),
    }
    // An attachment that does not read blocks nothing here: the rings have room for this.
    let open = match &mut source {
        Source::Pipe(pipe) => empty_pipe(session, output, pipe, &mut chunk)?,
        Source::Terminal(terminal) => empty_terminal(session, output, terminal, &mut chunk).await?,
    };
    Ok(open.then_some(source))
}

/// Reads what is in a pipe now. True when somebody can still write to it.
fn empty_pipe(
    session: &Session,
    output: usize,
    pipe: &Receiver,
    chunk: &mut [u8],
) -> io::Result<bool> {
    // Ask the kernel: the runtime may not know of the last bytes yet.
    let filled = rustix::io::ioctl_fionread(pipe)?;
    let mut left = usize::try_from(filled).unwrap_or(usize::MAX).min(LEFT_MAX);
    loop {
        let mut fd = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        poll(&mut fd, PollTimeout::ZERO)?;
        let nobody_writes =
            fd[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
        let most = if nobody_writes { chunk.len() } else { left.min(chunk.len()) };
        if most == 0 {
            return Ok(true);
        }
        match read(pipe, &mut chunk[..most]) {
            Ok(0) => return Ok(false),
            Ok(read) => {
                left = left.saturating_sub(read);
                session.write(output, &chunk[..read])?;
            }
            Err(Errno::EAGAIN) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Does the same for a terminal, where nobody can tell how much it and its relay hold: reads until
/// it is silent, or until more has come than they can have held.
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

/// Reads what the background processes of an ended command write, as long as they do: a process
/// that writes to a pipe without a reader is killed. The output goes into the ring if the caller
/// can ask for the command by exec_id; otherwise it is dropped.
pub(super) async fn follow(session: Arc<Session>, output: usize, mut source: Source) {
    let mut chunk = vec![0; LATER_CHUNK];
    let mut told = false;
    loop {
        let most = match session.title.keep {
            true => session.room_after_end(output).await.min(chunk.len()),
            false => chunk.len(),
        };
        match source.read(&mut chunk[..most]).await {
            Ok(0) => return,
            Ok(read) if session.title.keep => {
                if let Err(error) = session.write(output, &chunk[..read]) {
                    // Once: the process may write on without end.
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%error, "the output of a background process was lost");
                    }
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "the output of a background process cannot be read");
                return;
            }
        }
    }
}
