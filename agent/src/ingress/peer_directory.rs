//! Memory of the sandboxes of all nodes: where each is, and for a day where each was, so that its
//! URL says "deleted" at every node, not only at its owner's. Pure.
//!
//! This copy only serves to find the owner, which is authoritative; nothing is ever decided by it
//! alone. Where each container is comes as a whole. The sandbox in it is in its config, which is read when pmxcfs gives
//! the config another version.

use std::{
    cell::LazyCell,
    collections::{BTreeMap, HashMap},
};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::NodeName,
};

use crate::pve::Cluster;

/// Time for which sandboxes that have left are remembered, in milliseconds; the same as owners keep
/// tombstones.
const MEMORY_MS: u64 = 24 * 60 * 60 * 1000;
/// Time after which a config is read again although its version is the same, in milliseconds. pmxcfs begins to count
/// anew when it starts, so a config that was written meanwhile may have got its old number.
const AGE_MS: u64 = 10 * 60 * 1000;
/// Most configs that are read again for their age in one look: those that were read together do not come together.
const AGED_MAX: usize = 50;
/// Most sandboxes that have left and are remembered.
const LEFT_MAX: usize = 100_000;

/// Container and node of a sandbox, current or last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Number of the container.
    pub vmid: Vmid,
    /// Node of the container.
    pub node: NodeName,
    /// Time when it was gone, in milliseconds since 1970; `None` while it is there.
    pub left_ms: Option<u64>,
}

/// Location of a sandbox, current or last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// No known location.
    Nowhere,
    /// On this node.
    Here,
    /// On another node.
    On(NodeName),
}

/// Config of a container that must be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// Number of the container.
    pub vmid: Vmid,
    /// Node of the container.
    pub node: NodeName,
    /// Version that was current when this was listed; what is read is of this version or of a later one.
    version: u64,
}

/// Last read of a config.
#[derive(Debug)]
struct Read {
    node: NodeName,
    version: u64,
    at_ms: u64,
}

/// Locations of the sandboxes of all nodes.
#[derive(Debug)]
pub struct PeerDirectory {
    own: NodeName,
    guests: BTreeMap<Vmid, NodeName>,
    versions: BTreeMap<Vmid, u64>,
    sandboxes: HashMap<SandboxId, Location>,
    /// Sandbox of each container, current or last.
    vmids: HashMap<Vmid, SandboxId>,
    /// Configs that were read.
    read: HashMap<Vmid, Read>,
}

impl PeerDirectory {
    /// Starts from remembered locations. The first `apply` finds those that have left.
    pub fn new(own: NodeName, remembered: impl IntoIterator<Item = (SandboxId, Location)>) -> Self {
        let sandboxes: HashMap<_, _> = remembered.into_iter().collect();
        let mut vmids = HashMap::new();
        for (id, location) in &sandboxes {
            // Ids sort by the time of their creation.
            let last = vmids.entry(location.vmid).or_insert(*id);
            *last = (*last).max(*id);
        }
        let (guests, versions, read) = (BTreeMap::new(), BTreeMap::new(), HashMap::new());
        Self { own, guests, versions, sandboxes, vmids, read }
    }

    /// Applies the current state of the cluster: where each container is, and which are gone. Returns the sandboxes that
    /// have left, or are in another container, which must be saved.
    pub fn apply(&mut self, cluster: Cluster, now_ms: u64) -> Vec<SandboxId> {
        (self.guests, self.versions) = (cluster.guests, cluster.versions);
        let Self { guests, read, .. } = self;
        read.retain(|vmid, _| guests.contains_key(vmid));
        let changed = self.find_gone(now_ms);
        self.forget(now_ms);
        changed
    }

