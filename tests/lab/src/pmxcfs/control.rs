//! Orders to the daemon over its unix socket: one line of JSON each way.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::cluster::Cluster;
use crate::wire;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Order {
    /// Returns the cluster.
    State,
    /// Cuts the node off from the others, or reconnects it.
    Quorum {
        node: String,
        /// False: cut off. True: it has quorum if a majority is up.
        on: bool,
    },
    /// Restarts the node's pmxcfs with corosync down, or reconnects it to corosync.
    Corosync {
        node: String,
        /// False: down.
        on: bool,
    },
    /// Stops the node's pmxcfs, which leaves its /etc/pve empty, or starts it again.
    Running {
        node: String,
        /// False: stopped.
        on: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Reason of a refusal.
    pub error: Option<String>,
    /// The cluster after the order.
    pub cluster: Cluster,
}

/// The daemon of a lab, identified by its socket.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// Returns the daemon that listens on `socket`.
    pub fn new(socket: &Path) -> Control {
        Control { socket: socket.to_owned() }
    }

    /// Sends an order and returns the cluster after it.
    pub fn give(&self, order: &Order) -> Result<Cluster> {
        let answer: Answer = wire::call(&self.socket, order, wire::ANSWER_WITHIN)?;
        match answer.error {
            Some(error) => Err(anyhow::anyhow!("pmxcfs refused: {error}")),
            None => Ok(answer.cluster),
        }
    }
}
