//! Durable state of the controller: creations, tokens, nodes, its epoch. A narrow trait with two
//! implementations that pass one suite: `sqlite` (WAL, synchronous=FULL, one writer thread, group
//! commit) and `memory` for simulations. `Ok` from a write means: it survives a power cut.
//!
//! What is stored and why: `sandboxes` is one row per creation. It binds a request_id to one
//! sandbox, lets a creation continue after a crash, holds the decision for `explain`, and the last
//! state that the node reported, so that a sandbox on a node that is down is UNREACHABLE and never
//! "not found". That state is written behind the watch streams and may lag; the nodes' journals are
//! the truth. Nothing is ever deleted on a node because it is missing here.
//! `events` is the event log. A reported state is stored in the same write as its events, so that
//! after a crash the node's next report yields exactly the missing ones.

mod access;
mod enrolment_tables;
pub mod enrolments;
mod events;
pub mod memory;
mod memory_access;
mod memory_enrolments;
mod memory_events;
mod rows;
mod sealed;
pub mod sqlite;
mod sqlite_access;
mod sqlite_enrolments;
mod sqlite_events;
pub mod sqlite_look;
mod sqlite_retention;

use proto::{
    id::SandboxId,
    name::{NodeName, RequestId, Team, UserLabel},
    secret::Secret,
};

pub use access::{AccessStore, Added, SshKey, Token, TokenFilter, TokenPlace};
pub use events::{Event, EventPage, Filter, Why};

/// Creations in one page.
pub const ROWS: u32 = 500;
/// Length of an hour, milliseconds.
pub const HOUR_MS: u64 = 3_600_000;

/// Result of a call of the store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The disk or the file failed.
    #[error("the store failed: {0}")]
    Failed(String),
    /// Another controller has claimed the store since: nothing was written, and nothing will be.
    #[error("a later controller has claimed the store")]
    Replaced,
}

/// State of a creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Being placed or made. With a node: that node may have received it.
    Placing,
    /// Up; its node owns it from here.
    Done,
    /// Failed or cancelled, and nothing of it is left.
    Failed,
}

/// A creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Team that owns it.
    pub team: Team,
    /// User of the token that asked for it.
    pub user: Option<UserLabel>,
    /// Idempotency key of the team.
    pub request_id: RequestId,
    /// SHA-256 of the request body, hex; empty when the row was rebuilt from a node.
    pub digest: String,
    /// Request body, protobuf; empty likewise.
    pub request: Secret<Vec<u8>>,
    /// State of the creation.
    pub state: State,
    /// Node of the current attempt.
    pub node: Option<NodeName>,
    /// Number of the current attempt, from 1; 0 before the first.
    pub attempt: u32,
    /// JSON of the decision; empty when none was made.
    pub decision: String,
    /// Whether a deletion was requested during the creation.
    pub cancelled: bool,
    /// Whether the request_id is free again.
    pub released: bool,
    /// Time of its acceptance, milliseconds since 1970.
    pub created_ms: u64,
    /// Time of its end, milliseconds since 1970; 0 while it is alive.
    pub ended_ms: u64,
    /// Last known state of the sandbox, protobuf.
    pub last: Vec<u8>,
}

/// Most bytes of files that the creations of a team keep, and those of all teams.
pub const FILES_BYTES_MAX: (u64, u64) = (32 << 20, 256 << 20);

/// Result of `begin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// Written together with the event, which has this revision.
    New(u64),
    /// The request_id is taken by this creation.
    Taken(Box<Row>),
    /// The files of creations under way are too large in total.
    Full,
}

/// The next attempt of a creation.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Chosen node.
    pub node: NodeName,
    /// Number of the attempt.
    pub attempt: u32,
    /// JSON of the decision.
    pub decision: String,
    /// Node and attempt that are abandoned with unknown outcome; they get a pending cancel.
    pub abandoned: Option<(NodeName, u32)>,
}

/// State of a sandbox that a node reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownState {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Team that owns it.
    pub team: Team,
    /// Idempotency key of the team.
    pub request_id: RequestId,
    /// Node that has it.
    pub node: NodeName,
    /// Attempt that made it.
    pub attempt: u32,
    /// Time of its creation, milliseconds since 1970.
    pub created_ms: u64,
    /// Time of its end, milliseconds since 1970; 0 while it is alive.
    pub ended_ms: u64,
    /// Reported message, protobuf.
    pub last: Vec<u8>,
}

/// The store. Every method is one transaction. A handle that has claimed the store can write until
/// another handle claims it: of two controllers over one store only the later one writes, however
/// long the other runs. Any handle can write tokens.
#[async_trait::async_trait]
pub trait Store: AccessStore + enrolments::Enrolments {
    /// Adds a creation, its files and the event of its request, unless the team already uses the
    /// request_id.
    async fn begin(&self, row: Row, files: Option<Vec<u8>>, asked: Event) -> Result<Begun>;

