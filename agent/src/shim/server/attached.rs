//! An attachment of an agent to a command: output to the agent, input to the command.

use std::{io, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, SinkExt, StreamExt, future::BoxFuture};
use prost::Message as _;
use proto::{
    Reason,
    shim::v1::{self as wire, request, response},
};
use tokio::sync::mpsc;

use super::refusals::refused;
use crate::shim::{
    Window,
    frames::Frames,
    session::{End, Next, Session},
};

pub(super) fn window(size: proto::sandbox::v1::WindowSize) -> Option<Window> {
    let (rows, columns) = (u16::try_from(size.rows).ok()?, u16::try_from(size.cols).ok()?);
    Some(Window { rows, columns })
}

pub(super) async fn say(
    frames: &mut (impl futures_util::Sink<Bytes, Error = io::Error> + Unpin),
    message: response::Message,
) -> io::Result<()> {
    let bytes = wire::Response { message: Some(message) }.encode_to_vec();
    frames.send(bytes.into()).await
}

/// Passes a command's output on to its end, and the caller's input to the command.
pub(super) async fn attached(
    session: &Arc<Session>,
    from: [u64; 2],
    frames: Frames,
) -> io::Result<()> {
    let (reader, [stdout_offset, stderr_offset], stdin_offset) = session.attach(from);
    let (mut to, mut from) = frames.split();
    let (taken, mut takes) = mpsc::channel(1);
    let out = async {
        let started = wire::Started { stdin_offset, stdout_offset, stderr_offset };
        say(&mut to, response::Message::Started(started)).await?;
        loop {
            let next = tokio::select! {
                biased;
                Some(stdin_offset) = takes.recv() => {
                    say(&mut to, response::Message::Done(wire::Done { stdin_offset })).await?;
                    continue;
                }
                next = session.next(reader) => next,
            };
            let next = match next {
                Ok(next) => next,
                Err(error) => {
                    let message = refused(Reason::ExecLost, error.to_string());
                    return session
                        .in_time(say(&mut to, response::Message::Refused(message)))
                        .await;
                }
            };
            let (message, last) = match &next {
                Next::Stdout(bytes) => (response::Message::Stdout(bytes.clone()), false),
                Next::Stderr(bytes) => (response::Message::Stderr(bytes.clone()), false),
                Next::End(End::Exit(exit)) => (response::Message::Exit(*exit), true),
                Next::End(End::Lost(why)) => {
                    (response::Message::Refused(refused(Reason::ExecLost, why.as_str())), true)
                }
            };
            session.in_time(say(&mut to, message)).await?;
            session.passed(reader, &next);
            if last {
                return Ok(());
            }
        }
    };
    tokio::select! {
        biased;
        gone = heed(session, &mut from, taken) => {
            if gone { session.hang_up(reader) } else { session.lose(reader) }
            Ok(())
        }
        done = out => {
            if done.is_ok() { session.hang_up(reader) } else { session.lose(reader) }
            done
        }
    }
}

/// Handles the caller's messages until it goes. True when it has hung up. Bytes that the command
/// does not read block further bytes only.
async fn heed(
    session: &Session,
    from: &mut (impl futures_util::Stream<Item = io::Result<BytesMut>> + Unpin),
    taken: mpsc::Sender<u64>,
) -> bool {
    let mut bytes: Option<BoxFuture<'_, Option<u64>>> = None;
    loop {
        let frame = tokio::select! {
            biased;
            frame = from.next() => frame,
            took = async { bytes.as_mut().expect("checked").await }, if bytes.is_some() => {
                bytes = None;
                // Nobody may wait for it any more.
                taken.send(took.unwrap_or(0)).await.ok();
                continue;
            }
        };
        let Some(Ok(frame)) = frame else { return false };
        let Ok(request) = wire::Request::decode(frame.freeze()) else { return false };
        match request.message {
            Some(request::Message::Stdin(stdin)) => {
                // An agent must wait until the previous bytes are acknowledged.
                if bytes.is_some() {
                    return false;
                }
                bytes = Some(session.stdin(stdin.offset, stdin.data, stdin.eof).boxed());
            }
            Some(request::Message::Resize(resize)) => {
                resize.window.and_then(window).into_iter().for_each(|size| session.resize(size));
            }
            Some(request::Message::Signal(signal)) => {
                session.signal(i32::try_from(signal.number).unwrap_or_default());
            }
            Some(request::Message::HangUp(_)) => return true,
            Some(_) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::sandbox::v1::ExecExit;
    use tokio::{net::UnixStream, sync::Notify, task::yield_now, time::sleep};

    use super::*;
    use crate::shim::{
        frames::frames,
        ring::Budget,
        session::{REST, Shared, Title},
    };

    /// Bytes of the command: more than sockets hold.
    const BYTES: usize = 3 * 1024 * 1024;

    fn session(dir: &std::path::Path) -> Arc<Session> {
        let title = Title {
            exec_id: "x-1".into(),
            keep: false,
            detached: false,
            files: false,
            spare_background: false,
            never_ran: false,
            digest: String::new(),
            title: String::new(),
            started_ms: 1,
            tty: false,
        };
        let (dir, budget) = (dir.to_owned(), Budget::new(u64::MAX));
        let shared = Shared { dir, budget, left_behind: Notify::new() };
        Session::new(title, Arc::new(shared), mpsc::channel(1).0, None)
    }

    #[tokio::test(start_paused = true)]
    async fn reader_that_stalls_after_the_end_loses_no_byte() {
        let dir = tempfile::tempdir().expect("tempdir");
        let session = session(dir.path());
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let served = Arc::clone(&session);
        let served = tokio::spawn(async move { attached(&served, [0, 0], frames(theirs)).await });
        while !session.is_attached() {
            yield_now().await;
        }
        let wrote: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
        for chunk in wrote.chunks(64 * 1024) {
            session.write(0, chunk).expect("written");
        }
        let exit = ExecExit { code: 3, ..ExecExit::default() };
        session.end(End::Exit(exit), false);
        let (mut from, mut read, mut stalls) = (frames(ours), Vec::new(), 0);
        let end = loop {
            // Twice: each wait is bounded by itself.
            if read.len() >= stalls * BYTES / 3 && stalls < 2 {
                sleep(REST / 3 * 2).await;
                stalls += 1;
            }
            let frame = from.next().await.expect("an end").expect("a frame");
            match wire::Response::decode(frame.freeze()).expect("a message").message {
                Some(response::Message::Stdout(bytes)) => read.extend_from_slice(&bytes),
                Some(response::Message::Exit(exit)) => break exit,
                other => assert!(matches!(other, Some(response::Message::Started(_)))),
            }
        };
        assert!(read == wrote, "{} bytes of {BYTES}", read.len());
        assert_eq!((end, stalls), (exit, 2));
        served.await.expect("no panic").expect("it has sent all");
    }
}
