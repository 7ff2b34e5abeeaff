//! Memory of the sandboxes of other nodes: where each is, and for a day where each was, so that its
//! URL says "deleted" at every node, not only at its owner's. Pure.
//!
//! This copy only serves to find the owner, which is authoritative; nothing is ever decided by it
//! alone.

use std::collections::{BTreeMap, HashMap};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::NodeName,
};

use crate::pve::Cluster;

/// Time for which sandboxes that have left are remembered, in milliseconds; the same as owners keep
/// tombstones.
const MEMORY_MS: u64 = 24 * 60 * 60 * 1000;
/// Time for which a config is not read again, in milliseconds. A mark does not change, but a vmid
/// may get another owner.
const FRESH_MS: u64 = 60_000;
/// Most sandboxes that have left and are remembered.
const LEFT_MAX: usize = 100_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    pub vmid: Vmid,
    pub node: NodeName,
    /// Time when it was gone, in milliseconds since 1970; `None` while it is there.
    pub left_ms: Option<u64>,
}

/// Location of a sandbox, current or last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// No known location.
    Nowhere,
    Here,
    On(NodeName),
}

#[derive(Debug)]
pub struct Seen {
    own: NodeName,
    guests: BTreeMap<Vmid, NodeName>,
    sandboxes: HashMap<SandboxId, Sighting>,
    /// Sandbox of each container, current or last.
    vmids: HashMap<Vmid, SandboxId>,
    /// Node and time of the last read of each config, in milliseconds.
    read: HashMap<Vmid, (NodeName, u64)>,
}

impl Seen {
    /// Starts from remembered sightings. The first `update` finds those that have left.
    pub fn new(own: NodeName, remembered: impl IntoIterator<Item = (SandboxId, Sighting)>) -> Self {
        let sandboxes: HashMap<_, _> = remembered.into_iter().collect();
        let mut vmids = HashMap::new();
        for (id, sighting) in &sandboxes {
            // Ids sort by the time of their creation.
            let last = vmids.entry(sighting.vmid).or_insert(*id);
            *last = (*last).max(*id);
        }
        Self { own, guests: BTreeMap::new(), sandboxes, vmids, read: HashMap::new() }
    }

    /// Lists the containers whose config must be read before `update`.
    pub fn unread(&self, cluster: &Cluster, now_ms: u64) -> Vec<(Vmid, NodeName)> {
        let unread = |vmid: &Vmid, node: &NodeName| {
            self.read.get(vmid).is_none_or(|(at, ms)| at != node || now_ms >= ms + FRESH_MS)
        };
        let elsewhere = cluster.guests.iter().filter(|(_, node)| **node != self.own);
        elsewhere.filter(|(v, n)| unread(v, n)).map(|(v, n)| (*v, n.clone())).collect()
    }

    /// Applies the current state of the cluster, and the sandbox ids in the configs that were read.
    /// Returns the sandboxes that are new, have moved or have left, which must be saved.
    pub fn update(
        &mut self,
        cluster: Cluster,
        marks: &BTreeMap<Vmid, Option<SandboxId>>,
        now_ms: u64,
    ) -> Vec<SandboxId> {
        self.guests = cluster.guests;
        let Self { own, guests, sandboxes, vmids, read } = self;
        read.retain(|vmid, _| guests.contains_key(vmid));
        let mut changed = Vec::new();
        for (vmid, mark) in marks {
            let Some(node) = guests.get(vmid).filter(|node| *node != own) else { continue };
            read.insert(*vmid, (node.clone(), now_ms));
            let Some(id) = *mark else { continue };
            let sighting = Sighting { vmid: *vmid, node: node.clone(), left_ms: None };
            vmids.insert(*vmid, id);
            if sandboxes.get(&id) != Some(&sighting) {
                sandboxes.insert(id, sighting);
                changed.push(id);
            }
        }
        for (id, sighting) in sandboxes.iter_mut() {
            let there =
                vmids.get(&sighting.vmid) == Some(id) && guests.contains_key(&sighting.vmid);
            if !there && sighting.left_ms.is_none() {
                sighting.left_ms = Some(now_ms);
                changed.push(*id);
            }
        }
        self.forget(now_ms);
        changed
    }

    fn forget(&mut self, now_ms: u64) {
        let Self { sandboxes, vmids, .. } = self;
        let mut left: Vec<u64> = sandboxes.values().filter_map(|s| s.left_ms).collect();
        let too_many = left.len().saturating_sub(LEFT_MAX);
        let mut until = now_ms.saturating_sub(MEMORY_MS);
        if too_many > 0 {
            let (_, nth, _) = left.select_nth_unstable(too_many - 1);
            until = until.max(nth.saturating_add(1));
        }
        sandboxes.retain(|id, sighting| {
            let keep = sighting.left_ms.is_none_or(|ms| ms >= until);
            if !keep && vmids.get(&sighting.vmid) == Some(id) {
                vmids.remove(&sighting.vmid);
            }
            keep
        });
    }

    /// Finds where a sandbox is, or was.
    pub fn find(&self, sandbox: SandboxRef) -> Place {
        let node = match sandbox {
            SandboxRef::Vmid(vmid) => self.guests.get(&vmid).or_else(|| {
                self.vmids.get(&vmid).and_then(|id| self.sandboxes.get(id)).map(|s| &s.node)
            }),
            SandboxRef::Id(id) => self.sandboxes.get(&id).map(|sighting| match sighting.left_ms {
                // The container may have moved since its config was read.
                None => self.guests.get(&sighting.vmid).unwrap_or(&sighting.node),
                Some(_) => &sighting.node,
            }),
        };
        match node {
            None => Place::Nowhere,
            Some(node) if *node == self.own => Place::Here,
            Some(node) => Place::On(node.clone()),
        }
    }

