//! The output of a command, and how a stream ends whose caller goes away.
//!
//! Dropping both directions of a stream ends it. But stdin that the command does not take waits in
//! the connection, where nothing can call it back, and keeps its direction alive: the agent would
//! not hear that the caller has gone, and the command would wait for a reader that is no more. Such
//! a stream is hung up by a call of its own.

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

/// How long our half of a stream may take to end by itself.
const GRACE: Duration = Duration::from_secs(1);
/// How long the call that hangs up may take.
const CALL: Duration = Duration::from_secs(10);
/// Longest time that a command runs, and so does its stream. An agent that cannot hang up needs it.
const STREAM_MAX: Duration = Duration::from_secs(24 * 3600);

type Messages = Pin<Box<dyn Stream<Item = Result<wire::ExecResponse, Status>> + Send>>;

/// How to end a stream from outside.
pub(super) struct HangUp {
    /// A client on the connection for calls.
    pub(super) agent: AgentServiceClient<Channel>,
    /// The stream's name.
    pub(super) stream_id: String,
    /// Cancelled when our half of the stream is gone.
    pub(super) input: CancellationToken,
}

/// Our half of a stream: it tells when it is gone.
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

/// What a command says.
pub(super) struct Output(Option<(Messages, HangUp)>);

impl Output {
    pub(super) fn new(
        lease: &Lease,
        messages: impl Stream<Item = Result<wire::ExecResponse, Status>> + Send + 'static,
        hang_up: HangUp,
    ) -> Self {
        Self(Some((lease.hold(messages).boxed(), hang_up)))
    }
}

impl Stream for Output {
    type Item = Result<wire::ExecResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some((messages, _)) = &mut self.0 else { return Poll::Ready(None) };
        let next = std::task::ready!(messages.as_mut().poll_next(cx));
        if !matches!(next, Some(Ok(_))) {
            // It has ended: there is nobody to tell.
            self.0 = None;
        }
        Poll::Ready(next)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let Some((messages, hang_up)) = self.0.take() else { return };
        // Without a runtime the connection is going too.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(hang_up.end(messages));
        }
    }
}

impl HangUp {
    /// Ends a stream whose caller has gone.
    async fn end(mut self, mut messages: Messages) {
        if timeout(GRACE, self.input.cancelled()).await.is_ok() {
            return;
        }
        let action = Some(Action::HangUp(HangUpExec { stream_id: self.stream_id.clone() }));
        let told = self.agent.control_exec(wire::ControlExecRequest { action });
        match timeout(CALL, told).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(%status, "a stream could not be hung up"),
            Err(_) => tracing::debug!("hanging up a stream was not answered"),
        }
        // The agent ends the stream behind what it has said by then, so that has to be taken.
        let rest = async { while let Some(Ok(_)) = messages.next().await {} };
        drop(timeout(STREAM_MAX, rest).await);
    }
}
