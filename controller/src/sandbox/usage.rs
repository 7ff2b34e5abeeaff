//! Current resource usage of sandboxes. Each node is asked once, all in parallel.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use proto::{
    id::{Invalid, SandboxId},
    name::{NodeName, Team},
    sandbox::v1::{Phase, Usage},
};

use super::{Error, Sandboxes};
use crate::node::{Entry, Node};

/// Most sandboxes of one call.
const USAGES_MAX: usize = 200;

impl Sandboxes {
    /// Returns the usage of these sandboxes, or of all of the team that run or are paused; by id.
    /// Those that cannot be measured, not running or on a node that does not answer, are left out.
    ///
    /// # Errors
    /// When there are too many ids, or one is not a sandbox of the team.
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
                    tracing::warn!(node = %node.name, %error, "node did not report usage");
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
