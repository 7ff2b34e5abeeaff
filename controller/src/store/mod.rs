//! What the controller must remember: creations, tokens, nodes, its epoch. A narrow trait with two
//! implementations that pass one suite: `sqlite` (WAL, synchronous=FULL, one writer thread, group
//! commit) and `memory` for simulations. `Ok` from a write means: it survives a power cut.
//!
//! What is stored and why: `sandboxes` is one row a creation. It makes a request_id mean one
//! sandbox, lets a crash in mid-create be finished, holds the decision for `explain`, and remembers
//! what the node last said, so that a sandbox on a node that is down is UNREACHABLE and never
//! "not found". That memory is written behind the watch streams and may lag; the nodes' journals
//! are the truth. Nothing is ever deleted on a node because it is missing here.
//! `events` is the log of what happened. What a node said is remembered in the same write as the
//! events that it meant, so that after a crash the node's next word means what is missing, no more.

mod events;
pub mod memory;
mod rows;
pub mod sqlite;
mod sqlite_events;

use proto::{
    id::SandboxId,
    name::{NodeName, RequestId, Team},
};

pub use events::{Event, EventPage, Filter, Why};

/// Creations in one page.
pub const ROWS: u32 = 500;

/// The store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The disk, or the file.
    #[error("the store failed: {0}")]
    Failed(String),
    /// Another controller has claimed it since: nothing was written, and nothing will be.
    #[error("a later controller has claimed the store")]
    Replaced,
}

/// Where a creation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Being placed or made. With a node: that node may have heard of it.
    Placing,
    /// It came up; its node owns it from here.
    Done,
    /// It failed or was called off, and nothing of it is left.
    Failed,
}

/// One creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Identity.
    pub id: SandboxId,
    /// Owner.
    pub team: Team,
    /// The owner's idempotency key.
    pub request_id: RequestId,
    /// SHA-256 of the body, hex; empty when the row was rebuilt from a node.
    pub digest: String,
    /// The body, protobuf; empty likewise.
    pub request: Vec<u8>,
    /// Where it is.
    pub state: State,
    /// Node of the current attempt.
    pub node: Option<NodeName>,
    /// The current attempt, from 1; 0 before the first.
    pub attempt: u32,
    /// JSON of the decision; empty when none was made.
    pub decision: String,
    /// A deletion was asked for in the middle.
    pub cancelled: bool,
    /// The request_id is free again.
    pub released: bool,
    /// When it was accepted.
    pub created_ms: u64,
    /// When it ended; 0 while it lives.
    pub ended_ms: u64,
    /// What was last known of the sandbox, protobuf.
    pub last: Vec<u8>,
}

/// Answer to `begin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// Written, and the event with it, which has this revision.
    New(u64),
    /// The request_id is taken: by this.
    Taken(Box<Row>),
}

/// The next attempt of a creation.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Where it goes.
    pub node: NodeName,
    /// Its number.
    pub attempt: u32,
    /// JSON of the decision.
    pub decision: String,
    /// Node and attempt that are given up without knowing what became of them.
    pub leave: Option<(NodeName, u32)>,
}

/// What a node said of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Identity.
    pub id: SandboxId,
    /// Owner.
    pub team: Team,
    /// Key.
    pub request_id: RequestId,
    /// Where.
    pub node: NodeName,
    /// The attempt that made it.
    pub attempt: u32,
    /// When it was created.
    pub created_ms: u64,
    /// When it ended; 0 while it lives.
    pub ended_ms: u64,
    /// The message, protobuf.
    pub last: Vec<u8>,
}

/// A bearer token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Public part.
    pub id: String,
    /// SHA-256 of the secret.
    pub hash: Vec<u8>,
    /// Whose it is.
    pub team: Team,
    /// What it may do, separated by spaces.
    pub scopes: String,
    /// When it was made.
    pub created_ms: u64,
    /// When it was revoked; 0 while it is good.
    pub revoked_ms: u64,
}

