//! Frames of a conversation between an agent and a shim: messages with their length in front.

use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// Bytes of a message; the largest is an order.
const FRAME_MAX: usize = 9 * 1024 * 1024;

/// A conversation as a stream and a sink of frames.
pub(super) type Frames = Framed<UnixStream, LengthDelimitedCodec>;

/// Messages with their length in front.
pub(super) fn frames(stream: UnixStream) -> Frames {
    let codec = LengthDelimitedCodec::builder().max_frame_length(FRAME_MAX).new_codec();
    Framed::new(stream, codec)
}
