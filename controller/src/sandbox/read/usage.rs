//! Current resource usage of sandboxes. Each node is asked once, all in parallel.

use std::collections::BTreeMap;

use futures_util::future::try_join_all;
use proto::{
    id::{Invalid, SandboxId},
    name::{NodeName, Team},
    sandbox::v1::{GetUsageRequest, Sandbox, Usage},
};

use crate::{
    inventory::{Entry, Page},
    node::Node,
    sandbox::{Error, Sandboxes, read::list::after},
};

/// Most sandboxes of one call.
const USAGES_MAX: usize = 200;

impl Sandboxes {
    /// Returns the usage of these sandboxes, or a page of all of the team that run or are paused, by
    /// id, and the token of the next page. Those that cannot be measured, not running or on a node that
    /// does not answer, are left out.
    ///
    /// # Errors
    /// When there are too many ids, one is not a sandbox of the team, or the page is wrong; TOO_MANY_CALLS when
    /// the team has as many calls under way on a node as it may.
    pub async fn usage(
        &self,
        team: &Team,
        asked: &GetUsageRequest,
    ) -> Result<(Vec<Usage>, String), Error> {
        let GetUsageRequest { ids, page_size, page_token } = asked;
        if ids.len() > USAGES_MAX {
            return Err(Invalid::new("ids", "must be at most 200").into());
        }
        if !ids.is_empty() && (*page_size > 0 || !page_token.is_empty()) {
            return Err(Invalid::new("page_size", "must be 0 with ids").into());
        }
        let (entries, next) = if ids.is_empty() {
            self.page_up(team, *page_size, page_token)?
        } else {
            let found = ids.iter().map(|id| self.find(team, id)).collect::<Result<_, _>>()?;
            (found, String::new())
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
            let calls = self.calls(&node, team)?;
            match calls.usage(&ids).await {
                Ok(usages) => Ok::<_, Error>(usages),
                Err(error) => {
                    self.nodes.fence_if_replaced(&error);
                    tracing::warn!(node = %node.name, %error, "node did not report usage");
                    Ok(Vec::new())
                }
            }
        });
        let mut usages: Vec<Usage> = try_join_all(answers).await?.into_iter().flatten().collect();
        usages.sort_by(|a, b| a.id.cmp(&b.id));
        Ok((usages, next))
    }

    /// Returns a page of the team's sandboxes that run or are paused, and the token of the next.
    fn page_up(&self, team: &Team, size: u32, token: &str) -> Result<(Vec<Entry>, String), Error> {
        let limit = match usize::try_from(size) {
            Ok(0) => USAGES_MAX,
            Ok(size) if size <= USAGES_MAX => size,
            Ok(_) | Err(_) => return Err(Invalid::new("page_size", "must be 0 to 200").into()),
        };
        let up = |sandbox: &Sandbox| sandbox.phase().is_up();
        let page = Page { after: after(token)?, limit, filter: &up, ..Page::ALL };
        let (page, more) = self.nodes.cache.page(team, &page);
        let next = page.last().filter(|_| more).map(|last| last.id.clone()).unwrap_or_default();
        // One that is forgotten meanwhile is left out.
        Ok((page.iter().filter_map(|s| self.find(team, &s.id).ok()).collect(), next))
    }
}
