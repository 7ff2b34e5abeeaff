//! What nodes report of their sandboxes: into the inventory and the event log.

use std::{collections::BTreeMap, time::Duration};

use proto::{
    id::{SandboxId, SandboxRef},
    name::{NodeName, Team},
    sandbox::v1::{ConfigEdit, EventKind, NodeLoad, Phase, Sandbox},
};
use tokio::time::Instant;

use super::{Node, Nodes};
use crate::{
    events::{self, Source},
    inventory::{Applied, Entry},
    store::{self, Event},
};

/// Most changes by hand that are taken from one report, and longest path of one, bytes.
const EDITS_MAX: usize = 16;
const FILE_MAX: usize = 512;
/// Time in which changes by hand of one file of a node are one event. Something may write the file again and again.
const EDITS_PAUSE: Duration = Duration::from_mins(10);

impl Nodes {
    /// Applies a node's report of a sandbox, from the watch or from an answer.
    pub fn apply(&self, node: &NodeName, sandbox: Sandbox) {
        let id = sandbox.id.clone();
        let journal = self.get(node).map(|known| known.journal_id()).unwrap_or_default();
        let news = |old: Option<&Entry>, new: &Entry| {
            let source = Source { id: new.id, team: &new.team, node, journal: &journal };
            // A lost sandbox that reappears alive counts as found; one that has ended has ended.
            // The end of another attempt is not a former state of this one.
            let old = old.filter(|old| !old.lost || new.ended());
            let old = old.filter(|old| !old.ended() || old.sandbox.attempt == new.sandbox.attempt);
            self.log.observe(&source, old.map(|old| &old.sandbox), &new.sandbox);
        };
        match self.cache.apply(node, sandbox, self.clock.now_ms(), news) {
            Applied::Changed | Applied::Known => {}
            Applied::StaleAttempt { node: holder, attempt } => {
                tracing::warn!(node = %holder, sandbox_id = id, attempt, "node holds a stale attempt");
                if let Ok(id) = id.parse() {
                    self.cancel_stale_attempt(&holder, id, attempt);
                }
            }
            Applied::Moved { left, to } => {
                tracing::warn!(node = %left, sandbox_id = id, %to, "sandbox moved to another node");
                if let (Some(left), Ok(id)) = (self.get(&left), id.parse()) {
                    left.add_moved(id, to);
                }
            }
            Applied::Ignored => {
                tracing::debug!(%node, sandbox_id = id, "ignored a stale attempt");
            }
            Applied::Malformed => {
                tracing::warn!(%node, sandbox_id = id, "ignored a sandbox with a malformed identity");
            }
        }
    }

    /// Ends a creation on this node and logs what the node has reported since. If the node was forgotten meanwhile,
    /// the sandbox ends, too: `forget` skips creations under way.
    pub fn settle(&self, id: &SandboxId, sandbox: Sandbox) {
        let since = |entry: &Entry, sandbox: &Sandbox| {
            let Some(node) = entry.node.as_ref().and_then(|name| self.get(name)) else { return };
            let journal = node.journal_id();
            let source =
                Source { id: entry.id, team: &entry.team, node: &node.name, journal: &journal };
            self.log.observe(&source, Some(sandbox), &entry.sandbox);
        };
        let node = sandbox.node.parse::<NodeName>();
        let later = self.cache.settle(id, sandbox, self.clock.now_ms(), since);
        if let Some(later) = later
            && let Ok(node) = later.node.parse()
        {
            self.apply(&node, *later);
        }
        if let Ok(node) = node
            && self.is_forgotten(&node)
        {
            self.end_on(&node);
        }
    }

