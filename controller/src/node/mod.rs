//! The nodes: the only module that speaks `agent.v1`. `client` makes calls over any byte stream,
//! `bulk` shares out the streams of commands and files, `link` keeps a watch on each agent and feeds `cache`, `registry` knows the nodes and their load,
//! `epoch` is the fencing number, `fake` is an agent for tests and simulations.
//!
//! An agent's status is never handed on: it is decoded into `Error` here. What a node says of a
//! sandbox is kept as the message that it sent; its identities are checked before anything is done
//! with them.

mod bulk;
pub mod cache;
pub mod calls;
pub mod client;
pub mod epoch;
pub mod fake;
mod kept;
mod link;
mod output;
pub mod registry;

use std::time::Duration;

use proto::Reason;

pub use bulk::Whose;
pub use cache::{Cache, Entry};
pub use client::{Client, Connector, Lane, Order, TlsConnector};
pub use registry::{Node, NodeStatus, Nodes, Options};

/// What came of a call, by what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The agent answered no. Nothing was changed.
    #[error("{message}")]
    Refused {
        /// The agent's reason.
        reason: Reason,
        /// The agent's sentence.
        message: String,
        /// When it may be tried again.
        retry_after: Option<Duration>,
    },
    /// The call never left: nothing was changed.
    #[error("its agent cannot be reached: {0}")]
    Unreachable(String),
    /// The call may have been carried out or not.
    #[error("what became of the call is not known: {0}")]
    Unknown(String),
    /// The same, and nothing but the agent itself was needed for an answer: see `calls::Silence`.
    #[error("its agent does not answer: {0}")]
    Silent(String),
    /// The answer makes no sense.
    #[error("its agent answered nonsense: {0}")]
    Nonsense(String),
}

impl Error {
    /// The reason of a refusal.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            Self::Unreachable(_) | Self::Unknown(_) | Self::Silent(_) | Self::Nonsense(_) => None,
        }
    }

    /// A refusal because the node does not know the sandbox.
    pub fn is_not_found(&self) -> bool {
        self.reason() == Some(Reason::SandboxNotFound)
    }
}
