//! What a lab was started with, kept so that a node boots the same later.

use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::layout::{Layout, NodeId};

/// A node's share of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// In percent of one core.
    pub cpu_percent: u32,
    /// In MiB, all its containers together.
    pub memory_mib: u64,
    /// The size of its sparse disk in GiB.
    pub disk_gib: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { cpu_percent: 200, memory_mib: 6 * 1024, disk_gib: 20 }
    }
}

/// What a lab was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How many nodes it has.
    pub nodes: u8,
    /// What each may use.
    pub limits: Limits,
}

impl Settings {
    /// The nodes.
    pub fn node_ids(&self) -> Vec<NodeId> {
        NodeId::first(self.nodes)
    }

    /// Reads them back.
    pub fn load(layout: &Layout) -> Result<Settings> {
        let file = layout.settings();
        let text = fs::read_to_string(&file)
            .with_context(|| format!("there is no lab in {}: start it", layout.dir().display()))?;
        toml::from_str(&text).with_context(|| format!("{} is broken", file.display()))
    }

    /// Writes them.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        fs::write(layout.settings(), toml::to_string(self)?).context("cannot write the settings")
    }
}
