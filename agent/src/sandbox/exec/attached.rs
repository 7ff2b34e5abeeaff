//! Passes messages between a caller and a shim.

use std::{io, sync::Arc};

use bytes::Bytes;
use proto::{
    Reason,
    shim::v1::{self as wire, request, response},
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    order::{Exit, Input, Output},
    said, same_boot, size,
};
use crate::{
    journal::Record,
    sandbox::{Error, Sandboxes},
    shim::client,
};

pub(super) type Sender = mpsc::Sender<Result<Output, Error>>;

#[derive(Debug)]
pub(super) struct Attached {
    pub(super) sandboxes: Arc<Sandboxes>,
    pub(super) record: Arc<Record>,
    /// Bytes of stdin that have been taken. The caller's stdin continues behind those of the beginning.
    pub(super) taken: watch::Sender<u64>,
}

impl Attached {
    /// Runs until the command ends, the caller hangs up, or the agent stops. Sends an exit or an
    /// error as the last message.
    pub(super) async fn run(
        self,
        mut from: client::Output,
        mut to: client::Input,
        inputs: mpsc::Receiver<Input>,
        output: Sender,
    ) {
        let stopping = self.sandboxes.tasks().stopping().clone();
        let (begun, taken) = (*self.taken.borrow(), self.taken.subscribe());
        let mut feed = Box::pin(feed(&mut to, inputs, begun, taken));
        let mut fed = false;
        let last = loop {
            let message = tokio::select! {
                biased;
                () = output.closed() => break None,
                // The command lives on: its shim keeps it for the next agent.
                () = stopping.cancelled() => break Some(Err(Error::new(
                    Reason::ShuttingDown,
                    "the agent stops; the command runs on and can be attached to",
                ))),
                message = from.next() => message,
                () = &mut feed, if !fed => {
                    fed = true;
                    continue;
                }
            };
            let bytes = match message {
                Some(Ok(response::Message::Stdout(bytes))) => Output::Stdout(bytes),
                Some(Ok(response::Message::Stderr(bytes))) => Output::Stderr(bytes),
                Some(Ok(response::Message::Done(wire::Done { stdin_offset }))) => {
                    self.taken.send_replace(stdin_offset);
                    continue;
                }
                other => break Some(self.last(other).await),
            };
            // While the caller does not take output, no more is read; but its input still flows.
            tokio::select! {
                biased;
                sent = output.send(Ok(bytes)) => if sent.is_err() {
                    break None;
                },
                () = async {
                    if !fed {
                        (&mut feed).await;
                        fed = true;
                    }
                    std::future::pending::<()>().await;
                } => {}
            }
        };
        drop(feed);
        match last {
            // A caller that has gone does not get it.
            Some(last) => drop(output.send(last).await),
            None => hang_up(&mut to).await,
        }
    }

    /// Converts the shim's last message.
    async fn last(&self, message: Option<io::Result<response::Message>>) -> Result<Output, Error> {
        match message {
            Some(Ok(response::Message::Exit(exit))) => {
                // A command that is killed with its sandbox says nothing about itself.
                if exit.signal != 0 && !self.still_runs().await {
                    return Err(stopped());
                }
                let byte = |number: u32| u8::try_from(number).unwrap_or(u8::MAX);
                Ok(Output::Exit(Exit {
                    code: byte(exit.code),
                    signal: byte(exit.signal),
                    timed_out: exit.timed_out,
                }))
            }
            Some(Ok(response::Message::Refused(refused))) => {
                if !self.still_runs().await {
                    return Err(stopped());
                }
                Err(said(Reason::named(&refused.reason).unwrap_or_default(), refused.message))
            }
            Some(Ok(_)) => Err(Error::new(
                Reason::OutcomeUnknown,
                "the sandbox's shim answered out of turn; the command may run on",
            )),
            Some(Err(_)) | None if !self.still_runs().await => Err(stopped()),
            Some(Err(_)) | None => Err(Error::new(
                Reason::ExecLost,
                "the command's supervisor on the node was killed, or its output was not read for \
                 an hour: the rest of the output, and its end, are lost",
            )),
        }
    }

    async fn still_runs(&self) -> bool {
        same_boot(&self.sandboxes, &self.record)
            && self.sandboxes.pve().running(self.record.vmid).await
    }
}

fn stopped() -> Error {
    Error::new(Reason::ExecLost, "the sandbox stopped while the command ran")
}

async fn hang_up(to: &mut client::Input) {
    // A shim that has gone needs no message, and one that does not read sees the end of the connection.
    let sent = to.send(request::Message::HangUp(wire::HangUp {}));
    drop(timeout(client::HANG_UP, sent).await);
}

/// Forwards the caller's input. Bytes wait until those before them were taken; signals and window
/// sizes overtake them. Returns when no more input can come.
async fn feed(
    to: &mut client::Input,
    mut inputs: mpsc::Receiver<Input>,
    mut offset: u64,
    mut taken: watch::Receiver<u64>,
) {
    let mut waiting: Option<(Bytes, bool)> = None;
    let mut under_way = false;
    loop {
        if !under_way && let Some((data, eof)) = waiting.take() {
            let length = data.len() as u64;
            let stdin = wire::Stdin { exec_id: String::new(), offset, data, eof };
            if to.send(request::Message::Stdin(stdin)).await.is_err() {
                return;
            }
            offset += length;
            under_way = true;
            taken.mark_unchanged();
        }
        let input = tokio::select! {
            biased;
            changed = taken.changed(), if under_way => {
                if changed.is_err() {
                    return;
                }
                under_way = false;
                continue;
            }
            // At most one message waits: a caller that sends more is not read until there is room.
            input = inputs.recv(), if waiting.is_none() => input,
            else => return,
        };
        let message = match input {
            Some(Input::Stdin(data)) if data.is_empty() => continue,
            Some(Input::Stdin(data)) => {
                waiting = Some((data, false));
                continue;
            }
            Some(Input::Eof) => {
                waiting = Some((Bytes::new(), true));
                continue;
            }
            Some(Input::Resize(window)) => request::Message::Resize(wire::Resize {
                exec_id: String::new(),
                window: Some(size(window)),
            }),
            Some(Input::Signal(number)) => request::Message::Signal(wire::Signal {
                exec_id: String::new(),
                number: u32::try_from(number).unwrap_or_default(),
            }),
            // The caller sends no more; what it sent is still forwarded.
            None => {
                if waiting.is_none() {
                    return;
                }
                continue;
            }
        };
        if to.send(message).await.is_err() {
            return;
        }
    }
}
