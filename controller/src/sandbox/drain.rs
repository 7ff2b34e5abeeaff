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

use super::{Caller, Error, Sandboxes};
use crate::{
    node::{Entry, Node, registry::AttemptHistory},
    store::Event,
};

/// Time budget of one call; the next call continues.
const ENOUGH: Duration = Duration::from_secs(10);

impl Sandboxes {
    /// Moves the stopped sandboxes of this node within `ENOUGH`. Returns the moved ones in their
    /// new state, and why others stay.
    pub(super) async fn move_away(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
    ) -> (Vec<Sandbox>, BTreeMap<String, String>) {
        let (mut moved, mut stays) = (Vec::new(), BTreeMap::new());
        let until = Instant::now() + ENOUGH;
        for entry in self.nodes.cache.living_on(&node.name) {
            let phase = entry.sandbox.phase();
            // Deleted during a move: the container may be on the other node.
            let left = phase == Phase::Deleting && entry.sandbox.failure.is_some();
            if entry.creating || entry.lost || !(phase == Phase::Stopped || left) {
                continue;
            }
            let tried = match Instant::now() < until {
                true => {
                    self.move_one(caller, &entry, node).await.map_err(|error| error.to_string())
                }
                false => Err("there was no time to move it: drain once more".into()),
            };
            match tried {
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

    /// Takes the three steps of `agent/src/sandbox/migrate.rs`, from where they were interrupted.
    async fn move_one(&self, caller: &Caller, entry: &Entry, from: &Node) -> Result<(), Error> {
        let (id, epoch) = (entry.id, self.nodes.epoch.get());
        let to = self.better(entry, &from.name)?;
        let handed = from.client.export_sandbox(epoch, &id, &to).await;
        let (to, record) = handed.map_err(|error| self.of_node(from, error))?;
        let to = self.node(&to)?;
        let taken = to.client.import_sandbox(epoch, record).await;
        let sandbox = taken.map_err(|error| self.of_node(&to, error))?;
        let revision = sandbox.revision;
        self.nodes.apply(&to.name, sandbox);
        let left = from.client.release(epoch, &id, Some(&to.name)).await;
        self.nodes.apply(&from.name, left.map_err(|error| self.of_node(from, error))?);
        self.log().append(Event {
            sandbox: Some(id),
            team: Some(entry.team.clone()),
            node: Some(to.name.clone()),
            detail: format!("from {}, which is being drained", from.name),
            once: Some(format!("{id} {} {revision}", to.name)),
            ..self.log().event(EventKind::Moved, &caller.token)
        });
        self.written().await;
        Ok(())
    }

    /// Picks the node that a new sandbox of this kind would go to.
    fn better(&self, entry: &Entry, from: &NodeName) -> Result<NodeName, Error> {
        let spec = spec(entry.id, &entry.sandbox)?;
        let decision =
            self.nodes.place(None, &entry.team, &spec, 1, &AttemptHistory::default(), None);
        let fit = decision.verdicts.iter().filter(|verdict| verdict.filtered.is_none());
        let best = fit.map(|verdict| &verdict.node).find(|node| *node != from);
        best.cloned().ok_or_else(|| {
            let why = format!("no other node has room for {}: {}", entry.id, decision.why());
            Error::new(proto::Reason::NoCapacity, why)
        })
    }
}

fn spec(id: SandboxId, sandbox: &Sandbox) -> Result<Spec, Error> {
    Ok(Spec {
        request_id: id.to_string().parse()?,
        snapshot: sandbox.snapshot_id.parse()?,
        size: sandbox.size.unwrap_or_default().into(),
        metadata: Default::default(),
        env: Default::default(),
        network: Network::Static,
        services: Default::default(),
        node: None,
        labels: Default::default(),
        lifetime: Default::default(),
    })
}
