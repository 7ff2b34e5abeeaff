//! Tables of the nodes that joined: one-time tokens, who joined, and the certificates that they were
//! given. A table of its own beside `nodes`, which holds the addresses of all nodes.

use proto::name::NodeName;

use super::Result;

/// A one-time token of a node, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeToken {
    /// Public id.
    pub id: String,
    /// SHA-256 of the secret.
    pub hash: Vec<u8>,
    /// Node that it is for.
    pub node: NodeName,
    /// Time of its issue, milliseconds since 1970.
    pub created_ms: u64,
    /// End of its life, milliseconds since 1970.
    pub expires_ms: u64,
    /// Time of its use; 0 while it is unused.
    pub used_ms: u64,
    /// SHA-256 of the key that it was used for; empty while it is unused.
    pub key: Vec<u8>,
}

/// Node that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// Name of the node.
    pub node: NodeName,
    /// Address of its agent; empty when the node was forgotten.
    pub address: String,
    /// Addresses of its sandboxes; empty when the node was forgotten.
    pub pool: String,
    /// Time of its last join, milliseconds since 1970.
    pub joined_ms: u64,
    /// Time of its revocation; 0 while it is accepted.
    pub revoked_ms: u64,
    /// Whether only the certificates in `serials` are accepted, because it was revoked once.
    pub only_listed: bool,
    /// Numbers of the certificates that it was given since then and that have not ended.
    pub serials: Vec<String>,
}

/// Certificate that a node was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Its number.
    pub serial: String,
    /// End of its life, milliseconds since 1970.
    pub not_after_ms: u64,
    /// Number of the one that the node uses until it has this one. So long it counts, also when it seems to have ended:
    /// the clock may be ahead, and then the node refuses this one.
    pub in_use: Option<String>,
}

/// A node that is admitted.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Id of the token.
    pub token: String,
    /// SHA-256 of the public key of the node's agent.
    pub key: Vec<u8>,
    /// Name of the node.
    pub node: NodeName,
    /// Address of its agent.
    pub address: String,
    /// Addresses of its sandboxes.
    pub pool: String,
    /// Certificate of its agent.
    pub issued: Issued,
    /// Time of the join, milliseconds since 1970.
    pub now_ms: u64,
}

/// Part of the store for nodes that join.
#[async_trait::async_trait]
pub trait Enrolments: Send + Sync {
    /// Adds a token. Unused tokens of the same node, and those that ended long ago, are removed.
    async fn add_node_token(&self, token: NodeToken) -> Result<()>;

    /// Returns one token.
    async fn node_token(&self, id: &str) -> Result<Option<NodeToken>>;

    /// Uses a token and stores the node with its certificate, in one step: whoever comes second is
    /// refused. A token that was used for the same key is used again. False when the token is used
    /// for another, expired, of another node, or unknown; nothing is written then.
    async fn admit(&self, admission: Admission) -> Result<bool>;

    /// Returns the nodes that joined, ordered by name; forgotten and revoked ones, too.
    async fn enrolments(&self) -> Result<Vec<Enrolment>>;

    /// Adds a certificate of a node before the node gets it, and drops those of the node that have ended. False when the
    /// node is revoked.
    async fn add_certificate(&self, node: &NodeName, issued: Issued, now_ms: u64) -> Result<bool>;

    /// Revokes a node and all certificates that it has, whether it joined or not.
    async fn revoke_node(&self, node: &NodeName, now_ms: u64) -> Result<()>;
}
