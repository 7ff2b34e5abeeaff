//! HTTP/2 flow control on both legs: between callers and the controller, and between the controller
//! and its agents.
//!
//! A byte that is received but not yet read uses credit of its stream and of its connection. The
//! receiver grants both. Here the credit of a connection always covers that of all its streams
//! together, so an unread stream uses up its own window and delays no other stream.

use tonic::transport::{Endpoint, Server};

/// Largest window of HTTP/2, bytes (RFC 9113, section 6.9.1).
const WINDOW_MAX: u32 = (1 << 31) - 1;

/// Bytes of one stream between controller and agent that may wait unread at either end.
pub const AGENT_STREAM_WINDOW: u32 = 64 * 1024;
/// Streams of one connection to an agent at most. More calls wait in the order of their coming, so the controller has
/// fewer places for those that a tenant can make last (`node::places`, and `node::bulk` for streams).
pub const AGENT_STREAMS_MAX: u32 = 512;
/// Credit of one connection between controller and agent, bytes.
///
/// The stream windows are the limit (512 of them are 32 MiB); this only has to be larger. It is
/// much larger because h2 also closes a connection on which too many small DATA frames wait unread,
/// and allows half of this for them: `a_connection_allows_for_the_smallest_frames` has the sum.
pub const AGENT_CONNECTION_WINDOW: u32 = 1 << 30;

/// Bytes of one call that may wait unread in the controller. Callers may be far away: at a
/// round-trip time of 50 ms this is 5 MB/s for each stream.
pub const CALLER_STREAM_WINDOW: u32 = 256 * 1024;

/// Bytes of one answer that may wait unread in our own clients of the API.
const CLIENT_STREAM_WINDOW: u32 = 1024 * 1024;
/// Credit of a connection of our own clients: more than their streams can use.
const CLIENT_CONNECTION_WINDOW: u32 = 1 << 30;

/// Leg of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// From a caller to the controller.
    Api,
    /// From the controller to an agent; shared by many teams.
    Agent,
}

/// Sets how much a client allows the other end to send.
pub(crate) fn endpoint(leg: Leg, endpoint: Endpoint) -> Endpoint {
    let endpoint = endpoint.http2_adaptive_window(false);
    match leg {
        Leg::Api => endpoint
            .initial_stream_window_size(CLIENT_STREAM_WINDOW)
            .initial_connection_window_size(CLIENT_CONNECTION_WINDOW),
        // Data still arriving for cancelled streams counts as an error of the peer, and h2 closes a
        // connection after 1024 of those. Callers may cancel streams at any time; the agent is our
        // own and needs no such limit.
        Leg::Agent => endpoint
            .initial_stream_window_size(AGENT_STREAM_WINDOW)
            .initial_connection_window_size(AGENT_CONNECTION_WINDOW)
            .http2_max_concurrent_reset_streams(AGENT_STREAMS_MAX as usize)
            .http2_max_local_error_reset_streams(usize::MAX),
    }
}

/// Server of an agent, whose only client is the controller.
pub fn agent_server() -> Server {
    Server::builder()
        .http2_adaptive_window(Some(false))
        .max_concurrent_streams(AGENT_STREAMS_MAX)
        .initial_stream_window_size(AGENT_STREAM_WINDOW)
        .initial_connection_window_size(AGENT_CONNECTION_WINDOW)
        // Many callers that hang up at once are no attack by the controller.
        .http2_max_pending_accept_reset_streams(Some(AGENT_STREAMS_MAX as usize))
}

/// Server of the API. A connection belongs to one caller, so `streams` is the limit of that caller.
pub fn api_server(streams: u32) -> Server {
    let (stream, connection) = api_windows(streams);
    Server::builder()
        .http2_adaptive_window(Some(false))
        .max_concurrent_streams(streams)
        .initial_stream_window_size(stream)
        .initial_connection_window_size(connection)
}

/// Windows of a stream and of its connection. With very many streams, each is smaller.
fn api_windows(streams: u32) -> (u32, u32) {
    let streams = streams.max(1);
    let stream = CALLER_STREAM_WINDOW.min(WINDOW_MAX / streams).max(1);
    // RFC 9113 starts a connection with 65,535 bytes, which cannot be reduced.
    (stream, stream.saturating_mul(streams).clamp(65_535, WINDOW_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connections_credit_covers_all_its_streams() {
        let agent = u64::from(AGENT_STREAM_WINDOW) * u64::from(AGENT_STREAMS_MAX);
        assert!(agent <= u64::from(AGENT_CONNECTION_WINDOW));
        for streams in [0, 1, 2, 100, 128, 8191, 8192, 8193, 1 << 20, u32::MAX] {
            let (stream, connection) = api_windows(streams);
            let all = u64::from(stream) * u64::from(streams);
            assert!(
                stream > 0 && all <= u64::from(WINDOW_MAX).max(u64::from(streams)),
                "{streams}"
            );
            assert!(u64::from(connection) >= all.min(u64::from(WINDOW_MAX)), "{streams}");
        }
        assert_eq!(api_windows(128), (256 * 1024, 32 * 1024 * 1024));
    }

    /// Uses the rule of h2 0.4.20: each unread DATA frame below 256 bytes counts as 256 bytes less
    /// its payload, and half of the connection's window is allowed in all.
    #[test]
    fn a_connection_allows_for_the_smallest_frames() {
        /// Streams of the controller on one connection.
        const STREAMS: u64 = 64;
        /// Message of gRPC with one byte of data: 5 bytes of header, and 3 of protobuf.
        const SMALLEST: u64 = 8;
        let frames = u64::from(AGENT_STREAM_WINDOW) / SMALLEST;
        let counted = STREAMS * frames * (256 - SMALLEST);
        assert!(counted < u64::from(AGENT_CONNECTION_WINDOW) / 2, "{counted}");
    }
}
