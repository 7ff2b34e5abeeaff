//! Moves stopped sandboxes off a node that is being drained, to nodes that have access to their
//! disk: nothing is copied, nothing that runs is moved. Those that cannot move stay and are
//! reported.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use proto::{
    id::{SandboxId, SandboxRef},
    name::NodeName,
    sandbox::v1::{EventKind, Phase, Sandbox},
    spec::{Network, Spec},
};
use tokio::time::Instant;

use super::each::{Each, Witness};
use crate::{
    inventory::Entry,
    node::{Node, registry::AttemptHistory},
    sandbox::{Caller, Error, Result, Sandboxes, exposure::are_public, quota::can_keep_to},
    store::Event,
};

/// Time budget of one call; the next call continues.
const BUDGET: Duration = Duration::from_secs(10);

impl Sandboxes {
    /// Moves the stopped sandboxes of this node within `BUDGET`. Returns the moved ones in their
    /// new state, and why others stay. `witness` hears of each that is tried.
    pub(super) async fn move_stopped(
        self: &Arc<Self>,
        caller: &Caller,
        node: &Arc<Node>,
        witness: Witness<'_>,
    ) -> (Vec<Sandbox>, BTreeMap<String, String>) {
        let (mut moved, mut stays) = (Vec::new(), BTreeMap::new());
        let until = Instant::now() + BUDGET;
        for entry in self.nodes.cache.living_on(&node.name) {
            let stopped = match entry.sandbox.phase() {
                Phase::Stopped => true,
                // Deleted during a move: the container may be on the other node.
                Phase::Deleting => entry.sandbox.failure.is_some(),
                Phase::Unspecified
                | Phase::Creating
                | Phase::Running
                | Phase::Paused
                | Phase::Starting
                | Phase::Stopping
                | Phase::Deleted
                | Phase::Failed
                | Phase::Unreachable => false,
            };
            if entry.creating || entry.lost || !stopped {
                continue;
            }
            let result = match Instant::now() < until {
                true => {
                    let each = Each::new(witness, entry.id.to_string(), entry.team.clone());
                    let (this, caller) = (Arc::clone(self), caller.clone());
                    let permit = caller.permit.clone();
                    let (from, entry) = (Arc::clone(node), entry.clone());
                    // A task of its own: a sandbox that its node has exported is nowhere until it is imported.
                    let moved = async move { this.move_one(&caller, &entry, &from).await };
                    let done = self.to_its_end(permit, moved).await;
                    each.end(&done);
                    done.map_err(|error| error.to_string())
                }
                false => Err("there was no time to move it: drain once more".into()),
            };
            match result {
                Ok(()) => {
                    let there = self.nodes.cache.get(&SandboxRef::Id(entry.id));
                    moved.extend(there.map(|there| self.nodes.cache.view(&there)));
                }
                Err(why) => {
                    tracing::info!(sandbox_id = %entry.id, node = %node.name, why,
                        "sandbox stays on a drained node");
                    stays.insert(entry.id.to_string(), why);
                }
            }
        }
        (moved, stays)
    }

    /// Takes the three steps of `agent/src/sandbox/ownership/migrate.rs`, from where they were interrupted.
    async fn move_one(&self, caller: &Caller, entry: &Entry, from: &Node) -> Result<()> {
        let (id, epoch) = (entry.id, self.nodes.epoch.get());
        let to = self.pick_target(entry, &from.name)?;
        let exported = from.client.export_sandbox(epoch, &id, &to).await;
        let (to, record) = exported.map_err(|error| self.node_error(from, error))?;
        let to = self.node(&to)?;
        // An interrupted move goes on to its target, which may have another agent by now.
        can_keep_to(&to, entry.sandbox.egress())?;
        let imported = to.client.import_sandbox(epoch, record).await;
        let sandbox = imported.map_err(|error| self.node_error(&to, error))?;
        let revision = sandbox.revision;
        self.nodes.apply(&to.name, sandbox);
        let left = from.client.release(epoch, &id, Some(&to.name)).await;
        self.nodes.apply(&from.name, left.map_err(|error| self.node_error(from, error))?);
        self.log().append(Event {
            sandbox: Some(id),
            team: Some(entry.team.clone()),
            node: Some(to.name.clone()),
            detail: format!("from {}, which is being drained", from.name),
            once: Some(format!("{id} {} {revision}", to.name)),
            ..self.log().event(EventKind::Moved, &caller.token)
        });
        self.log_flushed().await;
        Ok(())
    }

    /// Picks the node that a new sandbox of this kind would go to.
    fn pick_target(&self, entry: &Entry, from: &NodeName) -> Result<NodeName> {
        let spec = spec(entry.id, &entry.sandbox)?;
        let decision =
            self.nodes.place(None, &entry.team, &spec, 1, &AttemptHistory::default(), None);
        let fit = decision.verdicts.iter().filter(|verdict| verdict.filtered.is_none());
        let egress = entry.sandbox.egress();
        let keeps = |node: &NodeName| {
            self.nodes.get(node).is_some_and(|node| {
                let guards = node.guards_ports() == Some(true) || are_public(&entry.sandbox);
                guards && node.keeps_to(egress) == Some(true)
            })
        };
        let best = fit.map(|verdict| &verdict.node).find(|node| *node != from && keeps(node));
        best.cloned().ok_or_else(|| {
            let why = format!("no other node has room for {}: {}", entry.id, decision.why());
            Error::new(proto::Reason::NoCapacity, why)
        })
    }
}

fn spec(id: SandboxId, sandbox: &Sandbox) -> Result<Spec> {
    Ok(Spec {
        request_id: id.to_string().parse()?,
        snapshot: sandbox.snapshot_id.parse()?,
        size: sandbox.size.unwrap_or_default().into(),
        metadata: Default::default(),
        env: Default::default(),
        network: Network::Static,
        egress: None,
        services: Default::default(),
        no_default_services: false,
        expose_on_listen: None,
        visibility: Default::default(),
        name: None,
        node: None,
        labels: Default::default(),
        lifetime: Default::default(),
    })
}
