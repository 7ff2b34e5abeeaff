//! `Forward`, `ForwardListen` and `ListPorts` on the wire. A controller that disconnects drops the pieces,
//! which closes the connection; one that closes its half ends that direction alone.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, BytesMut};
use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1 as agent,
    exec::{PIECE_BYTES_MAX, check_chunk, pieces},
    forward::{PORTS_MAX, Target},
    id::{Invalid, SandboxRef},
    name::Port,
    sandbox::v1::{
        self as wire, forward_listen_response as listened, forward_request, forward_response,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Response, Status, Streaming};

use super::{Answer, exec::Streams, status::refusal};
use crate::{
    sandbox::exec::FORWARD_PIECE,
    sandbox::{
        Sandboxes,
        exec::{
            Execs,
            forward::{Forward, Piece, Pieces},
        },
    },
};

/// Longest wait for the first message.
const FIRST: Duration = Duration::from_secs(10);
/// Most messages in transit, for each direction. What is behind them waits in the window of its stream.
const MESSAGES: usize = 1;
const _: () = assert!(PIECE_BYTES_MAX <= FORWARD_PIECE);
/// Longest stream id, in bytes.
const STREAM_ID_MAX: usize = 64;
/// Length of the number of a connection, in bytes.
const NUMBER: usize = size_of::<u64>();

pub(super) type Responses = ReceiverStream<Result<agent::ForwardResponse, Status>>;
pub(super) type Accepted = ReceiverStream<Result<agent::ForwardListenResponse, Status>>;

pub(super) async fn forward(
    execs: Execs,
    sandboxes: Arc<Sandboxes>,
    streams: &Streams,
    mut requests: Streaming<agent::ForwardRequest>,
) -> Answer<Responses> {
    let first = timeout(FIRST, requests.message()).await;
    let first = first.map_err(|_| invalid("message", "must come within 10 s: open first"))??;
    let agent::ForwardRequest { message, stream_id } = first.unwrap_or_default();
    if stream_id.len() > STREAM_ID_MAX {
        return Err(invalid("stream_id", "must be at most 64 bytes"));
    }
    let Some(forward_request::Message::Open(open)) = message.and_then(|message| message.message)
    else {
        return Err(invalid("open", "must be the first message"));
    };
    let sandbox: SandboxRef = open.id.parse().map_err(Refusal::from)?;
    let target = Target::read(open.target).map_err(Refusal::from)?;
    let (input, inputs) = mpsc::channel(MESSAGES);
    let Forward { boot, pieces } =
        execs.forward(&sandbox, target, inputs).await.map_err(refusal)?;

    let opened = wire::ForwardOpened { node: sandboxes.pve().node().to_string(), boot };
    let (responses, stream) = mpsc::channel(MESSAGES);
    let (wrong, what) = oneshot::channel();
    sandboxes.tasks().spawn(receive(requests, input, wrong));
    let open = streams.add(stream_id);
    sandboxes.tasks().spawn(async move {
        // Dropping the pieces closes the connection, and also ends the other direction.
        let hung_up = open.hung_up().clone();
        hung_up.run_until_cancelled(send(opened, pieces, what, responses)).await;
        drop(open);
    });
    Ok(Response::new(ReceiverStream::new(stream)))
}

pub(super) async fn listen(
    execs: Execs,
    sandboxes: Arc<Sandboxes>,
    request: agent::ForwardListenRequest,
) -> Answer<Accepted> {
    let sandbox: SandboxRef = request.id.parse().map_err(Refusal::from)?;
    let port = Port::try_from(request.port).map_err(Refusal::from)?;
    let (name, Forward { pieces, .. }) = execs.listen(&sandbox, port).await.map_err(refusal)?;
    let node = sandboxes.pve().node().to_string();
    let (responses, stream) = mpsc::channel(MESSAGES);
    sandboxes.tasks().spawn(tell(name, node, pieces, responses));
    Ok(Response::new(ReceiverStream::new(stream)))
}

pub(super) async fn ports(
    execs: &Execs,
    request: agent::ListPortsRequest,
) -> Result<agent::ListPortsResponse, Refusal> {
    let listeners = execs.listeners(&request.id.parse()?).await.map_err(refusal)?;
    let ports = listeners.into_iter().take(PORTS_MAX).map(|at| wire::ListeningPort {
        port: at.port().into(),
        address: at.ip().to_canonical().to_string(),
        services: Vec::new(),
    });
    Ok(agent::ListPortsResponse { ports: ports.collect() })
}

fn invalid(what: &'static str, why: &str) -> Status {
    Refusal::from(Invalid::new(what, why)).into()
}

/// Forwards the caller's bytes in small pieces, and reads a message when there is room for it. The end of the messages
/// is the end of the bytes.
async fn receive(
    mut requests: impl Stream<Item = Result<agent::ForwardRequest, Status>> + Unpin,
    input: mpsc::Sender<Piece>,
    wrong: oneshot::Sender<Status>,
) {
    while let Ok(room) = input.reserve().await {
        let request = tokio::select! {
            biased;
            // The connection has ended.
            () = input.closed() => return,
            request = requests.next() => request,
        };
        let message = request.map(|request| {
            request.and_then(|request| Ok(checked(request).map_err(Refusal::from)?))
        });
        match message {
            Some(Ok(forward_request::Message::Data(data))) => {
                let mut pieces = pieces(data);
                if let Some(first) = pieces.next() {
                    room.send(Piece::Data(first));
                }
                for piece in pieces {
                    if input.send(Piece::Data(piece)).await.is_err() {
                        return;
                    }
                }
            }
            Some(Ok(forward_request::Message::Eof(false))) => {}
            Some(Ok(_)) | None => {
                // The sender stays: its end would not be told from the caller's.
                room.send(Piece::Eof);
                input.closed().await;
                return;
            }
            Some(Err(status)) => {
                // If nobody receives it, the connection has ended.
                drop(wrong.send(status));
                return;
            }
        }
    }
}

