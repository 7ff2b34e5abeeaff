//! Input of a command: its stdin, the size of its terminal, signals.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use super::{Session, State};
use crate::shim::Window;

/// Most bytes buffered for a stdin that the command does not read.
const PENDING_MAX: usize = 256 * 1024;
/// Most bytes of a piece that is copied, and put together with the one before it.
const TOGETHER: usize = 4096;

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
                append(&mut state.pending, data);
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

/// Appends bytes to those that wait. Many small pieces would cost far more than their bytes: each would be an entry of
/// its own, and hold the frame in which it came.
fn append(pending: &mut VecDeque<Bytes>, data: Bytes) {
    // The first is being written, and counts as written by its length.
    let last = if pending.len() > 1 { pending.back_mut() } else { None };
    match last {
        Some(last) if last.len() + data.len() <= TOGETHER => {
            *last = [&last[..], &data[..]].concat().into();
        }
        Some(_) | None if data.len() <= TOGETHER => {
            pending.push_back(Bytes::copy_from_slice(&data));
        }
        Some(_) | None => pending.push_back(data),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_that_wait_are_put_together_behind_the_first() {
        let mut pending = VecDeque::new();
        for byte in (0..=255).cycle().take(100_000) {
            append(&mut pending, Bytes::copy_from_slice(&[byte]));
        }
        append(&mut pending, vec![7; 3 * TOGETHER].into());
        append(&mut pending, vec![8; 1].into());
        assert_eq!((pending[0].len(), pending.len()), (1, 1 + 99_999_usize.div_ceil(TOGETHER) + 2));
        let all: Vec<u8> = pending.iter().flatten().copied().collect();
        let bytes = (0..=255).cycle().take(100_000).chain([7; 3 * TOGETHER]).chain([8]);
        assert!(all.iter().copied().eq(bytes), "nothing is overtaken");
    }
}
