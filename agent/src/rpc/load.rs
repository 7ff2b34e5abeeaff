//! Load report: the load of the host, and the share of the sandboxes in it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use daemon::sync::Mutex;
use proto::{
    sandbox::v1::{ConfigEdit, NodeLoad},
    spec::Size,
    time::timestamp,
};
use tokio::sync::watch;

use super::convert;
use crate::{
    hand_edits::HandEdits,
    journal::scheduling::SchedulingState,
    load::HostLoad,
    pve::StorageRoom,
    sandbox::{Sandboxes, Tally, Template},
};

/// Maker of load reports. Clones share the state.
#[derive(Debug, Clone)]
pub struct Reporter {
    sandboxes: Arc<Sandboxes>,
    host: watch::Receiver<HostLoad>,
    seq: Arc<AtomicU64>,
    tally: Arc<Mutex<Tally>>,
    /// Changes by hand of configuration files.
    edits: Arc<OnceLock<Arc<HandEdits>>>,
}

impl Reporter {
    /// Makes one that has reported nothing yet.
    pub fn new(sandboxes: Arc<Sandboxes>, host: watch::Receiver<HostLoad>) -> Self {
        let (seq, tally, edits) = (Arc::default(), Arc::default(), Arc::default());
        Self { sandboxes, host, seq, tally, edits }
    }

    pub(super) fn report_edits(&self, edits: Arc<HandEdits>) {
        drop(self.edits.set(edits));
    }

    fn config_edits(&self) -> Vec<ConfigEdit> {
        let recent = self.edits.get().map(|edits| edits.recent(self.sandboxes.now_ms()));
        let edit = |(file, at_ms)| ConfigEdit { file, put_back_at: Some(timestamp(at_ms)) };
        recent.unwrap_or_default().into_iter().map(edit).collect()
    }

    pub(super) async fn report(&self) -> NodeLoad {
        let options = self.sandboxes.options();
        let host = *self.host.borrow();
        let tally = self.tally().await;
        let mut templates = self.sandboxes.cloneable().await;
        templates.sort_by_key(|template| &template.snapshot);
        let room = self.room(&templates).await;
        // A snapshot with several templates is cloned from the one with the shortest queue.
        let mut queues: BTreeMap<_, usize> = BTreeMap::new();
        for template in &templates {
            let queued = self.sandboxes.queued(template.vmid);
            let least = queues.entry(&template.snapshot).or_insert(queued);
            *least = queued.min(*least);
        }
        templates.dedup_by_key(|template| &template.snapshot);
        let mut snapshot_sizes = Vec::new();
        for template in &templates {
            snapshot_sizes.push(self.size(template).await.into());
        }
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let cluster = self.sandboxes.pve().cluster().await;
        let state = self.sandboxes.scheduling().state;
        NodeLoad {
            cores: host.cores,
            cpu_busy: host.cpu_busy,
            psi_cpu: host.psi_cpu,
            psi_memory: host.psi_memory,
            psi_io: host.psi_io,
            memory_total: host.memory_total,
            memory_available: host.memory_available,
            memory_allocated: tally.memory_allocated,
            cores_allocated: tally.cores_allocated,
            starting: tally.starting,
            queued: tally.queued,
            running: tally.running,
            storage_free: room.free,
            storage_total: room.total,
            vmids_free: tally.vmids_free,
            ips_free: tally.ips_free,
            quorate: cluster.quorate,
            snapshots: templates.iter().map(|template| template.snapshot.to_string()).collect(),
            start_ms: tally.start_ms,
            // Taken last: a report with a higher number has seen at least as much.
            seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1,
            taken_at: Some(timestamp(self.sandboxes.now_ms())),
            snapshot_sizes,
            cpu_busy_60s: host.cpu_busy_60s,
            psi_memory_full: host.psi_memory_full,
            psi_io_full: host.psi_io_full,
            foreign_cores: host.foreign_cores,
            foreign_memory: host.foreign_memory,
            booting_cores: Some(f64::from(tally.booting_cores)),
            start_slots: count(options.limits.starts_max),
            snapshot_queues: queues.values().map(|&queued| count(queued)).collect(),
            snapshot_queue_max: count(options.limits.clone_queue_max),
            maintenance: cluster.maintenance,
            thin_data_used: room.thin_data,
            thin_metadata_used: room.thin_metadata,
            cordoned: state == SchedulingState::Cordoned,
            draining: state == SchedulingState::Draining,
            renumbered_to: self.sandboxes.renumbered(&cluster).map_or(0, |changed| changed.now),
            snapshot_ports: templates
                .iter()
                .map(|template| convert::default_ports(&template.ports))
                .collect(),
            labels: options.labels.iter().map(ToString::to_string).collect(),
            config_edits: self.config_edits(),
        }
    }

    /// Returns the tally of the journal, or the last one when the journal cannot be read.
    async fn tally(&self) -> Tally {
        let fresh = self.sandboxes.tally().await;
        let mut kept = self.tally.lock();
        match fresh {
            Ok(fresh) => *kept = fresh,
            Err(error) => tracing::warn!(%error, "a load report contains old counts"),
        }
        *kept
    }

    /// Returns the size of a template's sandboxes where their creation sets none: with its root disk, which each of
    /// them has at least. Creations ask for no disk then, so the options have none.
    async fn size(&self, template: &Template) -> Size {
        let config = self.sandboxes.pve().config(template.vmid).await;
        let disk_gib = config.ok().flatten().map_or(0, |config| config.rootfs_gib());
        Size { disk_gib, ..template.size }
    }

    /// Returns the worst values of the templates' storages: a report must not promise what a clone
    /// does not find.
    async fn room(&self, templates: &[&Template]) -> StorageRoom {
        let mut worst: Option<StorageRoom> = None;
        for template in templates {
            match self.sandboxes.pve().storage_room(template.vmid).await {
                Ok(room) => worst = Some(worst.map_or(room, |worst| worst.worse(room))),
                Err(error) => tracing::debug!(%error, "the free space of a storage is unknown"),
            }
        }
        worst.unwrap_or_default()
    }
}
