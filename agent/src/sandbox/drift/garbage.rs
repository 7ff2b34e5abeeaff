//! Cleanup of the node, listed or triggered. The reconciler implements it; the wire asks for it.

use proto::sandbox::v1::GarbageAction;

/// Item of the cleanup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Action that is taken, or the reason for none.
    pub action: GarbageAction,
    /// Thing that the item is about.
    pub subject: String,
    /// Explanation, one sentence.
    pub why: String,
}

/// Lists and triggers the cleanup of the node.
#[async_trait::async_trait]
pub trait Garbage: Send + Sync + std::fmt::Debug {
    /// Lists what the next pass does.
    async fn look(&self) -> Vec<Item>;

    /// Starts the next pass now.
    fn collect(&self);
}
