//! The lab's templates as data: what is in each, and the size of its sandboxes.

use crate::layout::NodeId;

/// A template, which is on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// Name in messages and in the cache.
    pub name: &'static str,
    /// Name by which users refer to it.
    pub snapshot: &'static str,
    /// Lists of its Debian packages.
    pub packages: &'static [&'static str],
    /// Id on the first node; those of the other nodes follow.
    pub first_vmid: u32,
    pub cores: u32,
    pub memory_mib: u32,
    /// Disk size, as the config names it.
    pub disk_gib: u32,
}

/// Packages that every template has.
const BASE: &str = include_str!("../template/packages.txt");

/// Small template for the tests: it has what they need, and nothing else.
pub const MINIMAL: Image = Image {
    name: "minimal",
    snapshot: "pvelxc_1vcpu_512mb_2gb_v1",
    packages: &[BASE],
    first_vmid: 9000,
    cores: 1,
    memory_mib: 512,
    disk_gib: 2,
};

/// Template for people, with the programs that an agent's work needs.
pub const TOOLS: Image = Image {
    name: "tools",
    snapshot: "pvelxc_1vcpu_1gb_4gb_v1",
    packages: &[BASE, include_str!("../template/tools.txt")],
    first_vmid: 9010,
    cores: 1,
    memory_mib: 1024,
    disk_gib: 4,
};

/// All templates.
pub const IMAGES: [Image; 2] = [MINIMAL, TOOLS];

impl Image {
    /// Returns the id on a node.
    pub fn vmid(&self, node: NodeId) -> u32 {
        self.first_vmid + u32::from(node.number()) - 1
    }

    /// Returns the names of its packages.
    pub fn package_names(&self) -> impl Iterator<Item = &'static str> {
        let lines = self.packages.iter().flat_map(|list| list.lines());
        lines.map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::NODES_MAX;

    #[test]
    fn no_two_templates_share_an_id() {
        let ids = IMAGES
            .iter()
            .flat_map(|image| NodeId::first(NODES_MAX).into_iter().map(|node| image.vmid(node)));
        let mut ids: Vec<u32> = ids.collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), IMAGES.len() * usize::from(NODES_MAX));
    }

    #[test]
    fn tools_are_in_their_template_alone() {
        assert!(TOOLS.package_names().any(|name| name == "git"));
        assert!(MINIMAL.package_names().all(|name| name != "git"));
    }
}
