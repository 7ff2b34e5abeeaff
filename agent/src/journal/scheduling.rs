//! Whether the node takes new sandboxes, by the operator's last order.

use serde::{Deserialize, Serialize};

/// State that an operator wants for the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulingState {
    /// New sandboxes are created here.
    #[default]
    #[serde(rename = "open")]
    Schedulable,
    /// No sandboxes are created; existing ones continue as before.
    Cordoned,
    /// No sandboxes are created, and existing ones run out until the node is empty.
    Draining,
}

/// Wanted state with its reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// Wanted state.
    #[serde(rename = "intake")]
    pub state: SchedulingState,
    /// Reason in the operator's own words; may be empty.
    pub why: String,
    /// Time of the order, milliseconds since 1970; 0 when there was none.
    pub since_ms: u64,
}
