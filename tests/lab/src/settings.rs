//! Settings with which a lab was started, saved so that a node boots the same later.

use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::layout::{Layout, NodeId};

/// A node's share of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// CPU quota in percent of one core.
    pub cpu_percent: u32,
    /// Memory limit in MiB, for all containers of the node together.
    pub memory_mib: u64,
    /// Size of the sparse disk in GiB.
    pub disk_gib: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { cpu_percent: 200, memory_mib: 6 * 1024, disk_gib: 20 }
    }
}

/// Settings with which a lab was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub nodes: u8,
    /// Limits of each node.
    pub limits: Limits,
    /// Whether sandboxes reach the world outside.
    #[serde(default)]
    pub way_out: bool,
}

impl Settings {
    /// Returns the ids of the nodes.
    pub fn node_ids(&self) -> Vec<NodeId> {
        NodeId::first(self.nodes)
    }

    /// Reads the saved settings.
    pub fn load(layout: &Layout) -> Result<Settings> {
        let file = layout.settings();
        let text = fs::read_to_string(&file)
            .with_context(|| format!("there is no lab in {}: start it", layout.dir().display()))?;
        toml::from_str(&text).with_context(|| format!("{} is broken", file.display()))
    }

    /// Saves the settings.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        fs::write(layout.settings(), toml::to_string(self)?).context("cannot write the settings")
    }
}
