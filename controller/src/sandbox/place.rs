//! Where a creation goes: decided by what the nodes reported, and, where that is wanted, by what the
//! best of them say when they are asked for a seat.

use std::time::Duration;

use futures_util::future::join_all;
use proto::{
    id::SandboxId,
    name::{NodeName, Team},
    spec::Spec,
};

use super::Sandboxes;
use crate::{
    node::registry::Tried,
    placement::{Decision, Filtered, Verdict},
};

/// Whoever has not answered by then gives no seat: a creation does not wait for it.
const BID: Duration = Duration::from_millis(50);

impl Sandboxes {
    /// Decides for one attempt, and reserves there. What nodes say of seats is advice: when none
    /// gives one, the reports decide alone, and the node that is chosen has the last word.
    pub(super) async fn place(
        &self,
        id: SandboxId,
        team: &Team,
        spec: &Spec,
        attempt: u32,
        tried: &Tried,
    ) -> Decision {
        let decision = self.nodes.place(Some(id), team, spec, attempt, tried, None);
        let fit = decision.verdicts.iter().filter(|verdict| verdict.filtered.is_none());
        let asked: Vec<_> = fit.take(self.options.bids).map(|fit| fit.node.clone()).collect();
        if asked.len() < 2 {
            return decision;
        }
        let bids = join_all(asked.iter().map(|node| self.bid(id, spec, node))).await;
        let given: Vec<_> = bids.iter().filter_map(|bid| bid.as_ref().ok().cloned()).collect();
        let among = if given.is_empty() {
            None
        } else {
            Some(self.nodes.place(Some(id), team, spec, attempt, tried, Some(&given)))
        };
        let decision = match among {
            None => decision,
            Some(among) if among.node().is_some() => {
                with_bids(decision, among, bids.into_iter().filter_map(Result::err).collect())
            }
            // They fit no more by what they said with it: as if none had given one.
            Some(_) => self.nodes.place(Some(id), team, spec, attempt, tried, None),
        };
        // Also to those whose answer was late.
        let others: Vec<_> =
            asked.into_iter().filter(|node| Some(node) != decision.node()).collect();
        self.give_back(id, &others);
        decision
    }

    /// Asks one node for a seat: its name when it keeps one, else why not.
    async fn bid(
        &self,
        id: SandboxId,
        spec: &Spec,
        name: &NodeName,
    ) -> Result<NodeName, (NodeName, String)> {
        let no = |why: String| (name.clone(), why);
        let node = self.nodes.get(name).ok_or_else(|| no("it was given up".into()))?;
        let epoch = self.nodes.epoch.get();
        let wanted = (&spec.snapshot, spec.size.into());
        match node.client.reserve(epoch, &id, wanted, BID).await {
            Ok(load) => {
                self.nodes.heard(&node, load);
                Ok(name.clone())
            }
            Err(error) => {
                self.nodes.noticed(&error);
                Err(no(error.to_string()))
            }
        }
    }

    /// Seats that are not wanted are free at once; one that is not reached frees it by itself.
    fn give_back(&self, id: SandboxId, nodes: &[NodeName]) {
        for node in nodes.iter().filter_map(|name| self.nodes.get(name)) {
            self.tasks.spawn(async move {
                if let Err(error) = node.client.give_back(&id).await {
                    tracing::debug!(sandbox_id = %id, node = %node.name, %error, "a seat stays kept");
                }
            });
        }
    }
}

/// The decision among those that gave a seat, and with it what was thought of the others.
fn with_bids(before: Decision, among: Decision, refused: Vec<(NodeName, String)>) -> Decision {
    let Decision { attempt, decided_ms, verdicts, .. } = among;
    let known = |node: &NodeName| verdicts.iter().any(|verdict| verdict.node == *node);
    let others = before.verdicts.into_iter().filter(|verdict| !known(&verdict.node));
    let others =
        others.map(|verdict| match refused.iter().find(|(node, _)| *node == verdict.node) {
            None => verdict,
            Some((_, why)) => Verdict {
                filtered: Some(Filtered::NoBid),
                detail: format!("gave no seat: {why}"),
                score: 0.0,
                parts: Vec::new(),
                ..verdict
            },
        });
    let mut all: Vec<_> = verdicts.iter().cloned().chain(others).collect();
    // Those that fit first; the sort keeps the order otherwise, so the chosen one stays the first.
    all.sort_by_key(|verdict| verdict.filtered.is_some());
    Decision { attempt, decided_ms, holders: before.holders, verdicts: all }
}
