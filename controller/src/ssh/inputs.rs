//! Messages of a client to one channel, counted at the gate of its connection.

use std::sync::Arc;

use bytes::Bytes;
use proto::sandbox::v1::WindowSize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::transport::Gate;

/// Bytes that a message counts beside its content.
const OVERHEAD: usize = 128;

/// Message of a client.
#[derive(Debug)]
pub(super) enum Input {
    /// Bytes for stdin, or for a server.
    Data(Bytes),
    /// End of the bytes.
    Eof,
    /// New size of the terminal.
    Resize(WindowSize),
    /// Signal, by number.
    Signal(u32),
}

impl Input {
    fn cost(&self) -> usize {
        let bytes = match self {
            Self::Data(bytes) => bytes.len(),
            Self::Eof | Self::Resize(_) | Self::Signal(_) => 0,
        };
        bytes + OVERHEAD
    }
}

/// Sending end. The gate bounds what waits: it stops the reading of the connection.
#[derive(Debug)]
pub(super) struct InputSender {
    to: UnboundedSender<Input>,
    gate: Arc<Gate>,
    _gone: DropGuard,
}

/// Receiving end.
#[derive(Debug)]
pub(super) struct Inputs {
    from: UnboundedReceiver<Input>,
    gate: Arc<Gate>,
    gone: CancellationToken,
}

/// Creates both ends.
pub(super) fn inputs(gate: &Arc<Gate>) -> (InputSender, Inputs) {
    let (to, from) = unbounded_channel();
    let gone = CancellationToken::new();
    let sender = InputSender { to, gate: gate.clone(), _gone: gone.clone().drop_guard() };
    (sender, Inputs { from, gate: gate.clone(), gone })
}

impl InputSender {
    /// Passes a message on. One that nobody takes any more is dropped.
    pub(super) fn send(&self, input: Input) {
        let cost = input.cost();
        self.gate.put(cost);
        if self.to.send(input).is_err() {
            self.gate.take(cost);
        }
    }
}

impl Inputs {
    /// Returns the token that is cancelled when the client has closed the channel.
    pub(super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Returns the next message; `None` once the channel is closed.
    pub(super) async fn next(&mut self) -> Option<Input> {
        let input = self.from.recv().await?;
        self.gate.take(input.cost());
        Some(input)
    }
}

impl Drop for Inputs {
    fn drop(&mut self) {
        self.from.close();
        while let Ok(input) = self.from.try_recv() {
            self.gate.take(input.cost());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::transport::CROWDED;

    #[tokio::test]
    async fn messages_that_wait_are_counted_until_they_are_taken_or_dropped() {
        let gate = Arc::<Gate>::default();
        let (sender, mut inputs) = inputs(&gate);
        sender.send(Input::Data(vec![0; CROWDED].into()));
        assert!(gate.is_crowded());
        assert!(matches!(inputs.next().await, Some(Input::Data(_))));
        assert!(!gate.is_crowded());
        sender.send(Input::Data(vec![0; CROWDED].into()));
        drop(inputs);
        assert!(!gate.is_crowded());
        sender.send(Input::Data(vec![0; CROWDED].into()));
        assert!(!gate.is_crowded(), "nobody takes it");
    }
}