fn checked(request: agent::ForwardRequest) -> Result<forward_request::Message, Invalid> {
    let message = request.message.and_then(|message| message.message);
    let message = message.ok_or_else(|| Invalid::new("message", "must not be empty"))?;
    match &message {
        forward_request::Message::Open(_) => {
            Err(Invalid::new("open", "must be the first message, and only that"))
        }
        forward_request::Message::Data(data) => check_chunk("data", data).map(|()| message),
        forward_request::Message::Eof(_) => Ok(message),
    }
}

/// Forwards the server's bytes, up to an end or an error.
async fn send(
    opened: wire::ForwardOpened,
    mut pieces: Pieces,
    wrong: oneshot::Receiver<Status>,
    responses: mpsc::Sender<Result<agent::ForwardResponse, Status>>,
) {
    let respond = |message| agent::ForwardResponse {
        message: Some(wire::ForwardResponse { message: Some(message) }),
    };
    let first = respond(forward_response::Message::Opened(opened));
    if responses.send(Ok(first)).await.is_err() {
        return;
    }
    let mut wrong = std::pin::pin!(async {
        match wrong.await {
            Ok(status) => status,
            // The caller's half has ended normally.
            Err(_) => std::future::pending().await,
        }
    });
    loop {
        // A piece is taken when there is room for it.
        let room = tokio::select! {
            biased;
            status = &mut wrong => {
                drop(responses.send(Err(status)).await);
                return;
            }
            room = responses.reserve() => room,
        };
        // The caller is gone.
        let Ok(room) = room else { return };
        let piece = tokio::select! {
            biased;
            () = responses.closed() => return,
            status = &mut wrong => {
                room.send(Err(status));
                return;
            }
            piece = pieces.next() => piece,
        };
        let message = match piece {
            Some(Ok(Piece::Data(bytes))) => Ok(respond(forward_response::Message::Data(bytes))),
            Some(Ok(Piece::Eof)) => Ok(respond(forward_response::Message::Eof(true))),
            Some(Ok(Piece::End)) => return,
            Some(Err(error)) => Err(Status::from(refusal(error))),
            None => Err(lost().into()),
        };
        let over = message.is_err();
        room.send(message);
        if over {
            return;
        }
    }
}

fn lost() -> Refusal {
    Refusal::new(Reason::ForwardLost, "the connection was lost on the node")
}

/// Tells the connections of a listener, up to an error.
async fn tell(
    name: String,
    node: String,
    mut pieces: Pieces,
    responses: mpsc::Sender<Result<agent::ForwardListenResponse, Status>>,
) {
    let respond = |message| agent::ForwardListenResponse {
        message: Some(wire::ForwardListenResponse { message: Some(message) }),
    };
    let listening = wire::ForwardListening { listener: name.clone(), node };
    if responses.send(Ok(respond(listened::Message::Listening(listening)))).await.is_err() {
        return;
    }
    let mut numbers = BytesMut::new();
    loop {
        let piece = tokio::select! {
            biased;
            () = responses.closed() => return,
            piece = pieces.next() => piece,
        };
        match piece {
            Some(Ok(Piece::Data(bytes))) => numbers.extend_from_slice(&bytes),
            Some(Ok(Piece::Eof)) => {}
            Some(Ok(Piece::End)) | None => {
                drop(responses.send(Err(lost().into())).await);
                return;
            }
            Some(Err(error)) => {
                drop(responses.send(Err(refusal(error).into())).await);
                return;
            }
        }
        while numbers.len() >= NUMBER {
            let (listener, connection) = (name.clone(), numbers.get_u64_le());
            let accepted = wire::ForwardAccepted { listener, connection };
            let message = respond(listened::Message::Accepted(accepted));
            if responses.send(Ok(message)).await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(message: forward_request::Message) -> agent::ForwardRequest {
        agent::ForwardRequest {
            message: Some(wire::ForwardRequest { message: Some(message) }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn large_messages_arrive_in_small_pieces_and_their_end_is_told() {
        let (input, mut inputs) = mpsc::channel(8);
        let (wrong, what) = oneshot::channel();
        let data = request(forward_request::Message::Data(vec![7; FORWARD_PIECE + 1].into()));
        let received = tokio::spawn(receive(tokio_stream::iter([Ok(data)]), input, wrong));
        let mut sizes = Vec::new();
        while let Some(Piece::Data(bytes)) = inputs.recv().await {
            sizes.push(bytes.len());
        }
        assert_eq!(sizes, [FORWARD_PIECE, 1], "then an end");
        drop(inputs);
        received.await.expect("it ends with the connection");
        what.await.expect_err("nothing was wrong");
    }

    #[test]
    fn invalid_messages_are_refused() {
        checked(request(forward_request::Message::Eof(true))).expect("an end");
        for bad in [
            forward_request::Message::Open(wire::ForwardOpen::default()),
            forward_request::Message::Data(vec![0; proto::exec::CHUNK_BYTES_MAX + 1].into()),
        ] {
            checked(request(bad)).expect_err("not valid");
        }
        checked(agent::ForwardRequest::default()).expect_err("empty");
    }
}
