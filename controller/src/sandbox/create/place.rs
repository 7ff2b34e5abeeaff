//! Places a creation: by the nodes' reports and, where configured, by their reservations.

use std::time::Duration;

use futures_util::future::join_all;
use proto::{
    id::SandboxId,
    name::{NodeName, Team},
    spec::Spec,
};

use crate::{
    node::registry::AttemptHistory,
    placement::{Decision, Filtered, Verdict},
    sandbox::Sandboxes,
};

/// Longest wait for reservations: a creation does not wait for slower nodes.
const RESERVE_WAIT: Duration = Duration::from_millis(50);

impl Sandboxes {
    /// Places and reserves one attempt. Answers to reservations are advice: when no node gives one,
    /// the reports decide alone, and the chosen node has the final say.
    pub(super) async fn place(
        &self,
        id: SandboxId,
        team: &Team,
        spec: &Spec,
        attempt: u32,
        history: &AttemptHistory,
    ) -> Decision {
        let decision = self.nodes.place(Some(id), team, spec, attempt, history, None);
        let fit = decision.verdicts.iter().filter(|verdict| verdict.filtered.is_none());
        let asked: Vec<_> =
            fit.take(self.options.candidate_probes).map(|fit| fit.node.clone()).collect();
        if asked.len() < 2 {
            return decision;
        }
        let answers = join_all(asked.iter().map(|node| self.probe(id, spec, node))).await;
        let given: Vec<_> =
            answers.iter().filter_map(|probe| probe.as_ref().ok().cloned()).collect();
        let among = if given.is_empty() {
            None
        } else {
            Some(self.nodes.place(Some(id), team, spec, attempt, history, Some(&given)))
        };
        let decision = match among {
            None => decision,
            Some(among) if among.node().is_some() => with_refusals(
                decision,
                among,
                answers.into_iter().filter_map(Result::err).collect(),
            ),
            // By the new reports they do not fit any more: as if no node had given a reservation.
            Some(_) => self.nodes.place(Some(id), team, spec, attempt, history, None),
        };
        // Late answers may have made reservations too, so all other nodes are told.
        let others: Vec<_> =
            asked.into_iter().filter(|node| Some(node) != decision.node()).collect();
        self.cancel_reservations(id, &others);
        decision
    }

    /// Asks one node for a reservation: returns its name, or the name and why not.
    async fn probe(
        &self,
        id: SandboxId,
        spec: &Spec,
        name: &NodeName,
    ) -> Result<NodeName, (NodeName, String)> {
        let no = |why: String| (name.clone(), why);
        let node = self.nodes.get(name).ok_or_else(|| no("it was given up".into()))?;
        let epoch = self.nodes.epoch.get();
        let wanted = (&spec.snapshot, spec.size.into());
        match node.client.reserve(epoch, &id, wanted, RESERVE_WAIT).await {
            Ok(load) => {
                self.nodes.load_answered(&node, load);
                Ok(name.clone())
            }
            Err(error) => {
                self.nodes.fence_if_replaced(&error);
                Err(no(error.to_string()))
            }
        }
    }

    /// Cancels reservations that are not needed. On a node that cannot be reached they expire.
    fn cancel_reservations(&self, id: SandboxId, nodes: &[NodeName]) {
        for node in nodes.iter().filter_map(|name| self.nodes.get(name)) {
            self.tasks.spawn(async move {
                if let Err(error) = node.client.cancel_reservation(&id).await {
                    tracing::debug!(sandbox_id = %id, node = %node.name, %error,
                        "could not cancel a reservation");
                }
            });
        }
    }
}

/// Merges the decision among the nodes with a reservation with the verdicts on all others.
fn with_refusals(before: Decision, among: Decision, refused: Vec<(NodeName, String)>) -> Decision {
    let Decision { attempt, decided_ms, verdicts, .. } = among;
    let known = |node: &NodeName| verdicts.iter().any(|verdict| verdict.node == *node);
    let others = before.verdicts.into_iter().filter(|verdict| !known(&verdict.node));
    let others =
        others.map(|verdict| match refused.iter().find(|(node, _)| *node == verdict.node) {
            None => verdict,
            Some((_, why)) => Verdict {
                filtered: Some(Filtered::NoReservation),
                detail: format!("gave no reservation: {why}"),
                score: 0.0,
                parts: Vec::new(),
                ..verdict
            },
        });
    let mut all: Vec<_> = verdicts.iter().cloned().chain(others).collect();
    // Fitting nodes first; the sort is stable, so the chosen one stays first.
    all.sort_by_key(|verdict| verdict.filtered.is_some());
    Decision { attempt, decided_ms, holders: before.holders, verdicts: all }
}