    /// Returns the events of what the node did after a creation came up.
    pub fn events_since_up(&self, id: SandboxId, team: &Team, sandbox: &Sandbox) -> Vec<Event> {
        let node = sandbox.node.parse().ok().and_then(|name| self.get(&name));
        let Some(node) = node else { return Vec::new() };
        let journal = node.journal_id();
        let source = Source { id, team, node: &node.name, journal: &journal };
        let mut up = Sandbox { failure: None, ..sandbox.clone() };
        up.set_phase(Phase::Running);
        self.log.meaning(&source, Some(&up), sandbox)
    }

    /// Ends a node's inventory and logs the sandboxes that are missing in it as lost.
    pub(super) fn end_inventory(&self, node: &Node) {
        let journal = node.journal_id();
        for entry in self.cache.end_inventory(&node.name) {
            tracing::error!(node = %node.name, sandbox_id = %entry.id,
                "sandbox lost: its node does not know it any more");
            let source =
                Source { id: entry.id, team: &entry.team, node: &node.name, journal: &journal };
            self.log.lost(&source);
        }
    }

    /// Logs that a node went down or came up.
    pub(super) fn log_up_or_down(&self, node: &Node, up: bool, detail: String) {
        let kind = if up { EventKind::NodeUp } else { EventKind::NodeDown };
        let node = Some(node.name.clone());
        self.log.append(Event { node, detail, ..self.log.event(kind, events::CONTROLLER) });
    }

    /// Returns the changes by hand in a node's report that are to be logged: those that the report before did not
    /// have, of files that are not in `logged`. The node's own times are not relied on.
    pub(super) fn new_edits(
        logged: &mut BTreeMap<String, Instant>,
        before: Option<&NodeLoad>,
        report: &NodeLoad,
        now: Instant,
    ) -> Vec<ConfigEdit> {
        logged.retain(|_, at| now.duration_since(*at) < EDITS_PAUSE);
        let edits = report.config_edits.iter().take(EDITS_MAX);
        let edits = edits.filter(|edit| edit.file.len() <= FILE_MAX);
        // Those of the first report may be old. The log skips the ones that it has.
        let Some(before) = before else { return edits.cloned().collect() };
        let mut new = Vec::new();
        for edit in edits.filter(|edit| !before.config_edits.contains(edit)) {
            if logged.len() < EDITS_MAX && !logged.contains_key(&edit.file) {
                logged.insert(edit.file.clone(), now);
                new.push(edit.clone());
            }
        }
        new
    }

    /// Logs configuration files that a node's agent put back.
    pub(super) fn log_put_back(&self, node: &Node, edits: Vec<ConfigEdit>) {
        for ConfigEdit { file, put_back_at } in edits {
            let at = put_back_at.unwrap_or_default();
            self.log.append(Event {
                // After a restart of the controller the node reports it again.
                once: Some(format!("put back {} {file} {}.{}", node.name, at.seconds, at.nanos)),
                detail: format!("{file} was changed by hand"),
                node: Some(node.name.clone()),
                ..self.log.event(EventKind::ConfigPutBack, events::CONTROLLER)
            });
        }
    }

    /// Logs that a node has cancelled an attempt, before the pending cancel is removed.
    pub(super) async fn log_cancelled(
        &self,
        node: &Node,
        id: &SandboxId,
        attempt: u32,
        held: Option<&Sandbox>,
    ) -> Result<(), store::Error> {
        let kind = EventKind::AttemptCancelled;
        let team = self.cache.get(&SandboxRef::Id(*id)).map(|entry| entry.team);
        let outcome = if held.is_some() { "it is undone" } else { "the node had not heard of it" };
        self.log.append(Event {
            sandbox: Some(*id),
            team: team.or_else(|| held.and_then(|held| held.team.parse().ok())),
            node: Some(node.name.clone()),
            detail: format!("attempt {attempt} was cancelled; {outcome}"),
            node_revision: held.map_or(0, |held| held.revision),
            once: Some(format!("{id} {attempt} {}", kind.as_str_name())),
            ..self.log.event(kind, events::CONTROLLER)
        });
        self.log.flushed().await
    }
}