/// The store. Every method is one transaction. A handle that has claimed it writes only as long as
/// no other claims it after that: of two controllers over one store the later alone writes, however
/// long the other goes on. Tokens are written by anybody.
#[async_trait::async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Writes a new creation and the event that says who asked for it, unless its team uses the
    /// request_id already.
    async fn begin(&self, row: Row, asked: Event) -> Result<Begun, Error>;

    /// The creation that holds a request_id.
    async fn by_request(&self, team: &Team, request: &RequestId) -> Result<Option<Row>, Error>;

    /// One creation.
    async fn get(&self, id: &SandboxId) -> Result<Option<Row>, Error>;

    /// At most `limit` creations that are not forgotten, ordered by id, from after this one on.
    async fn after(&self, id: Option<SandboxId>, limit: u32) -> Result<Vec<Row>, Error>;

    /// All of them. They are large: who can goes through them by pages.
    async fn all(&self) -> Result<Vec<Row>, Error> {
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

    /// Writes down the next attempt, before its node hears of it. False when the creation is not
    /// being placed any more.
    async fn choose(&self, id: &SandboxId, choice: Choice) -> Result<bool, Error>;

    /// It came up, which `events` tell; returns the log's last revision.
    async fn done(&self, id: &SandboxId, last: Vec<u8>, events: Vec<Event>) -> Result<u64, Error>;

    /// It ended. `released` frees the request_id.
    async fn failed(
        &self,
        id: &SandboxId,
        last: Vec<u8>,
        released: bool,
        now_ms: u64,
    ) -> Result<(), Error>;

    /// A deletion is wanted although it is still being created.
    async fn cancel(&self, id: &SandboxId) -> Result<(), Error>;

    /// Appends events and remembers what nodes said. Adds rows for sandboxes that are not known
    /// (after this store was lost); leaves creations in the middle as they are. Returns the log's
    /// last revision.
    async fn remember(&self, seen: Vec<Seen>, events: Vec<Event>) -> Result<u64, Error>;

    /// At most `limit` events after a revision.
    async fn events(&self, after: u64, filter: Filter, limit: u32) -> Result<EventPage, Error>;

    /// The revision after which the last `count` events stand; with 0, all that come.
    async fn before_last(&self, filter: Filter, count: u32) -> Result<u64, Error>;

    /// Removes at most `limit` of the oldest events: those from before `before_ms`, and those
    /// beyond the newest `max`. Returns how many. Revisions go on where they were.
    async fn prune_events(&self, before_ms: u64, max: u64, limit: u32) -> Result<u64, Error>;

    /// Removes creations that ended before `before_ms`; returns them.
    async fn forget(&self, before_ms: u64) -> Result<Vec<SandboxId>, Error>;

    /// Attempts that a node must hear to be off.
    async fn owed(&self, node: &NodeName) -> Result<Vec<(SandboxId, u32)>, Error>;

    /// The node has heard it.
    async fn paid(&self, node: &NodeName, id: &SandboxId, attempt: u32) -> Result<(), Error>;

    /// Adds a token.
    async fn add_token(&self, token: Token) -> Result<(), Error>;

    /// One token, revoked or not.
    async fn token(&self, id: &str) -> Result<Option<Token>, Error>;

    /// All tokens, ordered by the time they were made.
    async fn tokens(&self) -> Result<Vec<Token>, Error>;

    /// Revokes a token. False when there is none.
    async fn revoke_token(&self, id: &str, now_ms: u64) -> Result<bool, Error>;

    /// Remembers where a node's agent is.
    async fn put_node(&self, name: &NodeName, address: &str) -> Result<(), Error>;

    /// A node is given up: it is no node any more, and is owed nothing. Remembered until it is put
    /// again.
    async fn forget_node(&self, name: &NodeName) -> Result<(), Error>;

    /// Nodes that were given up, ordered by name.
    async fn forgotten_nodes(&self) -> Result<Vec<NodeName>, Error>;

    /// All nodes that were ever seen and not given up, with their addresses.
    async fn nodes(&self) -> Result<Vec<(NodeName, String)>, Error>;

    /// Claims the store for this handle: an epoch above all that were used.
    async fn claim(&self) -> Result<u64, Error>;

    /// Raises the epoch of the handle that has claimed the store to at least `least`; returns it. It
    /// never falls.
    async fn raise(&self, least: u64) -> Result<u64, Error>;
}

#[cfg(test)]
mod suite;
