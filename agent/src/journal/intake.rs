//! Whether the node takes new work, as an operator said last.

use serde::{Deserialize, Serialize};

/// What an operator wants of the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intake {
    /// New sandboxes are made here.
    #[default]
    Open,
    /// None are made; those that are here live on as before.
    Cordoned,
    /// None are made, and the node is to become empty: those that are here run out.
    Draining,
}

/// That, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// What is wanted.
    pub intake: Intake,
    /// The operator's own words; may be empty.
    pub why: String,
    /// Since when, milliseconds since 1970; 0: since ever.
    pub since_ms: u64,
}
