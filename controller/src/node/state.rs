//! One node, as the registry knows it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use daemon::{peer::Validity, sync::Mutex};
use proto::{
    agent::v1::HelloResponse,
    id::SandboxId,
    name::NodeName,
    sandbox::v1::{self as wire, NodeLoad},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Client;

/// One node.
#[derive(Debug)]
pub struct Node {
    /// Name of the node.
    pub name: NodeName,
    /// Address of the agent.
    pub address: String,
    /// Calls to the agent.
    pub client: Client,
    /// Index in the fleet.
    pub(super) slot: u32,
    pub(super) state: Mutex<State>,
    /// Cancelled when the watch on it ends.
    pub(super) watch_stop: CancellationToken,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Reason why it is down; `None` when it is connected and its inventory is whole.
    pub(super) down: Option<String>,
    pub(super) version: String,
    /// Journal of its revisions, from the last connection.
    journal_id: Arc<str>,
    /// Journal and revision from which a watch can resume.
    journal: Option<(String, u64)>,
    pub(super) report: Option<(NodeLoad, Instant)>,
    /// Files whose change by hand became an event a short time ago, with the time of that.
    pub(super) edits_logged: BTreeMap<String, Instant>,
    /// No report has come over this connection yet.
    pub(super) first_report: bool,
    /// Stale attempts to cancel with its next message: the store with their pending cancels was lost, or got them
    /// when the node was connected already.
    stale_attempts: BTreeMap<SandboxId, u32>,
    /// Sandboxes that moved to other nodes, with the target: it must drop its records of them.
    moved: BTreeMap<SandboxId, NodeName>,
    /// Whether its inventory was whole at least once.
    pub(super) synced: bool,
    /// Whether it has answered us before; a higher epoch there then means that we were replaced.
    handshaken: bool,
    /// Bounds that it can put on sandboxes, by its first answer over this connection; `None` without a
    /// connection: it may come back with an older agent.
    keeps: Option<Keeps>,
}

/// Bounds that a node can put on what a sandbox reaches, and on who reaches it.
#[derive(Debug, Clone, Copy)]
struct Keeps {
    /// Nothing at all.
    closed: bool,
    /// The names of a list alone.
    to_names: bool,
    /// Open ports that not everybody reaches.
    ports: bool,
}

/// State of a node for operators.
#[derive(Debug, Clone)]
pub struct NodeStatus {
    /// Name of the node.
    pub name: NodeName,
    /// Address of the agent.
    pub address: String,
    /// Reason why it gets no new work; `None` when it does.
    pub not_ready: Option<String>,
    /// Version of its agent; empty before the first contact.
    pub version: String,
    /// Last report and its age.
    pub report: Option<(NodeLoad, Duration)>,
    /// Number of living sandboxes on it.
    pub sandboxes: u32,
    /// Certificate of its agent, as its last connection showed it.
    pub certificate: Option<Validity>,
}

impl Node {
    pub(super) fn new(
        name: NodeName,
        address: &str,
        (client, slot): (Client, u32),
        watch_stop: CancellationToken,
    ) -> Self {
        let state = State {
            down: Some("not connected yet".into()),
            first_report: true,
            ..State::default()
        };
        Self {
            name,
            address: address.to_owned(),
            client,
            slot,
            state: Mutex::new(state),
            watch_stop,
        }
    }

    /// Returns why it cannot be called now; `None` when it can.
    pub fn down(&self) -> Option<String> {
        self.state.lock().down.clone()
    }

    pub(super) fn journal(&self) -> Option<(String, u64)> {
        self.state.lock().journal.clone()
    }

    pub(super) fn set_journal(&self, journal: Option<(String, u64)>) {
        self.state.lock().journal = journal;
    }

    /// Records a new connection; returns true when it is not the first.
    pub(super) fn connected(&self, hello: &HelloResponse) -> bool {
        let mut state = self.state.lock();
        hello.version.clone_into(&mut state.version);
        state.journal_id = hello.journal_id.as_str().into();
        state.keeps = Some(Keeps {
            closed: hello.closes_egress,
            to_names: hello.filters_egress,
            ports: hello.guards_ports,
        });
        state.first_report = true;
        std::mem::replace(&mut state.handshaken, true)
    }

    /// Returns whether it can keep a sandbox with this egress from reaching more: an older agent, or
    /// one that does not isolate, would let it. `None` while it is not connected.
    pub fn keeps_to(&self, egress: wire::Egress) -> Option<bool> {
        let keeps = self.state.lock().keeps;
        match egress {
            wire::Egress::Unspecified | wire::Egress::Open => Some(true),
            wire::Egress::None => keeps.map(|keeps| keeps.closed),
            wire::Egress::Allow => keeps.map(|keeps| keeps.closed && keeps.to_names),
        }
    }

    /// Returns whether it knows the visibility of ports: to an older agent every open port is public. `None` while
    /// it is not connected.
    pub fn guards_ports(&self) -> Option<bool> {
        self.state.lock().keeps.map(|keeps| keeps.ports)
    }

    /// Returns the journal of its revisions.
    pub(super) fn journal_id(&self) -> Arc<str> {
        self.state.lock().journal_id.clone()
    }

    /// Records a stale attempt that must be cancelled on it.
    pub(super) fn add_stale_attempt(&self, id: SandboxId, attempt: u32) {
        self.state.lock().stale_attempts.insert(id, attempt);
    }

    /// Records a sandbox that it must drop, because `to` has imported it.
    pub(super) fn add_moved(&self, id: SandboxId, to: NodeName) {
        self.state.lock().moved.insert(id, to);
    }

    /// Takes one stale attempt that must be cancelled on it.
    pub(super) fn next_stale_attempt(&self) -> Option<(SandboxId, u32)> {
        self.state.lock().stale_attempts.pop_first()
    }

    /// Returns the sandboxes that it must drop, with the nodes that have imported them.
    pub(super) fn moved(&self) -> BTreeMap<SandboxId, NodeName> {
        self.state.lock().moved.clone()
    }

    /// Records that it has dropped a sandbox.
    pub(super) fn has_dropped(&self, id: &SandboxId) {
        self.state.lock().moved.remove(id);
    }

    pub(super) fn set_down(&self, down: Option<String>) -> bool {
        let mut state = self.state.lock();
        let changed = state.down.is_some() != down.is_some();
        state.synced |= down.is_none();
        if down.is_some() {
            state.keeps = None;
        }
        state.down = down;
        changed
    }
}
