//! Sums of what the living sandboxes of a team have.

use std::fmt;

use proto::spec::Size;

/// Number of sandboxes, and the sums of their sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sandboxes that are neither deleted nor failed; those under creation count.
    pub sandboxes: u64,
    /// Cores.
    pub cpu_cores: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Disks, GiB: those that were asked for, and those of the snapshots, where nodes tell them.
    pub disk_gib: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sandboxes, cpu_cores, memory_mib, disk_gib } = self;
        write!(f, "{sandboxes} sandboxes, {cpu_cores} cores, {memory_mib} MiB, {disk_gib} GiB")
    }
}

impl Usage {
    /// Returns the usage of one sandbox.
    pub fn of(size: Size) -> Self {
        Self { sandboxes: 1, ..Self::default() }.plus(Self::sizes(size))
    }

    /// Returns the usage that one sandbox gains by growing; a field that shrinks gains nothing.
    pub fn growth(from: Size, to: Size) -> Self {
        Self::sizes(Size {
            cpu_cores: to.cpu_cores.saturating_sub(from.cpu_cores),
            memory_mib: to.memory_mib.saturating_sub(from.memory_mib),
            disk_gib: to.disk_gib.saturating_sub(from.disk_gib),
        })
    }

    fn sizes(size: Size) -> Self {
        Self {
            sandboxes: 0,
            cpu_cores: size.cpu_cores.into(),
            memory_mib: size.memory_mib.into(),
            disk_gib: size.disk_gib.into(),
        }
    }

    /// Adds both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes + other.sandboxes,
            cpu_cores: self.cpu_cores + other.cpu_cores,
            memory_mib: self.memory_mib + other.memory_mib,
            disk_gib: self.disk_gib + other.disk_gib,
        }
    }

    /// Takes away what was added before.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes - other.sandboxes,
            cpu_cores: self.cpu_cores - other.cpu_cores,
            memory_mib: self.memory_mib - other.memory_mib,
            disk_gib: self.disk_gib - other.disk_gib,
        }
    }
}
