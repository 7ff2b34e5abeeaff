//! Messages of a client to one channel, counted at the gate of its connection.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use daemon::sync::Mutex;
use proto::sandbox::v1::WindowSize;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::transport::Gate;

/// Bytes that a message counts beside its content.
const OVERHEAD: usize = 128;
/// Most bytes to which small messages that wait are put together. A client that is slowed down sends two bytes at a
/// time: each counted apart, they would soon fill the connection.
const TOGETHER: usize = 4096;

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

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Input>,
    /// The sending end has gone.
    is_closed: bool,
    /// The receiving end has gone.
    is_unheard: bool,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

/// Sending end. The gate bounds what waits: it stops the reading of the connection.
#[derive(Debug)]
pub(super) struct InputSender {
    to: Arc<Queue>,
    gate: Arc<Gate>,
    _gone: DropGuard,
}

/// Receiving end.
#[derive(Debug)]
pub(super) struct Inputs {
    from: Arc<Queue>,
    gate: Arc<Gate>,
    gone: CancellationToken,
}

/// Creates both ends.
pub(super) fn inputs(gate: &Arc<Gate>) -> (InputSender, Inputs) {
    let queue = Arc::<Queue>::default();
    let gone = CancellationToken::new();
    let sender =
        InputSender { to: queue.clone(), gate: gate.clone(), _gone: gone.clone().drop_guard() };
    (sender, Inputs { from: queue, gate: gate.clone(), gone })
}

impl InputSender {
    /// Passes a message on. One that nobody takes any more is dropped.
    pub(super) fn send(&self, input: Input) {
        let mut state = self.to.state.lock();
        if state.is_unheard {
            return;
        }
        // Counted before it can be taken.
        match (state.waiting.back_mut(), input) {
            (Some(Input::Data(last)), Input::Data(bytes))
                if last.len() + bytes.len() <= TOGETHER =>
            {
                self.gate.put(bytes.len());
                let mut both = BytesMut::with_capacity(last.len() + bytes.len());
                both.extend_from_slice(last);
                both.extend_from_slice(&bytes);
                *last = both.freeze();
            }
            (_, input) => {
                self.gate.put(input.cost());
                state.waiting.push_back(input);
            }
        }
        drop(state);
        self.to.changed.notify_one();
    }
}

impl Drop for InputSender {
    fn drop(&mut self) {
        self.to.state.lock().is_closed = true;
        self.to.changed.notify_one();
    }
}

impl Inputs {
    /// Returns the token that is cancelled when the client has closed the channel.
    pub(super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Returns the next message; `None` once the channel is closed.
    pub(super) async fn next(&mut self) -> Option<Input> {
        loop {
            let (input, is_closed) = {
                let mut state = self.from.state.lock();
                (state.waiting.pop_front(), state.is_closed)
            };
            if let Some(input) = input {
                self.gate.take(input.cost());
                return Some(input);
            }
            if is_closed {
                return None;
            }
            // Keeps the word of a change that came since.
            self.from.changed.notified().await;
        }
    }
}

impl Drop for Inputs {
    fn drop(&mut self) {
        let mut state = self.from.state.lock();
        state.is_unheard = true;
        let rest = std::mem::take(&mut state.waiting);
        drop(state);
        rest.iter().for_each(|input| self.gate.take(input.cost()));
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
    #[tokio::test]
    async fn small_messages_that_wait_are_put_together_in_their_order() {
        let gate = Arc::<Gate>::default();
        let (sender, mut inputs) = inputs(&gate);
        for number in 0..=255 {
            for _ in 0..1500 {
                sender.send(Input::Data(vec![number; 2].into()));
            }
        }
        assert!(!gate.is_crowded(), "bytes in pairs are not much more than the bytes");
        sender.send(Input::Eof);
        sender.send(Input::Data("after".into()));
        drop(sender);
        let mut bytes = Vec::new();
        while let Some(Input::Data(more)) = inputs.next().await {
            bytes.extend_from_slice(&more);
        }
        assert_eq!(bytes.len(), 256 * 3000);
        assert!(bytes.is_sorted(), "nothing is overtaken");
        assert!(matches!(inputs.next().await, Some(Input::Data(after)) if after == "after"));
        assert!(inputs.next().await.is_none());
    }
}
