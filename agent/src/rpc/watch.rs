//! Watch stream: inventory, changes, load, commands. A watcher pulls from the journal by revision, so no
//! queue can grow; a watcher that does not read for long is dropped.

use std::{sync::Arc, time::Duration};

use daemon::status::Refusal;
use proto::{
    Reason,
    agent::v1::{self as wire, watch_response::Message},
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Rpc, status::refusal};
use crate::{journal::Feed, sandbox::exec::outputs::AllCommands};

/// Most messages in transit to a watcher.
const BUFFER: usize = 64;
/// Records read at a time, and sandboxes whose commands are sent at a time.
const PAGE: usize = 200;
/// Time after which a watcher that reads nothing is dropped.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval between two load reports, and the shortest interval when much happens.
const LOAD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(100));

pub(super) type Responses = ReceiverStream<Result<wire::WatchResponse, Status>>;

pub(super) fn watch(
    rpc: &Rpc,
    request: wire::WatchRequest,
    permit: OwnedSemaphorePermit,
) -> Responses {
    let (sender, messages) = mpsc::channel(BUFFER);
    let journal = rpc.sandboxes.journal();
    let watcher = Watcher { rpc: rpc.clone(), journal, sender, cursor: 0 };
    rpc.sandboxes.tasks().spawn(async move {
        // Reserve a slot for the last message, however full the channel is.
        let last = watcher.sender.clone().reserve_owned().await;
        let stop = watcher.rpc.sandboxes.tasks().stopping().clone();
        let stopped = tokio::select! {
            biased;
            () = stop.cancelled() => stopping(),
            Err(stopped) = watcher.run(request) => stopped,
        };
        if let Ok(last) = last {
            drop(last.send(Err(stopped.into())));
        }
        drop(permit);
    });
    ReceiverStream::new(messages)
}

fn stopping() -> Refusal {
    Refusal::new(Reason::ShuttingDown, "the agent is stopping")
}

struct Watcher {
    rpc: Rpc,
    journal: Arc<dyn Feed>,
    sender: mpsc::Sender<Result<wire::WatchResponse, Status>>,
    /// Revision up to which everything has been sent.
    cursor: u64,
}

impl Watcher {
    /// Runs until the watcher has gone or is dropped, and then reports the reason.
    async fn run(
        mut self,
        request: wire::WatchRequest,
    ) -> Result<std::convert::Infallible, Refusal> {
        let mut changes = self.journal.watch();
        changes.mark_changed();
        let mut ticks = interval(LOAD.0);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let resumed = request.journal_id == self.journal.id() && self.may_resume(&request).await?;
        if resumed {
            self.cursor = request.revision;
        } else {
            self.reset().await?;
        }
        let mut commands = self.rpc.execs.commands();
        commands.mark_changed();
        let mut reported: Option<Instant> = None;
        loop {
            if commands.has_changed().unwrap_or_default() {
                let all = commands.borrow_and_update().clone();
                self.commands(all).await?;
            }
            tokio::select! {
                biased;
                changed = changes.changed() => {
                    changed.map_err(|_| stopping())?;
                    self.deltas().await?;
                    if reported.is_some_and(|reported| reported.elapsed() < LOAD.1) {
                        continue;
                    }
                }
                _ = ticks.tick() => {}
            }
            reported = Some(Instant::now());
            let load = self.rpc.reporter.report().await;
            self.send(Message::Load(load)).await?;
        }
    }

    /// Sends the commands of all sandboxes, unless nothing has looked at them yet.
    async fn commands(&self, all: Option<AllCommands>) -> Result<(), Refusal> {
        let Some(all) = all else { return Ok(()) };
        let sandboxes = all.iter().map(|(id, of_it)| wire::SandboxExecs {
            id: id.to_string(),
            kept_bytes: of_it.kept_bytes,
            running: of_it.running.clone(),
        });
        let mut left: Vec<_> = sandboxes.collect();
        loop {
            let rest = left.split_off(PAGE.min(left.len()));
            let more = !rest.is_empty();
            self.send(Message::Execs(wire::WatchExecs { sandboxes: left, more })).await?;
            if !more {
                return Ok(());
            }
            left = rest;
        }
    }

    async fn may_resume(&self, request: &wire::WatchRequest) -> Result<bool, Refusal> {
        let horizon = self.journal.horizon().await.map_err(store)?;
        let revision = self.journal.revision().await.map_err(store)?;
        Ok((horizon..=revision).contains(&request.revision))
    }

    async fn reset(&mut self) -> Result<(), Refusal> {
        self.cursor = 0;
        let journal_id = self.journal.id().to_owned();
        self.send(Message::Reset(wire::WatchReset { journal_id })).await
    }

    /// Sends all records newer than the cursor, then a bookmark. From 0 that is the inventory.
    async fn deltas(&mut self) -> Result<(), Refusal> {
        let (horizon, revision) = (
            self.journal.horizon().await.map_err(store)?,
            self.journal.revision().await.map_err(store)?,
        );
        // Tombstones that the watcher has not seen were forgotten meanwhile: it would keep
        // sandboxes that are gone.
        if self.cursor != 0 && self.cursor < horizon {
            self.reset().await?;
        }
        loop {
            let page = self.journal.changed_since(self.cursor, PAGE).await.map_err(store)?;
            for record in &page {
                self.send(Message::Sandbox(self.rpc.wire(record))).await?;
                self.cursor = record.revision;
            }
            if page.len() < PAGE {
                break;
            }
        }
        self.cursor = self.cursor.max(revision);
        let bookmark =
            wire::WatchBookmark { journal_id: self.journal.id().to_owned(), revision: self.cursor };
        self.send(Message::Bookmark(bookmark)).await
    }

    async fn send(&self, message: Message) -> Result<(), Refusal> {
        let message = wire::WatchResponse { message: Some(message) };
        match timeout(PATIENCE, self.sender.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            // Nobody is there to read the reason.
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Refusal::new(Reason::TooManyCalls, "the watcher reads too slowly")),
        }
    }
}

fn store(error: crate::journal::Error) -> Refusal {
    refusal(error.into())
}
