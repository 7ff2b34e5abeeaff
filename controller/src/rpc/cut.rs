//! Ends a stream when its token ends: with the refusal that a new call gets, in both directions, also
//! while its caller reads nothing.

use std::{pin::Pin, sync::Arc, task::Poll};

use bytes::Bytes;
use daemon::sync::Mutex;
use futures_util::stream;
use http::{HeaderMap, Response};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use tonic::{Status, body::Body, codegen::Body as _};

use super::{auth, calls::Ticket, connections::Busy, permits::Permit};
use crate::{
    access::{Cut, Ending, OpenCall},
    token::Verdict,
};

/// Guards and audit entry that a call with a token keeps until its last byte.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) _permit: Arc<Permit>,
    pub(super) _busy: Busy,
    pub(super) open: OpenCall,
    pub(super) ticket: Ticket,
}

/// Answer of a stream that is being sent.
struct Answering(Mutex<Sending>);

struct Sending {
    /// Rest that is still to be sent.
    body: Body,
    /// `None` once the stream was cut.
    held: Option<Held>,
}

impl Cut for Answering {
    fn cut(&self, why: Verdict) {
        let mut sending = self.0.lock();
        let Some(mut held) = sending.held.take() else { return };
        let refusal = auth::refusal(why);
        let body = std::mem::replace(&mut sending.body, last_words(&refusal));
        drop(sending);
        held.ticket.end(&refusal);
        // The sources of the stream end here, not when its caller reads on.
        drop((body, held));
    }
}

/// Builds the end of an answer that has begun.
fn last_words(status: &Status) -> Body {
    let mut trailers = HeaderMap::new();
    // A status of ours has texts that headers can hold.
    let trailers = status.add_header(&mut trailers).map(|()| trailers);
    let end = async move { Some(trailers) };
    Body::new(Empty::<Bytes>::new().map_err(|never| match never {}).with_trailers(end))
}

/// Ends what a caller sends when its token ends.
pub(super) fn request(mut body: Body, ending: Ending) -> Body {
    let mut over = Box::pin(ending.over());
    Body::new(StreamBody::new(stream::poll_fn(move |cx| {
        if over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(auth::refusal(ending.why()))));
        }
        Pin::new(&mut body).poll_frame(cx)
    })))
}

/// Sends the answer of a stream until its token ends; keeps the permit until its last byte.
pub(super) fn answer(response: Response<Body>, held: Held) -> Response<Body> {
    let ending = held.open.ending();
    let mut over = Box::pin(ending.over());
    response.map(|body| {
        let answering = Arc::new(Answering(Mutex::new(Sending { body, held: Some(held) })));
        ending.bind(&answering);
        Body::new(StreamBody::new(stream::poll_fn(move |cx| {
            if over.as_mut().poll(cx).is_ready() {
                answering.cut(ending.why());
            }
            let mut sending = answering.0.lock();
            let Sending { body, held } = &mut *sending;
            let polled = Pin::new(body).poll_frame(cx);
            if let (Poll::Ready(Some(Ok(frame))), Some(held)) = (&polled, held)
                && let Some(status) = frame.trailers_ref().and_then(Status::from_header_map)
            {
                held.ticket.end(&status);
            }
            polled
        })))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_words_are_the_refusal() {
        let trailers = last_words(&auth::refusal(Verdict::Revoked)).collect().await;
        let trailers = trailers.expect("no error").trailers().cloned().expect("trailers");
        let status = Status::from_header_map(&trailers).expect("a status");
        assert_eq!(daemon::status::reason(&status), Some(proto::Reason::TokenInvalid));
        assert!(status.message().contains("revoked"), "{status:?}");
    }
}
