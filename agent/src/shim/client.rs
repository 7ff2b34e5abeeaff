//! The agent's side of a conversation with a shim.

use std::{io, time::Duration};

use bytes::Bytes;
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use prost::Message as _;
use proto::{
    Reason,
    shim::v1::{self as wire, request, response},
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout, timeout_at},
};

use super::frames::{Frames, frames};

/// How long a shim that did not answer may take to hear that nobody waits any more.
const HANG_UP: Duration = Duration::from_millis(100);

/// The shim's no, or its silence.
#[derive(Debug)]
pub enum Refused {
    /// Its reason and a sentence.
    No(Reason, String),
    /// It was lost, or did not answer: what was asked for may have been done.
    Lost(io::Error),
}

/// Attached to a command: what it says, and the way to it.
#[derive(Debug)]
pub struct Attachment {
    /// Where stdin goes on and output begins.
    pub started: wire::Started,
    /// What comes from it.
    pub output: Output,
    /// What goes to it.
    pub input: Input,
}

/// What comes from a command.
#[derive(Debug)]
pub struct Output(SplitStream<Frames>);

/// What goes to a command.
#[derive(Debug)]
pub struct Input(SplitSink<Frames, Bytes>);

/// Starts a command, or attaches to one. The answer may take until `deadline`; a command that comes
/// to run after that is ended, unless its caller can ask for it again by its name.
///
/// # Errors
/// When the shim says no, or nothing.
pub async fn attach(
    stream: UnixStream,
    message: request::Message,
    deadline: Instant,
) -> Result<Attachment, Refused> {
    let mut frames = frames(stream);
    let answer = match ask(&mut frames, message, deadline).await {
        Err(Refused::Lost(error)) => {
            // Without this, a command is held for an agent that comes back. One that is gone by now
            // needs no telling.
            let hang_up = encode(request::Message::HangUp(wire::HangUp {}));
            drop(timeout(HANG_UP, frames.send(hang_up)).await);
            return Err(Refused::Lost(error));
        }
        answer => answer?,
    };
    let response::Message::Started(started) = answer else { return Err(nonsense(&answer)) };
    let (input, output) = frames.split();
    Ok(Attachment { started, output: Output(output), input: Input(input) })
}

/// What is one message and one answer.
///
/// # Errors
/// When the shim says no, or nothing.
pub async fn control(
    stream: UnixStream,
    message: request::Message,
    deadline: Instant,
) -> Result<response::Message, Refused> {
    ask(&mut frames(stream), message, deadline).await
}

fn nonsense(answer: &response::Message) -> Refused {
    Refused::Lost(io::Error::other(format!("its shim answered out of turn: {answer:?}")))
}

async fn ask(
    frames: &mut Frames,
    message: request::Message,
    deadline: Instant,
) -> Result<response::Message, Refused> {
    let answer = async {
        frames.send(encode(message)).await?;
        let frame = frames.next().await.ok_or(io::ErrorKind::UnexpectedEof)??;
        decode(frame.freeze())
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, "its shim does not answer");
    match timeout_at(deadline, answer).await.unwrap_or_else(|_| Err(late())) {
        Ok(response::Message::Refused(refused)) => {
            Err(Refused::No(refused.reason(), refused.message))
        }
        Ok(message) => Ok(message),
        Err(error) => Err(Refused::Lost(error)),
    }
}

fn encode(message: request::Message) -> Bytes {
    wire::Request { message: Some(message) }.encode_to_vec().into()
}

fn decode(frame: Bytes) -> io::Result<response::Message> {
    let response = wire::Response::decode(frame).map_err(io::Error::other)?;
    response.message.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

impl Output {
    /// What comes next; `None` when the shim is gone.
    pub async fn next(&mut self) -> Option<io::Result<response::Message>> {
        let frame = self.0.next().await?;
        Some(frame.and_then(|frame| decode(frame.freeze())))
    }
}

impl Input {
    /// Sends a message.
    ///
    /// # Errors
    /// When the shim is gone.
    pub async fn send(&mut self, message: request::Message) -> io::Result<()> {
        self.0.send(encode(message)).await
    }
}
