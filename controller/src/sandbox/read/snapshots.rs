//! Available snapshots: the union over the nodes' reports.

use std::collections::BTreeMap;

use proto::sandbox::v1::{Snapshot, SnapshotPorts};

use crate::sandbox::Sandboxes;

impl Sandboxes {
    /// Returns all snapshots that a node has reported, ordered by id. Where nodes differ about a snapshot, the first
    /// node counts, and the others are named.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let mut all: BTreeMap<String, (Snapshot, SnapshotPorts)> = BTreeMap::new();
        for status in self.nodes.statuses() {
            let Some((load, _)) = status.report else { continue };
            for (at, id) in load.snapshots.iter().enumerate() {
                let ports = load.snapshot_ports.get(at).cloned().unwrap_or_default();
                let (snapshot, first) = all.entry(id.clone()).or_insert_with(|| {
                    let snapshot = Snapshot {
                        id: id.clone(),
                        size: load.snapshot_sizes.get(at).copied(),
                        nodes: Vec::new(),
                        services: self.options.exposure.default_services(ports.services.clone()),
                        expose_on_listen: ports.expose_on_listen,
                        differing_nodes: Vec::new(),
                    };
                    (snapshot, ports.clone())
                });
                snapshot.nodes.push(status.name.to_string());
                if ports != *first {
                    snapshot.differing_nodes.push(status.name.to_string());
                }
            }
        }
        all.into_values().map(|(snapshot, _)| snapshot).collect()
    }
}
