//! Cordon and drain: whether the node takes new work, as an operator says. Kept in the journal, so that
//! a restart and another controller find it as it was.

use std::sync::PoisonError;

use super::{Error, Sandboxes};
use crate::journal::intake::{Intake, Order};

impl Sandboxes {
    /// What is wanted of the node now.
    pub fn intake(&self) -> Order {
        self.intake.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it; durable when this returns. What is being created goes on.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn set_intake(&self, intake: Intake, why: String) -> Result<Order, Error> {
        let known = self.intake();
        let since_ms = if known.intake == intake { known.since_ms } else { self.now_ms() };
        let order = Order { intake, why, since_ms };
        self.journal.set_intake(&order).await?;
        tracing::info!(intake = ?order.intake, why = order.why, "an operator said what is wanted");
        order.clone_into(&mut self.intake.write().unwrap_or_else(PoisonError::into_inner));
        Ok(order)
    }
}
