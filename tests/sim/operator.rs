//! Actions of an operator on the host, and the effect of a power cut on /etc/pve.

use std::collections::BTreeMap;

use agent::{
    journal::{Feed, Phase, Record},
    pve::{ContainerConfig, fake::Guest},
};
use proto::{id::Vmid, name::NodeName};

use crate::{chance::Chance, cluster::Cluster};

/// Most containers that come back at once: with more, the agent would distrust its journal.
const BACK_MAX: u64 = 3;

/// Last known containers and their configs, by vmid.
#[derive(Debug, Default)]
pub(crate) struct Seen(BTreeMap<Vmid, (NodeName, ContainerConfig)>);

impl Seen {
    /// Records the present containers that are ours.
    pub(crate) fn look(&mut self, cluster: &Cluster) {
        for (vmid, guest) in cluster.pve.guests() {
            let whole = guest.config.lock().is_none() && guest.config.rootfs().is_some();
            if whole && guest.config.mark().is_some_and(|mark| mark.vmid == vmid) {
                self.0.insert(vmid, (guest.node, guest.config));
            }
        }
    }

    /// Restores deleted containers: pmxcfs loses its last writes at a power cut.
    pub(crate) async fn bring_back(&self, cluster: &Cluster, index: usize, chance: &Chance) {
        let host = &cluster.hosts[index];
        let records = host.journal.all().await.expect("a journal");
        // A container that moved to another node is in the other copies of pmxcfs, which are the
        // majority.
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

/// Returns a vmid that an agent has assigned to a creation, or will assign next.
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

/// Returns a vmid that an agent will assign next.
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

/// Returns the record of a sandbox whose container can be removed for a while.
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

/// Creates a foreign container: stopped, without a mark but with our tag.
pub(crate) fn somebodys(node: &NodeName, vmid: Vmid) -> Guest {
    let text = format!(
        "hostname: pvelxc-00000000000000000000000000\ntags: pve-sandbox\n\
         rootfs: local-zfs:subvol-{vmid}-disk-7,size=2G\nunprivileged: 1\n"
    );
    let config = ContainerConfig::parse(text.as_bytes());
    Guest::stopped(node.clone(), config)
}
