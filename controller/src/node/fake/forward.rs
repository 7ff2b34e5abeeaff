//! Servers in the sandboxes of the fake agent, by port: 7 echoes, 9 takes nothing, 19 never stops writing, and 22
//! breaks the connection off after the first bytes. Nothing listens on other ports.

use std::sync::Arc;

use bytes::Bytes;
use proto::{
    Reason,
    agent::v1::ForwardRequest,
    forward::{Host, Target},
    sandbox::v1::{self as api, forward_request::Message as In, forward_response::Message as Out},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{FakeAgent, answers::refuse};

/// Bytes of one message of a server that never stops.
const CHUNK: usize = 16 * 1024;

type Messages = mpsc::Receiver<Result<Out, Status>>;

impl FakeAgent {
    /// Connects to a server.
    pub(super) async fn forward(
        self: &Arc<Self>,
        mut input: Streaming<ForwardRequest>,
    ) -> Result<Messages, Status> {
        let first = input.message().await?.unwrap_or_default();
        let (stream_id, first) = (first.stream_id, first.message.and_then(|m| m.message));
        let Some(In::Open(open)) = first else { return refuse(Reason::FieldInvalid, "open first") };
        let sandbox = self.get(&open.id)?;
        if sandbox.phase() != api::Phase::Running {
            return refuse(Reason::SandboxNotRunning, "not running");
        }
        let target = Target::read(open.target).map_err(daemon::status::Refusal::from)?;
        let port = match target {
            Target::Tcp(Host::Any | Host::Address(_), port) => port.get(),
            Target::Unix(_) => 7,
            Target::Accepted(..) => 0,
        };
        let opened = api::ForwardOpened { node: self.name.to_string(), boot: sandbox.boot };
        let (out, messages) = mpsc::channel(1);
        let hung_up = CancellationToken::new();
        self.world.lock().streams.insert(stream_id, hung_up.clone());
        if !matches!(port, 7 | 9 | 19 | 22) {
            return refuse(Reason::NotListening, "nothing listens");
        }
        let served = async move {
            if out.send(Ok(Out::Opened(opened))).await.is_ok() {
                serve(port, input, &out).await;
            }
        };
        tokio::spawn(hung_up.run_until_cancelled_owned(served));
        Ok(messages)
    }
}

async fn serve(
    port: u16,
    mut input: Streaming<ForwardRequest>,
    out: &mpsc::Sender<Result<Out, Status>>,
) {
    match port {
        9 => out.closed().await,
        19 => while out.send(Ok(Out::Data(Bytes::from_static(&[b'y'; CHUNK])))).await.is_ok() {},
        _ => {}
    }
    while let Ok(message) = input.message().await {
        match message.and_then(|message| message.message).and_then(|message| message.message) {
            Some(In::Data(_)) if port == 22 => {
                drop(out.send(refuse(Reason::ForwardLost, "reset")).await);
                return;
            }
            Some(In::Data(data)) => {
                if out.send(Ok(Out::Data(data))).await.is_err() {
                    return;
                }
            }
            Some(In::Eof(true)) | None => {
                drop(out.send(Ok(Out::Eof(true))).await);
                return;
            }
            Some(In::Eof(false) | In::Open(_)) => {}
        }
    }
}
