//! The contract of `Pve` as one suite of behaviours, run over every implementation: the in-memory
//! cluster, the real driver over the lab's stand-in for `pct`, and the real driver on a PVE node.
//! Only what all implementations do alike can be relied upon, and makes the simulation meaningful.
//!
//! - Over the fake: always.
//! - In a node of the lab: with `PVE_SANDBOX_LAB_TESTS=1`, which `make test-lab` sets.
//! - On a PVE node: with `PVE_TESTS=1 PVE_TEST_TEMPLATE=vmid`, and where needed
//!   `PVE_TEST_BRIDGE=vmbr0`, `PVE_TEST_ADDRESS=ip/prefix,gateway` (DHCP without) and
//!   `PVE_TEST_VMID=first` (990000). It touches only containers that it created itself. Its last
//!   line counts what was shown, skipped and failed, and names the latter two.

#![expect(
    clippy::disallowed_methods,
    reason = "a test program: it is told things by its environment, and plays an operator who runs `pct`"
)]

mod behaviour;
mod fake;
mod in_the_lab;
mod on_a_node;
mod stage;
mod suite;
