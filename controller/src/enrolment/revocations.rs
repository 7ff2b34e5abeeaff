//! Tells every agent which nodes' certificates of the ingress hop to refuse: they live for a year, and the nodes'
//! Caddys speak to each other without the controller.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, stream};
use proto::name::NodeName;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::Enrolment;
use crate::store::enrolments::Enrolment as Enrolled;

/// Longest time until a node that connects is told.
const LOOK: Duration = Duration::from_secs(5);
/// Time after which a node is told again, whatever it has answered: it may have lost its disk.
const AGAIN: Duration = Duration::from_mins(10);
/// Most nodes that are told at once.
const AT_ONCE: usize = 32;
/// Most nodes in the list.
const NODES_MAX: usize = 4096;

/// Revoked nodes: each with the time from which on certificates of it are accepted again; 0: none is.
type Revoked = Vec<(NodeName, u64)>;

/// List that each node was told last, and the time.
type Told = BTreeMap<NodeName, (Revoked, Instant)>;

/// Returns the nodes that are revoked, or were. What such a node was given before its last join is refused.
fn revoked(enrolled: &[Enrolled]) -> Revoked {
    let once = enrolled.iter().filter(|node| node.only_listed).take(NODES_MAX);
    let from = |node: &Enrolled| if node.revoked_ms > 0 { 0 } else { node.joined_ms };
    once.map(|node| (node.node.clone(), from(node))).collect()
}

impl Enrolment {
    /// Tells all nodes until `stop`: at once when a node is revoked or joins, and each when it connects.
    pub(super) async fn tell_revocations(&self, stop: &CancellationToken) {
        let mut told = Told::new();
        loop {
            let wait = timeout(LOOK, self.changed.notified());
            if stop.run_until_cancelled(wait).await.is_none() {
                return;
            }
            if self.nodes.epoch.fenced() {
                continue;
            }
            match self.store.enrolments().await {
                Ok(enrolled) => self.tell(&revoked(&enrolled), &mut told).await,
                Err(error) => tracing::warn!(%error, "the revoked nodes could not be read"),
            }
        }
    }

    async fn tell(&self, revoked: &Revoked, told: &mut Told) {
        let (now, epoch) = (Instant::now(), self.nodes.epoch.get());
        // An empty list, too: the agent may have kept one of a controller whose store is lost.
        let is_due = |node: &NodeName| {
            told.get(node).is_none_or(|(known, at)| known != revoked || now >= *at + AGAIN)
        };
        let due =
            self.nodes.all().into_iter().filter(|node| node.down().is_none() && is_due(&node.name));
        let calls = stream::iter(due).map(async |node| {
            let answer = node.client.set_revoked_nodes(epoch, revoked).await;
            let answer = answer.inspect_err(|error| self.nodes.fence_if_replaced(error));
            (node.name.clone(), answer)
        });
        let answers: Vec<_> = calls.buffer_unordered(AT_ONCE).collect().await;
        for (node, answer) in answers {
            match answer {
                Ok(()) => drop(told.insert(node, (revoked.clone(), now))),
                Err(error) => {
                    tracing::warn!(%node, %error, "the list of revoked nodes was not sent to the node");
                }
            }
        }
        told.retain(|node, _| self.nodes.get(node).is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_were_ever_revoked_are_listed_with_their_last_join() {
        let enrolled = |name: &str, joined_ms, revoked_ms, only_listed| Enrolled {
            node: name.parse().expect("a name"),
            address: String::new(),
            pool: String::new(),
            joined_ms,
            revoked_ms,
            only_listed,
            serials: Vec::new(),
        };
        let all = [
            enrolled("n1", 10, 0, false),
            enrolled("n2", 10, 20, true),
            enrolled("n3", 30, 0, true),
            // Never joined, and revoked.
            enrolled("n4", 0, 5, true),
        ];
        let listed: Vec<_> =
            revoked(&all).into_iter().map(|(node, from)| (node.to_string(), from)).collect();
        let expected = [("n2", 0), ("n3", 30), ("n4", 0)];
        assert_eq!(listed, expected.map(|(node, from)| (node.to_owned(), from)));
    }
}