    fn find_gone(&mut self, now_ms: u64) -> Vec<SandboxId> {
        let Self { guests, sandboxes, vmids, .. } = self;
        let living = LazyCell::new(|| {
            let containers = vmids.iter().filter(|(vmid, _)| guests.contains_key(*vmid));
            containers.map(|(vmid, id)| (*id, *vmid)).collect::<HashMap<_, _>>()
        });
        let mut changed = Vec::new();
        for (id, location) in sandboxes.iter_mut() {
            let there =
                vmids.get(&location.vmid) == Some(id) && guests.contains_key(&location.vmid);
            if there || location.left_ms.is_some() {
                continue;
            }
            // An attempt to create it that was given up had a container, too: it lives in the other one.
            let other = living.get(id).and_then(|vmid| Some((*vmid, guests.get(vmid)?)));
            match other {
                Some((vmid, node)) => (location.vmid, location.node) = (vmid, node.clone()),
                None => location.left_ms = Some(now_ms),
            }
            changed.push(*id);
        }
        changed
    }

    /// Lists the configs to read, those of this node among them: a sandbox that has come here was seen elsewhere before.
    /// First those that are new, have moved or have changed, the last one first; then some that were read long ago.
    pub fn unread(&self, now_ms: u64) -> Vec<Unread> {
        let (mut unread, mut aged) = (Vec::new(), Vec::new());
        for (vmid, node) in &self.guests {
            let one = Unread { vmid: *vmid, node: node.clone(), version: self.version(*vmid) };
            match self.read_of(*vmid, node) {
                None => unread.push(one),
                Some(read) if now_ms >= read.at_ms.saturating_add(AGE_MS) => {
                    aged.push((read.at_ms, one));
                }
                Some(_) => {}
            }
        }
        unread.sort_by_key(|one| std::cmp::Reverse(one.version));
        aged.sort_by_key(|(at_ms, _)| *at_ms);
        unread.extend(aged.into_iter().take(AGED_MAX).map(|(_, one)| one));
        unread
    }

    /// True while a config is new or has changed, and was not read since: any sandbox may be in it.
    pub fn is_behind(&self) -> bool {
        self.guests.iter().any(|(vmid, node)| self.read_of(*vmid, node).is_none())
    }

    fn version(&self, vmid: Vmid) -> u64 {
        self.versions.get(&vmid).copied().unwrap_or_default()
    }

    /// Returns the read of a config as it is now.
    fn read_of(&self, vmid: Vmid, node: &NodeName) -> Option<&Read> {
        let version = self.version(vmid);
        self.read.get(&vmid).filter(|read| read.node == *node && read.version == version)
    }

    /// Notes the sandbox that a config is of. Returns the sandboxes that are new, have moved or have left, which must be
    /// saved.
    pub fn note(
        &mut self,
        config: &Unread,
        mark: Option<SandboxId>,
        now_ms: u64,
    ) -> Vec<SandboxId> {
        let Unread { vmid, node, version } = config;
        // The container may have moved or gone since.
        if self.guests.get(vmid) != Some(node) {
            return Vec::new();
        }
        let read = Read { node: node.clone(), version: *version, at_ms: now_ms };
        self.read.insert(*vmid, read);
        let Some(id) = mark else { return Vec::new() };
        // Of two containers of one sandbox, the one that was written last counts.
        if let Some(now) = self.sandboxes.get(&id)
            && now.left_ms.is_none()
            && now.vmid != *vmid
            && self.guests.contains_key(&now.vmid)
            && self.vmids.get(&now.vmid) == Some(&id)
            && self.version(now.vmid) > *version
        {
            self.vmids.insert(*vmid, id);
            return Vec::new();
        }
        let mut changed = Vec::new();
        let location = Location { vmid: *vmid, node: node.clone(), left_ms: None };
        if self.sandboxes.get(&id) != Some(&location) {
            self.sandboxes.insert(id, location);
            changed.push(id);
        }
        let before = self.vmids.insert(*vmid, id).filter(|before| *before != id);
        if let Some(before) = before
            && let Some(location) = self.sandboxes.get_mut(&before)
            && location.vmid == *vmid
            && location.left_ms.is_none()
        {
            location.left_ms = Some(now_ms);
            changed.push(before);
        }
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
        let before = sandboxes.len();
        sandboxes.retain(|_, location| location.left_ms.is_none_or(|ms| ms >= until));
        if sandboxes.len() < before {
            vmids.retain(|_, id| sandboxes.contains_key(id));
        }
    }

