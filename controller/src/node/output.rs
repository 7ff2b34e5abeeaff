//! Output of a command or a connection, and the end of a stream whose caller goes away.
//!
//! Dropping both directions of a stream ends it. But stdin that the command does not take waits in
//! the connection, cannot be recalled and keeps its direction alive: the agent would not notice
//! that the caller has gone, and the command would wait for a reader that no longer exists. A
//! separate call hangs up such a stream.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use proto::agent::v1::{
    self as wire, HangUpExec, agent_service_client::AgentServiceClient,
    control_exec_request::Action,
};
use tokio::{runtime::Handle, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, transport::Channel};

use super::bulk::Lease;

/// Time for the input direction of a stream to end by itself.
const GRACE: Duration = Duration::from_secs(1);
/// Deadline of the call that hangs up.
const CALL: Duration = Duration::from_secs(10);
/// Longest run of a command and so of its stream. An agent that cannot hang up needs this long.
const STREAM_MAX: Duration = Duration::from_secs(24 * 3600);

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Handle that ends a stream from outside.
pub(super) struct HangUp {
    /// Client on the connection of the stream, which has room for this call: each of its streams, which are few,
    /// makes one at most. On the connection for unary calls, a team that leaves many streams at once would fill it.
    pub(super) agent: AgentServiceClient<Channel>,
    /// Name of the stream.
    pub(super) stream_id: String,
    /// Cancelled when the input direction of the stream is dropped.
    pub(super) input: CancellationToken,
}

/// Wraps the input direction of a stream. The token is cancelled when that is dropped.
pub(super) fn input<S: Stream>(
    lease: &Lease,
    stream: S,
) -> (impl Stream<Item = S::Item> + use<S>, CancellationToken) {
    let gone = CancellationToken::new();
    let guard: DropGuard = gone.clone().drop_guard();
    let stream = lease.hold(stream).map(move |item| {
        let _held = &guard;
        item
    });
    (stream, gone)
}

/// Output direction of a stream.
pub(super) struct Output<T: Send + 'static>(Option<(Messages<T>, HangUp)>);

impl<T: Send + 'static> Output<T> {
    pub(super) fn new(
        lease: &Lease,
        messages: impl Stream<Item = Result<T, Status>> + Send + 'static,
        hang_up: HangUp,
    ) -> Self {
        Self(Some((lease.hold(messages).boxed(), hang_up)))
    }
}

impl<T: Send + 'static> Stream for Output<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((messages, _)) = &mut self.0 else { return Poll::Ready(None) };
        let next = std::task::ready!(messages.as_mut().poll_next(cx));
        if !matches!(next, Some(Ok(_))) {
            // Nothing to hang up: the stream has ended.
            self.0 = None;
        }
        Poll::Ready(next)
    }
}

impl<T: Send + 'static> Drop for Output<T> {
    fn drop(&mut self) {
        let Some((messages, hang_up)) = self.0.take() else { return };
        // Without a runtime the connection ends too.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(hang_up.end(messages));
        }
    }
}

impl HangUp {
    /// Ends a stream whose caller has gone.
    async fn end<T>(mut self, mut messages: Messages<T>) {
        if timeout(GRACE, self.input.cancelled()).await.is_ok() {
            return;
        }
        let action = Some(Action::HangUp(HangUpExec { stream_id: self.stream_id.clone() }));
        let answer = self.agent.control_exec(wire::ControlExecRequest { action });
        match timeout(CALL, answer).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(%status, "could not hang up a stream"),
            Err(_) => tracing::debug!("hang-up of a stream was not answered"),
        }
        // The agent ends the stream after the output sent by then, which must be read.
        let rest = async { while let Some(Ok(_)) = messages.next().await {} };
        drop(timeout(STREAM_MAX, rest).await);
    }
}
