//! Agent's side of a connection to a shim.

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

/// Longest time to tell a shim that did not answer that nobody waits any more.
pub(crate) const HANG_UP: Duration = Duration::from_millis(100);

/// Reason why a request to the shim failed.
#[derive(Debug)]
pub enum Refused {
    /// The shim refused: its reason and a sentence.
    No(Reason, String),
    /// The connection was lost, or no answer came: the request may have been carried out.
    Lost(io::Error),
}

/// Attachment to a command: its output and input.
#[derive(Debug)]
pub struct Attachment {
    /// Offsets where stdin continues and output begins.
    pub started: wire::Started,
    /// Receiver of the command's output.
    pub output: Output,
    /// Sender of the command's input.
    pub input: Input,
}

/// Receiver of the output of a command that is attached to.
#[derive(Debug)]
pub struct Output(SplitStream<Frames>);

/// Sender of the input of a command that is attached to.
#[derive(Debug)]
pub struct Input(SplitSink<Frames, Bytes>);

/// Starts a command, or attaches to one, and waits for the answer until `deadline`. A command that
/// starts running after that is ended, unless its caller can ask for it again by its exec_id.
///
/// # Errors
/// When the shim refuses or does not answer.
pub async fn attach(
    stream: UnixStream,
    message: request::Message,
    deadline: Instant,
) -> Result<Attachment, Refused> {
    let mut frames = frames(stream);
    let answer = match ask(&mut frames, message, deadline).await {
        Err(Refused::Lost(error)) => {
            // Without this, the shim holds the command for an agent that comes back. A shim that is
            // gone does not need it.
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

/// Sends a request that has a single answer.
///
/// # Errors
/// When the shim refuses or does not answer.
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
            Err(Refused::No(Reason::named(&refused.reason).unwrap_or_default(), refused.message))
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
    /// Returns the next message; `None` when the shim is gone.
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
