//! What is cleaned up on the node: told, or done. Whoever reconciles knows it; the wire asks.

/// One thing to clean up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// A word for what is done, or why nothing is.
    pub action: &'static str,
    /// What it is about.
    pub subject: String,
    /// A sentence.
    pub why: String,
}

/// Tells what there is to clean up.
#[async_trait::async_trait]
pub trait Garbage: Send + Sync + std::fmt::Debug {
    /// What the next pass does.
    async fn look(&self) -> Vec<Item>;

    /// Lets it do so now.
    fn collect(&self);
}
