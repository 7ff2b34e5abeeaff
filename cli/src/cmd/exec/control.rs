//! Signals and the terminal's size on their way to the command.

use std::{io, time::Duration};

use proto::sandbox::v1::{ExecStart, ResizeExecRequest, SignalExecRequest, WindowSize};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{
    client::{Controller, answer},
    exit,
    failure::Failure,
    terminal,
};

/// Signals that wait for the command; when there are more, another one adds nothing.
const QUEUE: usize = 16;
/// Interrupts after which we exit: the user means us when the command ignores them.
const INTERRUPTS_MAX: u32 = 3;
/// Longest time for the last signal before the exit: whoever ends us waits a second.
const LAST_WORD: Duration = Duration::from_millis(500);
const KILL: u32 = 9;

/// Sends actions to the command outside its stream, which may be full of stdin.
pub(in crate::cmd) struct Control {
    pub(super) controller: Controller,
    pub(in crate::cmd) id: String,
    pub(in crate::cmd) exec_id: String,
}

enum Act {
    Signal(u32),
    Resize(WindowSize),
}

impl Control {
    /// Control over a command that is to be started.
    pub(super) fn new(controller: &Controller, start: &ExecStart) -> Self {
        Self::of(controller, &start.id, &start.exec_id)
    }

    /// Control over a command that runs.
    pub(in crate::cmd) fn of(controller: &Controller, id: &str, exec_id: &str) -> Self {
        Self { controller: controller.clone(), id: id.to_owned(), exec_id: exec_id.to_owned() }
    }

    /// Sets the size of the command's terminal.
    ///
    /// # Errors
    /// When the call failed.
    pub(in crate::cmd) async fn resize(&self, size: WindowSize) -> Result<(), Failure> {
        self.act(Act::Resize(size)).await
    }

    async fn act(&self, act: Act) -> Result<(), Failure> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let mut client = self.controller.sandboxes.clone();
        match act {
            Act::Signal(signal) => {
                let request = SignalExecRequest { id, exec_id, signal };
                answer(client.signal_exec(request)).await.map(drop)
            }
            Act::Resize(window) => {
                let request = ResizeExecRequest { id, exec_id, window: Some(window) };
                answer(client.resize_exec(request)).await.map(drop)
            }
        }
    }

    /// Kills the command, if that is possible at once.
    pub(super) async fn kill(&self) {
        timeout(LAST_WORD, self.act(Act::Signal(KILL))).await.ok();
    }
}

/// Signals that are forwarded to the command.
pub(super) struct Signals {
    int: Signal,
    term: Signal,
    hup: Signal,
    window: Signal,
}

impl Signals {
    /// Catches the signals from now on; those before [`Signals::forward`] are queued for it.
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// Forwards signals and the terminal's size to the command. Returns the exit code when the user
    /// insists, or when we are to end before the command is known to run.
    pub(super) async fn forward(
        mut self,
        control: &Control,
        mut started: watch::Receiver<bool>,
        tty: bool,
    ) -> u8 {
        let (sender, mut acts) = mpsc::channel(QUEUE);
        let runs = started.clone();
        let take = async {
            let mut interrupts = 0;
            loop {
                let act = tokio::select! {
                    _ = self.int.recv() => {
                        interrupts += 1;
                        if interrupts >= INTERRUPTS_MAX {
                            return exit::INTERRUPTED;
                        }
                        Act::Signal(2)
                    }
                    _ = self.term.recv() => {
                        if !*runs.borrow() {
                            return exit::TERMINATED;
                        }
                        Act::Signal(15)
                    }
                    _ = self.hup.recv() => Act::Signal(1),
                    _ = self.window.recv() => match terminal::size() {
                        Some(size) if tty => Act::Resize(size),
                        _ => continue,
                    },
                };
                // When the queue is full, another signal adds nothing.
                sender.try_send(act).ok();
            }
        };
        let pass = async {
            // A command that does not run yet cannot be signalled.
            started.wait_for(|runs| *runs).await.ok();
            while let Some(act) = acts.recv().await {
                // The command's stream shows its state; a lost signal can be sent again.
                control.act(act).await.ok();
            }
        };
        tokio::select! {
            code = take => code,
            code = async { pass.await; std::future::pending().await } => code,
        }
    }
}
