//! The lab: a cluster of real nodes on one Debian machine, without Proxmox VE.
//!
//! A node is a set of namespaces with its own init, a root overlaid on the machine's root, a
//! copy-on-write disk, a bridge, and an /etc/pve that it shares with the others. Its containers are
//! real LXC containers. Killing a node is a power cut; it boots again with its disk.
//!
//! Code map, from the outside in:
//! - `cli`: the program `lab`. `lab`: the same for tests, `Lab` and `Node`.
//! - `up`, `down`: create and remove the parts of a lab, in order.
//! - `configure`: what an operator would write: certificates, tokens, configurations. `demo`: shows
//!   the main job.
//! - `daemons`: the services as data. `supervise`: keeps them running, also as a node's init.
//! - `node`: namespaces, root, entering. `disk`, `net`, `cgroup`: the parts of a node.
//! - `pmxcfs`: /etc/pve. `pve`: what the lab writes there. `template`: builds the sandboxes' Debian.
//! - `image`: the templates as data. `lxcfs`, `way_out`: what makes sandboxes a place to work in.
//! - `probes`: what a sandbox reaches. `machine`: packages and devices. `forward`: ports on the loopback.
//! - `layout`, `settings`, `owner`: paths, settings, and which lab has the machine. `process`,
//!   `run`, `mounts`, `sources`, `wire`, `progress`: small helpers for the rest.
//!
//! Invariants: in the machine's own network the lab has only listeners on the loopback, and the
//! connections that sandboxes open by `way_out`; the lab ends only processes that it has recorded
//! with the time of their start; nothing outlives the lab's supervisor, to which every process of
//! the lab is bound.

#![expect(
    clippy::disallowed_methods,
    reason = "the bans are for the daemons; the lab starts programs and waits for the real clock"
)]

pub mod cgroup;
pub mod cli;
pub mod configure;
pub mod daemons;
pub mod demo;
pub mod disk;
pub mod down;
pub mod forward;
pub mod image;
pub mod install;
mod lab;
pub mod layout;
pub mod lxcfs;
pub mod machine;
pub mod mounts;
pub mod net;
pub mod node;
pub mod owner;
pub mod pmxcfs;
pub mod probes;
pub mod process;
pub mod progress;
pub mod pve;
pub mod run;
pub mod settings;
pub mod sources;
pub mod supervise;
pub mod template;
pub mod up;
pub mod way_out;
pub mod wire;

pub use lab::{Lab, Node};
pub use layout::{Layout, NodeId};
pub use up::UpOptions;
