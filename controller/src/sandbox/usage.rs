//! What sandboxes use right now. Each node is asked once, all at a time.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use proto::{
    id::{Invalid, SandboxId},
    name::{NodeName, Team},
    sandbox::v1::{Phase, Usage},
};

use super::{Error, Sandboxes};
use crate::node::{Entry, Node};

/// Sandboxes that one call may ask about.
const USAGES_MAX: usize = 200;

impl Sandboxes {
    /// Usages of these, or of all of the team that run or are paused; by id. What cannot be
    /// measured, because it does not run or its node does not answer, is left out.
    ///
    /// # Errors
    /// When there are too many ids, or one is nobody's.
    pub async fn usage(&self, team: &Team, ids: &[String]) -> Result<Vec<Usage>, Error> {
        if ids.len() > USAGES_MAX {
            return Err(Invalid::new("ids", "must be at most 200").into());
        }
        let entries = if ids.is_empty() {
            let mut all = self.all_up(team);
            all.truncate(USAGES_MAX);
            all
        } else {
            ids.iter().map(|id| self.find(team, id)).collect::<Result<_, _>>()?
        };
        let mut by_node: BTreeMap<NodeName, (std::sync::Arc<Node>, Vec<SandboxId>)> =
            BTreeMap::new();
        for entry in entries.iter().filter(|entry| !entry.creating && !entry.ended()) {
            if let Ok(node) = self.reachable(entry) {
                let asked = by_node.entry(node.name.clone()).or_insert_with(|| (node, Vec::new()));
                if !asked.1.contains(&entry.id) {
                    asked.1.push(entry.id);
                }
            }
        }
        let answers = by_node.into_values().map(|(node, ids)| async move {
            match node.client.usage(&ids).await {
                Ok(usages) => usages,
                Err(error) => {
                    self.nodes.noticed(&error);
                    tracing::warn!(node = %node.name, %error, "usage was not told");
                    Vec::new()
                }
            }
        });
        let mut usages: Vec<Usage> = join_all(answers).await.into_iter().flatten().collect();
        usages.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(usages)
    }

    fn all_up(&self, team: &Team) -> Vec<Entry> {
        let mut after = None;
        let mut up = Vec::new();
        while up.len() < USAGES_MAX {
            let (page, more) = self.nodes.cache.page(team, after, USAGES_MAX, false);
            let running = |s: &&proto::sandbox::v1::Sandbox| {
                matches!(s.phase(), Phase::Running | Phase::Paused)
            };
            up.extend(page.iter().filter(running).filter_map(|s| self.find(team, &s.id).ok()));
            after = page.last().and_then(|sandbox| sandbox.id.parse().ok());
            if !more || after.is_none() {
                break;
            }
        }
        up
    }
}
