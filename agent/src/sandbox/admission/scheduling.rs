//! Cordon and drain: whether the operator lets the node take new work. Kept in the journal, so that
//! it survives a restart and every controller sees the same.

use crate::{
    journal::scheduling::{Scheduling, SchedulingState},
    sandbox::{Result, Sandboxes},
};

impl Sandboxes {
    /// Current scheduling state of the node.
    pub fn scheduling(&self) -> Scheduling {
        self.scheduling.read().clone()
    }

    /// Changes the scheduling state; durable when this returns. Creations under way continue.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn set_scheduling(&self, state: SchedulingState, why: String) -> Result<Scheduling> {
        let known = self.scheduling();
        let since_ms = if known.state == state { known.since_ms } else { self.now_ms() };
        let order = Scheduling { state, why, since_ms };
        self.records.set_scheduling(&order).await?;
        tracing::info!(state = ?order.state, why = order.why, "operator changed the scheduling state");
        order.clone_into(&mut self.scheduling.write());
        Ok(order)
    }
}