    /// Returns the files of a creation that is neither done nor failed, if it has any.
    async fn files(&self, id: &SandboxId) -> Result<Option<Vec<u8>>>;

    /// Returns the creation that holds a request_id.
    async fn by_request(&self, team: &Team, request: &RequestId) -> Result<Option<Row>>;

    /// Returns one creation.
    async fn get(&self, id: &SandboxId) -> Result<Option<Row>>;

    /// Returns at most `limit` creations after `id`, ordered by id.
    async fn after(&self, id: Option<SandboxId>, limit: u32) -> Result<Vec<Row>>;

    /// Returns all creations. They are large: prefer pages.
    async fn all(&self) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let page = self.after(rows.last().map(|row| row.id), ROWS).await?;
            let last = page.len() < ROWS as usize;
            rows.extend(page);
            if last {
                return Ok(rows);
            }
        }
    }

    /// Records the next attempt, before its node receives it. False unless it is being placed.
    async fn choose(&self, id: &SandboxId, choice: Choice) -> Result<bool>;

    /// Records that a creation is up, with its events, and drops its files; returns the log's last
    /// revision.
    async fn done(&self, id: &SandboxId, last: Vec<u8>, events: Vec<Event>) -> Result<u64>;

    /// Records that a creation failed, and drops its files. `released` frees the request_id.
    async fn failed(
        &self,
        id: &SandboxId,
        last: Vec<u8>,
        released: bool,
        now_ms: u64,
    ) -> Result<()>;

    /// Records that a sandbox under creation is to be deleted.
    async fn cancel(&self, id: &SandboxId) -> Result<()>;

    /// Appends events and stores reported states. Adds rows for unknown sandboxes (after this store
    /// was lost); leaves creations under way as they are. Returns the log's last revision.
    async fn put_states(&self, states: Vec<KnownState>, events: Vec<Event>) -> Result<u64>;

    /// Returns at most `limit` events after a revision.
    async fn events(&self, after: u64, filter: Filter, limit: u32) -> Result<EventPage>;

    /// Returns the revision before the last `count` events; with 0, the last revision.
    async fn before_last(&self, filter: Filter, count: u32) -> Result<u64>;

    /// Returns the hours since 1970 in which there are events, of the `newest` ones; the latest hour first.
    async fn event_hours(&self, newest: u32) -> Result<Vec<u64>>;

    /// Removes at most `limit` of the oldest events that are from before `before_ms`. Returns how
    /// many. Later revisions continue the sequence.
    async fn prune_events(&self, before_ms: u64, limit: u32) -> Result<u64>;

    /// Removes the `count` oldest events of a team, or those of no team, which are the nodes'.
    async fn drop_events(&self, share: Option<Team>, count: u32) -> Result<()>;

    /// Returns the number of events of each team that has any, and of those of no team.
    async fn event_counts(&self) -> Result<Vec<(Option<Team>, u64)>>;

    /// Returns the number of events of a team.
    async fn events_of_team(&self, team: &Team) -> Result<u64>;

    /// Removes creations that ended before `before_ms`; returns their ids. Also removes the pending cancels of
    /// forgotten nodes for creations that are not stored any more.
    async fn forget(&self, before_ms: u64) -> Result<Vec<SandboxId>>;

    /// Returns the pending cancels of a node: attempts that it must cancel.
    async fn pending_cancels(&self, node: &NodeName) -> Result<Vec<(SandboxId, u32)>>;

    /// Removes a pending cancel that the node has acknowledged.
    async fn cancel_delivered(&self, node: &NodeName, id: &SandboxId, attempt: u32) -> Result<()>;

    /// Stores the address of a node's agent.
    async fn put_node(&self, name: &NodeName, address: &str) -> Result<()>;

    /// Marks a node as forgotten until `put_node`. Keeps its pending cancels, for the case that it comes back.
    async fn forget_node(&self, name: &NodeName) -> Result<()>;

    /// Returns the forgotten nodes, ordered by name.
    async fn forgotten_nodes(&self) -> Result<Vec<NodeName>>;

    /// Returns all nodes that are known and not forgotten, with their addresses.
    async fn nodes(&self) -> Result<Vec<(NodeName, String)>>;

    /// Claims the store for this handle, with an epoch above all earlier ones.
    async fn claim(&self) -> Result<u64>;

    /// Raises the epoch of the handle that has claimed the store to at least `least`; returns it.
    /// The epoch never decreases.
    async fn raise(&self, least: u64) -> Result<u64>;
}

#[cfg(test)]
mod enrolments_suite;
#[cfg(test)]
mod sealed_suite;
#[cfg(test)]
mod suite;
#[cfg(test)]
mod suite_access;
