//! What an operator does beside us, and what a power cut does to /etc/pve.

use std::collections::BTreeMap;

use agent::{
    journal::{Journal, Phase, Record},
    pve::{ContainerConfig, fake::Guest},
};
use proto::{id::Vmid, name::NodeName};

use crate::{chance::Chance, cluster::Cluster};

/// So many come back at most: of more the agent would think that its journal is wrong.
const BACK_MAX: u64 = 3;

/// Containers with their configs, as they were seen last; by the vmid.
#[derive(Debug, Default)]
pub(crate) struct Seen(BTreeMap<Vmid, (NodeName, ContainerConfig)>);

impl Seen {
    /// Takes note of what there is of ours.
    pub(crate) fn look(&mut self, cluster: &Cluster) {
        for (vmid, guest) in cluster.pve.guests() {
            let whole = guest.config.lock().is_none() && guest.config.rootfs().is_some();
            if whole && guest.config.mark().is_some_and(|mark| mark.vmid == vmid) {
                self.0.insert(vmid, (guest.node, guest.config));
            }
        }
    }

    /// pmxcfs loses its last writes at a power cut: containers that were deleted are there again.
    pub(crate) async fn bring_back(&self, cluster: &Cluster, index: usize, chance: &Chance) {
        let host = &cluster.hosts[index];
        let records = host.journal.all().await.expect("a journal");
        // What has gone to another node is in all copies of pmxcfs but this one's, which are more.
        let left = |r: &Record| !r.phase.ended() || r.moved_to.is_some();
        let lives = |vmid: &Vmid| records.iter().any(|r| r.vmid == *vmid && left(r));
        let guests = cluster.pve.guests();
        let mut gone: Vec<_> = self
            .0
            .iter()
            .filter(|(vmid, (node, _))| *node == host.name && !guests.contains_key(vmid))
            .filter(|(vmid, _)| !lives(vmid))
            .collect();
        for _ in 0..chance.below(BACK_MAX + 1).min(u64::try_from(gone.len()).expect("few")) {
            let at = usize::try_from(chance.below(u64::try_from(gone.len()).expect("few")));
            let (vmid, (node, config)) = gone.swap_remove(at.expect("an index"));
            cluster.pve.add_guest(node, *vmid, config.clone(), false);
        }
    }
}

/// A number that an agent has given to a creation, or will give next.
pub(crate) async fn coveted(cluster: &Cluster, chance: &Chance) -> Option<(NodeName, Vmid)> {
    let host = chance.pick(&cluster.hosts)?;
    let records = host.journal.all().await.expect("a journal");
    let free = |vmid: &Vmid| !cluster.pve.guests().contains_key(vmid);
    let waits = records.iter().find(|r| r.phase == Phase::Creating && free(&r.vmid));
    let last = records.iter().max_by_key(|record| record.revision)?.vmid;
    let next = Vmid::try_from(last.get() + 1).ok().filter(free);
    let vmid = waits.map(|record| record.vmid).or(next)?;
    Some((host.name.clone(), vmid))
}

/// A number that an agent will give next.
pub(crate) async fn next(cluster: &Cluster, chance: &Chance) -> Option<(NodeName, Vmid)> {
    let host = chance.pick(&cluster.hosts)?;
    let records = host.journal.all().await.expect("a journal");
    let (first, last) = host.journal.vmids();
    let its_own =
        records.iter().map(|record| record.vmid).filter(|vmid| (first..=last).contains(vmid));
    let next = Vmid::try_from(its_own.max()?.get() + 1).ok().filter(|vmid| *vmid <= last)?;
    let free = !cluster.pve.guests().contains_key(&next)
        && records.iter().all(|record| record.vmid != next);
    free.then(|| (host.name.clone(), next))
}

/// A sandbox whose container can be taken out for a while.
pub(crate) async fn quiet(cluster: &Cluster, id: &str) -> Option<Record> {
    for host in &cluster.hosts {
        let records = host.journal.all().await.expect("a journal");
        let found = records.into_iter().find(|record| record.id.to_string() == id);
        if let Some(record) = found {
            let quiet = matches!(record.phase, Phase::Running | Phase::Stopped);
            return quiet.then_some(record);
        }
    }
    None
}

/// A container of somebody's, stopped, without a mark but with our tag.
pub(crate) fn somebodys(node: &NodeName, vmid: Vmid) -> Guest {
    let text = format!(
        "hostname: pvelxc-00000000000000000000000000\ntags: pve-sandbox\n\
         rootfs: local-zfs:subvol-{vmid}-disk-7,size=2G\nunprivileged: 1\n"
    );
    let config = ContainerConfig::parse(text.as_bytes());
    Guest::stopped(node.clone(), config)
}
