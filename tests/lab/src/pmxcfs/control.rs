//! The orders that the daemon takes over its unix socket: one line of JSON each way.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::cluster::Cluster;
use crate::wire;

/// An order to the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// Say who is in the cluster.
    State,
    /// Cut the node off from the others, or join it to them again.
    Quorum {
        /// The node.
        node: String,
        /// True: it has quorum if a majority is up.
        on: bool,
    },
    /// Start the node's pmxcfs anew while its corosync is down, or let it hear of corosync again.
    Corosync {
        /// The node.
        node: String,
        /// False: down.
        on: bool,
    },
    /// Stop the node's pmxcfs (its /etc/pve is empty), or start it again.
    Running {
        /// The node.
        node: String,
        /// False: stopped.
        on: bool,
    },
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Why the order was refused.
    pub error: Option<String>,
    /// The cluster after the order.
    pub cluster: Cluster,
}

/// The daemon of a lab, by its socket.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// The daemon that listens on `socket`.
    pub fn new(socket: &Path) -> Control {
        Control { socket: socket.to_owned() }
    }

    /// Gives an order and returns the cluster after it.
    pub fn give(&self, order: &Order) -> Result<Cluster> {
        let answer: Answer = wire::call(&self.socket, order, wire::ANSWER_WITHIN)?;
        match answer.error {
            Some(error) => Err(anyhow::anyhow!("pmxcfs refused: {error}")),
            None => Ok(answer.cluster),
        }
    }
}
