//! Keeps a watch on one agent for as long as the controller lives.
//!
//! ```text
//!  DOWN -> hello -> raise the epoch -> pending cancels -> watch -> (RESET, inventory) -> UP
//!   ^                                                                                    |
//!   +---- error, or no message for 5 s <-------------------------------------------------+
//! ```
//! Pending cancels are sent before anything else, so that a stale attempt cannot be taken for the
//! sandbox.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    agent::v1::watch_response::Message,
    id::{SandboxId, SandboxRef},
    name::NodeName,
    sandbox::v1::Phase,
};
use tokio::time::{Instant, timeout};

use super::{Error, Node, Nodes, Origin, Result, calls::Call};
use crate::inventory::commands::AWAY;

/// Longest time without a message. An agent reports every second; a silent one is down.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest pause between two attempts to connect.
const PAUSE_MAX: Duration = Duration::from_secs(2);
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Time after which the sandboxes of a down node are unreachable; an agent restart takes less.
const GRACE: Duration = Duration::from_secs(5);

/// Watches `node` until the future is dropped.
pub(super) async fn keep(nodes: Arc<Nodes>, node: Arc<Node>) {
    let mut pause = PAUSE_MIN;
    let mut logged = false;
    let mut down_since = Instant::now();
    loop {
        let error = match timeout_at_grace(&nodes, &node, session(&nodes, &node), down_since).await
        {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let was_up = nodes.set_down(&node, Some(error.to_string()));
        if was_up || !logged {
            tracing::warn!(node = %node.name, %error, "node is down");
            nodes.log_up_or_down(&node, false, error.to_string());
            logged = true;
        } else {
            tracing::debug!(node = %node.name, %error, "node does not answer");
        }
        if was_up {
            (pause, down_since) = (PAUSE_MIN, Instant::now());
            nodes.announce();
        }
        let sleep = tokio::time::sleep(jittered(&nodes, pause));
        tokio::pin!(sleep);
        tokio::select! {
            () = &mut sleep => {}
            () = mark_unreachable(&nodes, &node, down_since) => sleep.await,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Runs a session, and marks the node's sandboxes unreachable when it takes too long to come up. What it runs
/// does not count any more when that takes much longer.
async fn timeout_at_grace<T>(
    nodes: &Nodes,
    node: &Node,
    session: impl Future<Output = Result<T>>,
    down_since: Instant,
) -> Result<T> {
    tokio::pin!(session);
    tokio::select! {
        result = &mut session => result,
        () = mark_unreachable(nodes, node, down_since) => session.await,
    }
}

async fn mark_unreachable(nodes: &Nodes, node: &Node, down_since: Instant) {
    tokio::time::sleep_until(down_since + GRACE).await;
    if node.down().is_some() {
        nodes.cache.set_up(&node.name, false);
    }
    tokio::time::sleep_until(down_since + AWAY).await;
    if node.down().is_some() {
        nodes.commands.away(&node.name);
    }
}

fn jittered(nodes: &Nodes, pause: Duration) -> Duration {
    let mut byte = [0];
    nodes.random.fill(&mut byte);
    pause.mul_f64(0.75 + f64::from(byte[0]) / 510.0)
}

async fn session(nodes: &Arc<Nodes>, node: &Node) -> Result<std::convert::Infallible> {
    let hello = node.client.hello(0).await?;
    if hello.node != node.name.as_str() {
        return Err(Error::Nonsense(format!("it says that it is {}", hello.node)));
    }
    let handshaken = nodes.connected(node, &hello);
    nodes.commands.connected(&node.name);
    let mut claimed = 0;
    nodes
        .epoch
        .handshake(hello.epoch, handshaken)
        .await
        .map_err(|e| Error::Unknown(e.to_string()))?;
    if !nodes.epoch.fenced() {
        claimed = claim(nodes, node).await?;
        send_pending_cancels(nodes, node).await?;
    }
    nodes.discovered(&hello.members).await;

    let known = node.journal().filter(|(journal, _)| *journal == hello.journal_id);
    let (journal, revision) = known.unwrap_or_default();
    let mut stream = node.client.watch(journal, revision).await?;
    let mut whole = true;
    loop {
        let message = timeout(SILENCE, stream.message())
            .await
            .map_err(|_| Error::Unknown(format!("it said nothing for {} s", SILENCE.as_secs())))?;
        let message = message.map_err(|status| super::answer::decode(Call::Watch, &status))?;
        let Some(message) = message else {
            return Err(Error::Unreachable("it ended the watch".into()));
        };
        // An agent reports every second, so this is often enough.
        node.client.close_idle();
        receive(nodes, node, message.message, &mut whole);
        if !nodes.epoch.fenced() {
            // Another node had seen a higher epoch: nodes that know our former one get the new one.
            if claimed < nodes.epoch.get() {
                claimed = claim(nodes, node).await?;
            }
            while let Some((id, attempt)) = node.next_stale_attempt() {
                cancel_attempt(nodes, node, id, attempt).await?;
            }
            for (id, to) in node.moved() {
                drop_moved(nodes, node, id, to).await?;
            }
        }
        if whole && nodes.set_down(node, None) {
            tracing::info!(node = %node.name, version = hello.version, "node is up");
            nodes.cache.set_up(&node.name, true);
            nodes.log_up_or_down(node, true, format!("its agent is {}", hello.version));
            nodes.announce();
        }
    }
}

/// Claims the node: from here on it refuses earlier controllers. Returns the epoch that it was told.
async fn claim(nodes: &Nodes, node: &Node) -> Result<u64> {
    let epoch = nodes.epoch.get();
    node.client.hello(epoch).await.inspect_err(|error| nodes.fence_if_replaced(error))?;
    Ok(epoch)
}

/// Applies a message of the watch. `whole`: no inventory is under way.
fn receive(nodes: &Nodes, node: &Node, message: Option<Message>, whole: &mut bool) {
    match message {
        Some(Message::Reset(reset)) => {
            let before = node.journal().map(|(journal, _)| journal);
            nodes.cache.begin_inventory(&node.name, before.as_ref() == Some(&reset.journal_id));
            node.set_journal(None);
            *whole = false;
        }
        Some(Message::Sandbox(sandbox)) => nodes.apply(&node.name, sandbox),
        Some(Message::Bookmark(bookmark)) => {
            if !*whole {
                nodes.end_inventory(node);
                *whole = true;
            }
            node.set_journal(Some((bookmark.journal_id, bookmark.revision)));
        }
        Some(Message::Load(load)) => {
            nodes.commands.beat(&node.name, |id| nodes.cache.team_of_living(id));
            nodes.reported(node, load, true);
        }
        Some(Message::Execs(report)) => {
            let lives = |id: &SandboxId| nodes.cache.team_of_living(id);
            nodes.commands.report(&node.name, report, lives);
        }
        // From a later version of the agent.
        None => {}
    }
}

/// Sends the node its pending cancels.
async fn send_pending_cancels(nodes: &Nodes, node: &Node) -> Result<()> {
    let failed = |error: crate::store::Error| Error::Unknown(error.to_string());
    for (id, attempt) in nodes.store.pending_cancels(&node.name).await.map_err(failed)? {
        if cancel_attempt(nodes, node, id, attempt).await? {
            nodes.store.cancel_delivered(&node.name, &id, attempt).await.map_err(failed)?;
        }
    }
    Ok(())
}

/// Tells the node to drop a sandbox that has moved to another node, as an uninterrupted drain does.
/// A sandbox that is not dropped now is tried again with the node's next message.
async fn drop_moved(nodes: &Nodes, node: &Node, id: SandboxId, to: NodeName) -> Result<()> {
    let epoch = nodes.epoch.get();
    let entry = nodes.cache.get(&SandboxRef::Id(id));
    if let Some(entry) = entry.as_ref().filter(|entry| entry.ended()) {
        // The sandbox has ended on the other node by now.
        cancel_attempt(nodes, node, id, entry.sandbox.attempt).await?;
        node.has_dropped(&id);
        return Ok(());
    }
    let going = entry.filter(|entry| entry.sandbox.phase() == Phase::Deleting);
    if let Some(entry) = going
        && let Some(there) = nodes.get(&to)
    {
        // Deleted during the move; this node has no container to delete.
        let deleted = match there.client.calls(Origin::Controller, &entry.team) {
            Ok(calls) => calls.delete(epoch, &id, Duration::ZERO).await,
            Err(full) => Err(full),
        };
        match deleted {
            Ok(deleted) => nodes.apply(&to, deleted),
            Err(error) => tracing::warn!(node = %to, sandbox_id = %id, %error, "delete failed"),
        }
        return Ok(());
    }
    match node.client.release(epoch, &id, Some(&to)).await {
        Ok(left) => {
            node.has_dropped(&id);
            nodes.apply(&node.name, left);
        }
        Err(error) if error.is_not_found() => node.has_dropped(&id),
        Err(error @ Error::Refused { .. }) => {
            nodes.fence_if_replaced(&error);
            // The other node may be deleting it just now.
            tracing::debug!(node = %node.name, sandbox_id = %id, %error, "record not dropped yet");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Cancels an attempt on the node. False when the node has recorded the cancel and could not undo
/// the attempt yet: the next connection asks again.
async fn cancel_attempt(nodes: &Nodes, node: &Node, id: SandboxId, attempt: u32) -> Result<bool> {
    let epoch = nodes.epoch.get();
    let record = match node.client.cancel_create(epoch, &id, attempt).await {
        Ok(record) => record,
        // One attempt that cannot be undone now must not keep the whole node down.
        Err(error @ Error::Refused { .. }) if error.reason() != Some(Reason::StoreFailed) => {
            nodes.fence_if_replaced(&error);
            tracing::error!(node = %node.name, sandbox_id = %id, attempt, %error,
                "could not cancel a stale attempt");
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    tracing::info!(node = %node.name, sandbox_id = %id, attempt, held = record.is_some(),
        "cancelled a stale attempt");
    let logged = nodes.log_cancelled(node, &id, attempt, record.as_ref()).await;
    logged.map_err(|error| Error::Unknown(error.to_string()))?;
    Ok(true)
}
