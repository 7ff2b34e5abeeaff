//! The nodes: the only module that speaks `agent.v1`. `client` makes calls over any byte stream,
//! `bulk` shares out the streams of commands and files, `places` the calls about sandboxes, `link` keeps a watch on each agent,
//! `reports` feeds the inventory from it, `registry` knows the nodes and their load, `own_certificate`
//! tells when the controller's is not renewed, `vmids` finds nodes that number their sandboxes alike, `epoch` is the
//! fencing number, `fake` is an agent for tests and simulations.
//!
//! An agent's status is decoded into `Error` here and never passed on. A node's report of a sandbox
//! is kept as the message that it sent; its identities are checked before use.

mod answer;
mod bulk;
pub mod calls;
mod certificates;
pub mod client;
mod connector;
pub mod epoch;
pub mod fake;
mod growth;
mod link;
mod names;
mod output;
mod own_certificate;
mod places;
pub mod registry;
mod renew;
mod reports;
mod sandbox_calls;
mod state;
mod vmids;

use std::time::Duration;

use proto::Reason;

pub use bulk::StreamOwner;
pub use certificates::NodeCertificates;
pub use client::{Client, CreateOrder};
pub use connector::{Connector, Lane, TlsConnector};
pub use growth::GrowthGuard;
pub use places::Origin;
pub use registry::{Nodes, Options};
pub use sandbox_calls::{Exposed, SandboxCalls};
pub use state::{Node, NodeStatus};

/// Result of a call of an agent.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a call to an agent, by what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The agent refused. Nothing was changed, but for `files_written`.
    #[error("{message}")]
    Refused {
        /// Reason of the agent.
        reason: Reason,
        /// Message of the agent.
        message: String,
        /// Time after which the call may be tried again.
        retry_after: Option<Duration>,
        /// Number of files that were written before the one that failed.
        files_written: Option<u32>,
    },
    /// The call was never sent: nothing was changed.
    #[error("its agent cannot be reached: {0}")]
    Unreachable(String),
    /// The call may have been carried out or not.
    #[error("what became of the call is not known: {0}")]
    Unknown(String),
    /// As `Unknown`, and an answer needed only the agent itself: see `calls::Silence`.
    #[error("its agent does not answer: {0}")]
    Silent(String),
    /// The answer is invalid.
    #[error("its agent sent an invalid answer: {0}")]
    Nonsense(String),
}

impl Error {
    /// Returns the reason of a refusal.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            Self::Unreachable(_) | Self::Unknown(_) | Self::Silent(_) | Self::Nonsense(_) => None,
        }
    }

    /// Returns true when the node refused because it does not know the sandbox.
    pub fn is_not_found(&self) -> bool {
        self.reason() == Some(Reason::SandboxNotFound)
    }
}