    /// Iterates over all remembered sandboxes.
    pub fn sightings(&self) -> impl Iterator<Item = (&SandboxId, &Sighting)> {
        self.sandboxes.iter()
    }

    pub fn sighting(&self, id: &SandboxId) -> Option<&Sighting> {
        self.sandboxes.get(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = MEMORY_MS;

    fn node(number: u32) -> NodeName {
        format!("node{number}").parse().expect("a node")
    }

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("a vmid")
    }

    fn id(number: u8) -> SandboxId {
        SandboxId::new(1_000 + u64::from(number), &[number; 10])
    }

    fn cluster(guests: &[(u32, u32)]) -> Cluster {
        let guests = guests.iter().map(|(guest, at)| (vmid(*guest), node(*at))).collect();
        Cluster { quorate: true, guests, ..Cluster::default() }
    }

    fn marks(list: &[(u32, Option<u8>)]) -> BTreeMap<Vmid, Option<SandboxId>> {
        list.iter().map(|(guest, mark)| (vmid(*guest), mark.map(id))).collect()
    }

    fn seen() -> Seen {
        Seen::new(node(1), [])
    }

    #[test]
    fn sandbox_of_another_node_is_found_by_id_and_vmid() {
        let mut seen = seen();
        let now = cluster(&[(100, 1), (200, 2), (300, 3)]);
        assert_eq!(seen.unread(&now, 0), [(vmid(200), node(2)), (vmid(300), node(3))]);
        assert_eq!(seen.update(now, &marks(&[(200, Some(2)), (300, None)]), 0), [id(2)]);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(100))), Place::Here);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(200))), Place::On(node(2)));
        assert_eq!(seen.find(SandboxRef::Id(id(2))), Place::On(node(2)));
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(300))), Place::On(node(3)));
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(400))), Place::Nowhere);
        assert_eq!(seen.find(SandboxRef::Id(id(3))), Place::Nowhere);
    }

    #[test]
    fn departed_sandbox_is_remembered_for_a_day() {
        let mut seen = seen();
        seen.update(cluster(&[(200, 2)]), &marks(&[(200, Some(2))]), 0);
        assert_eq!(seen.update(cluster(&[]), &marks(&[]), 5), [id(2)]);
        for name in [SandboxRef::Vmid(vmid(200)), SandboxRef::Id(id(2))] {
            assert_eq!(seen.find(name), Place::On(node(2)));
        }
        assert!(seen.update(cluster(&[]), &marks(&[]), 5 + DAY).is_empty());
        assert_eq!(seen.find(SandboxRef::Id(id(2))), Place::On(node(2)));
        seen.update(cluster(&[]), &marks(&[]), 6 + DAY);
        for name in [SandboxRef::Vmid(vmid(200)), SandboxRef::Id(id(2))] {
            assert_eq!(seen.find(name), Place::Nowhere);
        }
        assert!(seen.vmids.is_empty() && seen.read.is_empty());
    }

    #[test]
    fn reused_vmid_resolves_to_the_new_sandbox() {
        let mut seen = seen();
        seen.update(cluster(&[(200, 2)]), &marks(&[(200, Some(2))]), 0);
        let changed = seen.update(cluster(&[(200, 3)]), &marks(&[(200, Some(3))]), 1);
        assert_eq!(changed, [id(3), id(2)]);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(200))), Place::On(node(3)));
        assert_eq!(seen.find(SandboxRef::Id(id(2))), Place::On(node(2)));
    }

    #[test]
    fn config_is_reread_after_a_move_and_periodically() {
        let mut seen = seen();
        let now = || cluster(&[(200, 2)]);
        seen.update(now(), &marks(&[(200, Some(2))]), 0);
        assert!(seen.unread(&now(), FRESH_MS - 1).is_empty());
        assert_eq!(seen.unread(&now(), FRESH_MS).len(), 1);
        assert_eq!(seen.unread(&cluster(&[(200, 3)]), 1), [(vmid(200), node(3))]);
    }

    #[test]
    fn remembered_sandbox_is_found_after_a_restart() {
        let there = Sighting { vmid: vmid(200), node: node(2), left_ms: None };
        let mut seen = Seen::new(node(1), [(id(2), there)]);
        assert_eq!(seen.update(cluster(&[]), &marks(&[]), 9), [id(2)]);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(200))), Place::On(node(2)));
        assert_eq!(seen.sighting(&id(2)).and_then(|s| s.left_ms), Some(9));
    }

    #[test]
    fn number_of_departed_sandboxes_is_bounded() {
        let many = u32::try_from(LEFT_MAX).expect("fits") + 10;
        let remembered = (0..many).map(|n| {
            let [.., a, b, c] = n.to_be_bytes();
            let id = SandboxId::new(n.into(), &[0, 0, 0, 0, 0, 0, 0, a, b, c]);
            (
                id,
                Sighting {
                    vmid: vmid(100 + n),
                    node: node(2),
                    left_ms: Some(1_000 + u64::from(n)),
                },
            )
        });
        let mut seen = Seen::new(node(1), remembered);
        seen.update(cluster(&[]), &marks(&[]), 2_000);
        assert_eq!(seen.sightings().count(), LEFT_MAX);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(109))), Place::Nowhere);
        assert_eq!(seen.find(SandboxRef::Vmid(vmid(110))), Place::On(node(2)));
    }
}
