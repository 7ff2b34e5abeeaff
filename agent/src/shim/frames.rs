//! Length-prefixed messages on a connection between an agent and a shim.

use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// Largest message, in bytes; the largest is an order.
const FRAME_MAX: usize = 9 * 1024 * 1024;

/// Connection as a stream and a sink of frames.
pub(super) type Frames = Framed<UnixStream, LengthDelimitedCodec>;

pub(super) fn frames(stream: UnixStream) -> Frames {
    let codec = LengthDelimitedCodec::builder().max_frame_length(FRAME_MAX).new_codec();
    Framed::new(stream, codec)
}
