//! Input of a command: its stdin, the size of its terminal, signals.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use super::{Session, State};
use crate::shim::Window;

/// Most bytes buffered for a stdin that the command does not read.
const PENDING_MAX: usize = 256 * 1024;

impl Session {
    /// Waits for bytes for the command's stdin; `None` at the end of the input.
    pub(in crate::shim) async fn stdin_next(&self) -> Option<Bytes> {
        self.when(|state| match state.pending.front() {
            Some(bytes) => Some(Some(bytes.clone())),
            None => state.stdin_eof.then_some(None),
        })
        .await
    }

    /// Removes the bytes that were next: they have been written.
    pub(in crate::shim) fn stdin_passed(&self) {
        self.change(|state| {
            let done = state.pending.pop_front().map_or(0, |bytes| bytes.len());
            state.pending_bytes -= done;
        });
    }

    /// Ends stdin behind what was accepted: nobody sends more.
    pub(in crate::shim) fn end_stdin(&self) {
        self.change(|state| state.stdin_eof = true);
    }

    /// Closes stdin: the command reads no more, and further input is accepted and dropped.
    pub(in crate::shim) fn close_stdin(&self) {
        self.change(|state| {
            (state.pending, state.pending_bytes) = (VecDeque::new(), 0);
            state.stdin_closed = true;
        });
    }

    /// Accepts bytes for stdin once there is room for them, and skips those that it already has.
    /// Returns how many bytes it has accepted in all; `None` for bytes that leave a gap.
    pub(in crate::shim) async fn stdin(&self, offset: u64, data: Bytes, eof: bool) -> Option<u64> {
        self.when(|state| {
            let room = state.pending_bytes < PENDING_MAX || state.stdin_closed;
            room.then(|| Self::take_stdin(state, offset, data.clone(), eof))
        })
        .await
        .inspect(|_| self.changed.send_modify(|count| *count += 1))
    }

    fn take_stdin(state: &mut State, offset: u64, mut data: Bytes, eof: bool) -> Option<u64> {
        let known = usize::try_from(state.stdin_taken.checked_sub(offset)?).unwrap_or(usize::MAX);
        let known = known.min(data.len());
        data.advance(known);
        if !state.stdin_eof {
            state.stdin_taken += data.len() as u64;
            state.active = Instant::now();
            if !data.is_empty() && !state.stdin_closed {
                state.pending_bytes += data.len();
                state.pending.push_back(data);
            }
            state.stdin_eof |= eof;
        }
        Some(state.stdin_taken)
    }

    /// Passes a new size to the command's terminal.
    pub(in crate::shim) fn resize(&self, window: Window) {
        let Some(sizes) = &self.sizes else { return };
        // A write is atomic: a pipe takes so few bytes as a whole or not at all. A full pipe
        // belongs to a terminal that is stalled.
        let bytes = helper::window_bytes((window.rows, window.columns));
        if let Err(error) = nix::unistd::write(sizes, &bytes) {
            tracing::debug!(%error, "a terminal could not be resized");
        }
    }

    /// Sends a signal to all processes of the command.
    pub(in crate::shim) fn signal(&self, number: i32) {
        if self.signals.try_send(number).is_err() {
            tracing::debug!(
                number,
                "a signal was dropped: too many wait, or the command has ended"
            );
        }
    }
}
