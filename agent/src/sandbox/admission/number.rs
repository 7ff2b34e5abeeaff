//! Number of the node in its cluster. The node's ranges of vmids and addresses are computed from
//! it, so the journal keeps it: a node with a wrong number would hand out what belongs to another.

use proto::Reason;

use crate::{
    journal,
    pve::Cluster,
    sandbox::{Error, Result, Sandboxes},
};

/// Change of the node's number that no operator has confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renumbered {
    /// Number that the node's ranges were computed from.
    pub known: u32,
    /// Number of the node in its cluster now.
    pub now: u32,
}

impl Renumbered {
    /// Builds the refusal of a creation.
    pub(in crate::sandbox) fn refusal(self) -> Error {
        let Self { known, now } = self;
        let message = format!(
            "this node's number in the cluster is {now}, and its ranges are those of number {known}: \
             it makes no sandboxes until an operator has confirmed that"
        );
        Error::new(Reason::NodeNumberChanged, message)
    }
}

/// Compares the known number of the node with the one in its cluster. Pure. `ranges_of` is the number
/// that the configured ranges were computed from.
fn renumbered(known: Option<u32>, ranges_of: Option<u32>, cluster: &Cluster) -> Option<Renumbered> {
    let now = cluster.number.filter(|_| cluster.quorate)?;
    let other = |number: &u32| *number != now;
    let known = known.into_iter().chain(ranges_of).find(other)?;
    Some(Renumbered { known, now })
}

impl Sandboxes {
    /// Returns the number in the cluster if it differs from the one of the node's ranges and no
    /// operator has confirmed it. `None` also while the cluster cannot tell.
    pub fn renumbered(&self, cluster: &Cluster) -> Option<Renumbered> {
        let node = self.node.read();
        renumbered(node.as_ref().map(|node| node.number), self.options.number, cluster)
    }

    /// Writes the node's number into the journal, when the node is quorate for the first time or
    /// has no cluster. A different number later is not written: see `renumbered`.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn note_number(&self, cluster: &Cluster) -> Result<()> {
        let Some(number) = cluster.number.filter(|_| cluster.quorate) else { return Ok(()) };
        if let Some(Renumbered { known, now }) = self.renumbered(cluster) {
            if self.logged_number.swap(now, std::sync::atomic::Ordering::Relaxed) != now {
                tracing::error!(
                    known,
                    now,
                    "the node has another number in its cluster: no sandboxes are made until \
                     `pve-sandbox-agent confirm-node-number`"
                );
            }
            return Ok(());
        }
        let node = journal::Node { name: self.pve.node().clone(), number };
        if self.node.read().as_ref() == Some(&node) {
            return Ok(());
        }
        self.records.set_node(&node).await?;
        tracing::info!(node = %node.name, number, "node number written to the journal");
        *self.node.write() = Some(node);
        Ok(())
    }

    /// Refuses to lease a vmid or an address while the ranges belong to another number.
    pub(in crate::sandbox) async fn check_number(&self) -> Result<()> {
        match self.renumbered(&self.pve.cluster().await) {
            Some(renumbered) => Err(renumbered.refusal()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renumbering_needs_a_quorate_cluster_that_knows_the_number() {
        let cluster = |quorate, number| Cluster { quorate, number, ..Cluster::default() };
        let one = Some(1);
        assert_eq!(renumbered(one, one, &cluster(true, one)), None);
        assert_eq!(renumbered(None, None, &cluster(true, Some(3))), None, "the first time");
        let other = Some(Renumbered { known: 1, now: 3 });
        assert_eq!(renumbered(one, one, &cluster(true, Some(3))), other);
        assert_eq!(renumbered(None, one, &cluster(true, Some(3))), other, "the ranges are cut");
        // Confirmed, but the ranges are still the old ones: the agent must be restarted.
        assert_eq!(renumbered(Some(3), one, &cluster(true, Some(3))), other);
        assert_eq!(renumbered(one, one, &cluster(false, Some(3))), None, "no quorum, no word");
        assert_eq!(renumbered(one, one, &cluster(true, None)), None);
    }
}
