//! Available snapshots: the union over the nodes' reports.

use std::collections::BTreeMap;

use proto::sandbox::v1::Snapshot;

use crate::sandbox::Sandboxes;

impl Sandboxes {
    /// Returns all snapshots that a node has reported, ordered by id.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let mut all: BTreeMap<String, Snapshot> = BTreeMap::new();
        for status in self.nodes.statuses() {
            let Some((load, _)) = status.report else { continue };
            for (at, id) in load.snapshots.iter().enumerate() {
                let snapshot = all.entry(id.clone()).or_insert_with(|| Snapshot {
                    id: id.clone(),
                    size: load.snapshot_sizes.get(at).copied(),
                    nodes: Vec::new(),
                });
                snapshot.nodes.push(status.name.to_string());
            }
        }
        all.into_values().collect()
    }
}
