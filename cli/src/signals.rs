//! Signals that end a call: what was begun can be told, or undone, before the exit.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{exit, failure::Failure};

/// Signal that asks us to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Ctrl-C.
    Interrupted,
    /// SIGTERM: the exit must come within a second.
    Terminated,
    /// The terminal was closed.
    HungUp,
}

impl Stop {
    /// Exit code: 128 and the number of the signal.
    pub fn exit(self) -> u8 {
        match self {
            Self::Interrupted => exit::INTERRUPTED,
            Self::Terminated => exit::TERMINATED,
            Self::HungUp => exit::HUNG_UP,
        }
    }
}

/// Signals that are caught from the time of its creation on.
#[derive(Debug)]
pub struct Stops {
    int: Signal,
    term: Signal,
    hup: Signal,
}

impl Stops {
    /// Catches the signals, so that they do not end the program.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn listen() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind)
                .map_err(|error| Failure::local(format!("cannot listen for signals: {error}")))
        };
        Ok(Self {
            int: listen(SignalKind::interrupt())?,
            term: listen(SignalKind::terminate())?,
            hup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.int.recv() => Stop::Interrupted,
            _ = self.term.recv() => Stop::Terminated,
            _ = self.hup.recv() => Stop::HungUp,
        }
    }
}
