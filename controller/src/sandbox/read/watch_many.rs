//! Watches many sandboxes of a team at once.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, stream};
use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
    name::Team,
    sandbox::v1::{Sandbox, SandboxFilter, WatchSandboxesResponse},
};
use tokio::time::timeout;

use super::list::Filter;
use crate::{
    inventory::{Page, TeamChanges},
    sandbox::{Error, RETRY, Sandboxes},
};

/// Time without a message after which a heartbeat is sent.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Sandboxes that are read from the cache at a time.
const PAGE: usize = 200;

struct Watch {
    sandboxes: Arc<Sandboxes>,
    team: Team,
    filter: Filter,
    changes: TeamChanges,
    /// Sandboxes that were sent last as fulfilling the filter.
    sent: BTreeSet<SandboxId>,
    /// Those of `sent` that a look at everything has not seen yet; `None` when none is under way.
    unseen: Option<BTreeSet<SandboxId>>,
    /// Whether the look has read its last page.
    whole: bool,
    /// Last sandbox of the previous page.
    after: Option<SandboxId>,
    ready: VecDeque<WatchSandboxesResponse>,
    synced: bool,
    over: bool,
}

impl Sandboxes {
    /// Streams the team's sandboxes that fulfil the filter, now and at every change.
    ///
    /// # Errors
    /// When the filter is wrong.
    pub fn watch_many(
        self: &Arc<Self>,
        team: &Team,
        filter: Option<SandboxFilter>,
    ) -> Result<impl Stream<Item = Result<WatchSandboxesResponse, Error>> + Send + use<>, Error>
    {
        let filter = Filter::try_from(filter)?;
        let watch = Watch {
            sandboxes: self.clone(),
            team: team.clone(),
            filter,
            // From before the first look on, so that no change falls between the two.
            changes: self.nodes.cache.changes(team),
            sent: BTreeSet::new(),
            unseen: Some(BTreeSet::new()),
            whole: false,
            after: None,
            ready: VecDeque::new(),
            synced: false,
            over: false,
        };
        Ok(stream::unfold(watch, |mut watch| async move {
            let next = watch.next().await?;
            Some((next, watch))
        }))
    }
}

impl Watch {
    async fn next(&mut self) -> Option<Result<WatchSandboxesResponse, Error>> {
        loop {
            if self.over {
                return None;
            }
            if let Some(message) = self.ready.pop_front() {
                return Some(Ok(message));
            }
            if self.unseen.is_some() {
                self.look();
                continue;
            }
            tokio::select! {
                changed = timeout(HEARTBEAT, self.changes.next()) => match changed {
                    Ok(Some(id)) => self.tell(&id),
                    // Too much has changed to name it.
                    Ok(None) => {
                        (self.unseen, self.whole) = (Some(self.sent.clone()), false);
                        self.after = None;
                    }
                    Err(_) => return Some(Ok(WatchSandboxesResponse::default())),
                },
                () = self.sandboxes.stop.cancelled() => {
                    self.over = true;
                    let error = Error::new(Reason::ShuttingDown, "the controller is stopping");
                    return Some(Err(error.retry(RETRY)));
                }
            }
        }
    }

    /// Reads the next page of all sandboxes.
    fn look(&mut self) {
        let filter = self.filter.clone();
        let page = Page {
            after: self.after,
            limit: PAGE,
            include_ended: filter.wants_ended(),
            filter: &|sandbox| filter.matches(sandbox),
            ..Page::ALL
        };
        let (sandboxes, more) = match self.whole {
            true => (Vec::new(), false),
            false => self.sandboxes.nodes.cache.page(&self.team, &page),
        };
        self.after = sandboxes.last().and_then(|last| last.id.parse().ok());
        for sandbox in sandboxes {
            if let (Ok(id), Some(unseen)) = (sandbox.id.parse(), &mut self.unseen) {
                unseen.remove(&id);
                self.sent.insert(id);
            }
            self.send(sandbox, false);
        }
        if more {
            return;
        }
        // Those that are not there any more, some at a time.
        self.whole = true;
        let unseen = self.unseen.get_or_insert_default();
        let some: Vec<_> = unseen.iter().take(PAGE).copied().collect();
        if !some.is_empty() {
            for id in &some {
                unseen.remove(id);
            }
            some.iter().for_each(|id| self.tell(id));
            return;
        }
        self.unseen = None;
        if !self.synced {
            self.synced = true;
            let synced = WatchSandboxesResponse { synced: true, ..Default::default() };
            self.ready.push_back(synced);
        }
    }

    /// Sends a sandbox that has changed, if it concerns the caller.
    fn tell(&mut self, id: &SandboxId) {
        let cache = &self.sandboxes.nodes.cache;
        let entry = cache.get(&SandboxRef::Id(*id)).filter(|entry| entry.team == self.team);
        let Some(entry) = entry else {
            // Its tombstone is kept no longer.
            if self.sent.remove(id) {
                let forgotten = Sandbox { id: id.to_string(), ..Sandbox::default() };
                self.send(forgotten, true);
            }
            return;
        };
        let sandbox = cache.view(&entry);
        let counts = !entry.ended() || self.filter.wants_ended();
        if counts && self.filter.matches(&sandbox) {
            self.sent.insert(*id);
            self.send(sandbox, false);
        } else if self.sent.remove(id) {
            self.send(sandbox, true);
        }
    }

    fn send(&mut self, sandbox: Sandbox, gone: bool) {
        let synced = self.synced;
        let message = WatchSandboxesResponse { sandbox: Some(sandbox), gone, synced };
        self.ready.push_back(message);
    }
}