    /// Finds where a sandbox is, or was.
    pub fn find(&self, sandbox: SandboxRef) -> Whereabouts {
        let node = match sandbox {
            SandboxRef::Vmid(vmid) => self.guests.get(&vmid).or_else(|| {
                self.vmids.get(&vmid).and_then(|id| self.sandboxes.get(id)).map(|s| &s.node)
            }),
            SandboxRef::Id(id) => self.sandboxes.get(&id).map(|location| match location.left_ms {
                // The container may have moved since its config was read.
                None => self.guests.get(&location.vmid).unwrap_or(&location.node),
                Some(_) => &location.node,
            }),
        };
        match node {
            None => Whereabouts::Nowhere,
            Some(node) if *node == self.own => Whereabouts::Here,
            Some(node) => Whereabouts::On(node.clone()),
        }
    }

    /// Iterates over all remembered sandboxes.
    pub fn locations(&self) -> impl Iterator<Item = (&SandboxId, &Location)> {
        self.sandboxes.iter()
    }

    /// Returns where a sandbox is, or was; `None` for one that is unknown or forgotten.
    pub fn location(&self, id: &SandboxId) -> Option<&Location> {
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

    /// Guests with their node and the version of their config.
    fn versions(guests: &[(u32, u32, u64)]) -> Cluster {
        Cluster {
            quorate: true,
            guests: guests.iter().map(|(guest, at, _)| (vmid(*guest), node(*at))).collect(),
            versions: guests.iter().map(|(guest, _, version)| (vmid(*guest), *version)).collect(),
            ..Cluster::default()
        }
    }

    fn of_version_one(guests: &[(u32, u32)]) -> Vec<(u32, u32, u64)> {
        guests.iter().map(|(guest, at)| (*guest, *at, 1)).collect()
    }

    fn cluster(guests: &[(u32, u32)]) -> Cluster {
        versions(&of_version_one(guests))
    }

    /// Applies a cluster, and reads these of the configs that must be read.
    fn look(
        directory: &mut PeerDirectory,
        cluster: Cluster,
        marks: &[(u32, Option<u8>)],
        now_ms: u64,
    ) -> Vec<SandboxId> {
        let mut changed = directory.apply(cluster, now_ms);
        for config in directory.unread(now_ms) {
            let mark = marks.iter().find(|(guest, _)| vmid(*guest) == config.vmid);
            if let Some((_, mark)) = mark {
                changed.extend(directory.note(&config, mark.map(id), now_ms));
            }
        }
        changed
    }

    fn unread(directory: &PeerDirectory, now_ms: u64) -> Vec<u32> {
        directory.unread(now_ms).iter().map(|config| config.vmid.get()).collect()
    }

    fn directory() -> PeerDirectory {
        PeerDirectory::new(node(1), [])
    }

    #[test]
    fn sandbox_of_another_node_is_found_by_id_and_vmid() {
        let mut directory = directory();
        let now = cluster(&[(100, 1), (200, 2), (300, 3)]);
        let read = [(100, None), (200, Some(2)), (300, None)];
        assert_eq!(look(&mut directory, now, &read, 0), [id(2)]);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(100))), Whereabouts::Here);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(200))), Whereabouts::On(node(2)));
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(2)));
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(300))), Whereabouts::On(node(3)));
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(400))), Whereabouts::Nowhere);
        assert_eq!(directory.find(SandboxRef::Id(id(3))), Whereabouts::Nowhere);
    }

    #[test]
    fn departed_sandbox_is_remembered_for_a_day() {
        let mut directory = directory();
        look(&mut directory, cluster(&[(200, 2)]), &[(200, Some(2))], 0);
        assert_eq!(look(&mut directory, cluster(&[]), &[], 5), [id(2)]);
        for name in [SandboxRef::Vmid(vmid(200)), SandboxRef::Id(id(2))] {
            assert_eq!(directory.find(name), Whereabouts::On(node(2)));
        }
        assert!(look(&mut directory, cluster(&[]), &[], 5 + DAY).is_empty());
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(2)));
        look(&mut directory, cluster(&[]), &[], 6 + DAY);
        for name in [SandboxRef::Vmid(vmid(200)), SandboxRef::Id(id(2))] {
            assert_eq!(directory.find(name), Whereabouts::Nowhere);
        }
        assert!(directory.vmids.is_empty() && directory.read.is_empty());
    }

    #[test]
    fn reused_vmid_resolves_to_the_new_sandbox() {
        let mut directory = directory();
        look(&mut directory, cluster(&[(200, 2)]), &[(200, Some(2))], 0);
        let changed = look(&mut directory, cluster(&[(200, 3)]), &[(200, Some(3))], 1);
        assert_eq!(changed, [id(3), id(2)]);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(200))), Whereabouts::On(node(3)));
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(2)));
    }

    /// Only the node that had it last knows that it was deleted, and not moved once more.
    #[test]
    fn deleted_sandbox_was_on_the_node_that_it_moved_to() {
        for (to, place) in [(1, Whereabouts::Here), (3, Whereabouts::On(node(3)))] {
            let mut directory = directory();
            look(&mut directory, cluster(&[(200, 2)]), &[(200, Some(2))], 0);
            let moved = cluster(&[(200, to)]);
            assert_eq!(look(&mut directory, moved, &[(200, Some(2))], 1), [id(2)], "{place:?}");
            assert_eq!(directory.location(&id(2)).and_then(|location| location.left_ms), None);
            assert_eq!(look(&mut directory, cluster(&[]), &[], 2), [id(2)]);
            for name in [SandboxRef::Id(id(2)), SandboxRef::Vmid(vmid(200))] {
                assert_eq!(directory.find(name), place);
            }
        }
    }

    /// Each attempt to create a sandbox makes a container with its mark.
    #[test]
    fn sandbox_stays_found_when_the_container_of_an_earlier_attempt_is_removed() {
        let mut directory = directory();
        let both = || versions(&[(200, 2, 2), (300, 3, 1)]);
        look(&mut directory, both(), &[(300, Some(2))], 0);
        look(&mut directory, both(), &[(200, Some(2))], 1);
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(2)), "written last");
        assert_eq!(look(&mut directory, versions(&[(300, 3, 1)]), &[], 2), [id(2)]);
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(3)));
        assert_eq!(directory.location(&id(2)).and_then(|location| location.left_ms), None);
        assert_eq!(look(&mut directory, versions(&[]), &[], 3), [id(2)]);
        assert_eq!(
            directory.find(SandboxRef::Id(id(2))),
            Whereabouts::On(node(3)),
            "it was there last"
        );
    }

    #[test]
    fn container_of_an_earlier_attempt_that_is_read_later_hides_nothing() {
        let mut directory = directory();
        let both = || versions(&[(200, 2, 1), (300, 3, 2)]);
        look(&mut directory, both(), &[(300, Some(2)), (200, Some(2))], 0);
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(3)));
        assert_eq!(look(&mut directory, versions(&[(300, 3, 2)]), &[], 1), []);
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(3)));
    }

    /// A container that exists becomes a sandbox, or is released, by a new line in its config.
    #[test]
    fn config_is_read_again_as_soon_as_it_is_written() {
        let mut directory = directory();
        let before = || versions(&[(200, 2, 7), (201, 2, 8)]);
        look(&mut directory, before(), &[(200, None), (201, None)], 0);
        directory.apply(before(), 1);
        assert!(unread(&directory, 1).is_empty() && !directory.is_behind());
        directory.apply(versions(&[(200, 2, 9), (201, 2, 8)]), 2);
        assert_eq!((unread(&directory, 2), directory.is_behind()), (vec![200], true));
        let adopted = versions(&[(200, 2, 9), (201, 2, 8)]);
        assert_eq!(look(&mut directory, adopted, &[(200, Some(2))], 3), [id(2)]);
        assert_eq!(directory.find(SandboxRef::Id(id(2))), Whereabouts::On(node(2)));
        assert!(!directory.is_behind());
        // On another node it is another file. After a start of pmxcfs all have other numbers.
        directory.apply(versions(&[(200, 3, 9), (201, 2, 8)]), 4);
        assert_eq!(unread(&directory, 4), [200]);
        directory.apply(versions(&[(200, 2, 1), (201, 2, 2)]), 5);
        assert_eq!(unread(&directory, 5), [201, 200]);
    }

    #[test]
    fn config_that_changed_last_is_read_first_and_what_was_read_stays_read() {
        let mut directory = directory();
        let now = || versions(&[(200, 2, 5), (201, 2, 9), (202, 3, 7)]);
        directory.apply(now(), 0);
        assert_eq!(unread(&directory, 0), [201, 202, 200]);
        look(&mut directory, now(), &[(201, Some(1))], 0);
        assert_eq!((unread(&directory, 0), directory.is_behind()), (vec![202, 200], true));
        // Requests by vmid need no mark, and what was read is found.
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(200))), Whereabouts::On(node(2)));
        assert_eq!(directory.find(SandboxRef::Id(id(1))), Whereabouts::On(node(2)));
        look(&mut directory, now(), &[(200, None), (202, None)], 1);
        assert!(unread(&directory, 1).is_empty() && !directory.is_behind());
    }

    #[test]
    fn mark_of_a_container_that_has_moved_since_is_not_taken() {
        let mut directory = directory();
        directory.apply(cluster(&[(200, 2)]), 0);
        let config = directory.unread(0).remove(0);
        directory.apply(cluster(&[(200, 3)]), 1);
        assert!(directory.note(&config, Some(id(2)), 1).is_empty());
        assert_eq!(unread(&directory, 1), [200]);
    }

    #[test]
    fn configs_of_some_age_are_read_again_a_few_at_a_time() {
        let mut directory = directory();
        let many = u32::try_from(AGED_MAX).expect("fits") + 1;
        let guests: Vec<_> = (0..many).map(|number| (100 + number, 2)).collect();
        let marks: Vec<_> = guests.iter().map(|(guest, _)| (*guest, None)).collect();
        look(&mut directory, cluster(&guests), &marks, 0);
        assert!(unread(&directory, AGE_MS - 1).is_empty());
        look(&mut directory, cluster(&guests), &marks, AGE_MS);
        assert_eq!(unread(&directory, AGE_MS), [99 + many]);
        assert!(!directory.is_behind(), "they were read");
        // One that has changed comes before all of them.
        let changed = versions(&[&[(100, 2, 2)][..], &of_version_one(&guests[1..])].concat());
        directory.apply(changed, AGE_MS);
        assert_eq!(unread(&directory, AGE_MS), [100, 99 + many]);
    }

    #[test]
    fn remembered_sandbox_is_found_after_a_restart() {
        let there = Location { vmid: vmid(200), node: node(2), left_ms: None };
        let mut directory = PeerDirectory::new(node(1), [(id(2), there)]);
        assert_eq!(look(&mut directory, cluster(&[]), &[], 9), [id(2)]);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(200))), Whereabouts::On(node(2)));
        assert_eq!(directory.location(&id(2)).and_then(|s| s.left_ms), Some(9));
    }

    #[test]
    fn number_of_departed_sandboxes_is_bounded() {
        let many = u32::try_from(LEFT_MAX).expect("fits") + 10;
        let remembered = (0..many).map(|n| {
            let [.., a, b, c] = n.to_be_bytes();
            let id = SandboxId::new(n.into(), &[0, 0, 0, 0, 0, 0, 0, a, b, c]);
            (
                id,
                Location {
                    vmid: vmid(100 + n),
                    node: node(2),
                    left_ms: Some(1_000 + u64::from(n)),
                },
            )
        });
        let mut directory = PeerDirectory::new(node(1), remembered);
        directory.apply(cluster(&[]), 2_000);
        assert_eq!(directory.locations().count(), LEFT_MAX);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(109))), Whereabouts::Nowhere);
        assert_eq!(directory.find(SandboxRef::Vmid(vmid(110))), Whereabouts::On(node(2)));
    }
}
