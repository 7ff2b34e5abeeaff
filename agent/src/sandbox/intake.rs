//! Cordon and drain: whether the operator lets the node take new work. Kept in the journal, so that
//! it survives a restart and every controller sees the same.

use std::sync::PoisonError;

use super::{Error, Sandboxes};
use crate::journal::intake::{Intake, Order};

impl Sandboxes {
    /// Current scheduling state of the node.
    pub fn intake(&self) -> Order {
        self.intake.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the scheduling state; durable when this returns. Creations under way continue.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn set_intake(&self, intake: Intake, why: String) -> Result<Order, Error> {
        let known = self.intake();
        let since_ms = if known.intake == intake { known.since_ms } else { self.now_ms() };
        let order = Order { intake, why, since_ms };
        self.records.set_intake(&order).await?;
        tracing::info!(intake = ?order.intake, why = order.why, "operator changed the scheduling state");
        order.clone_into(&mut self.intake.write().unwrap_or_else(PoisonError::into_inner));
        Ok(order)
    }
}
