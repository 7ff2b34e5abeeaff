//! The lab: a cluster of real nodes on one Debian machine, without Proxmox VE.
//!
//! A node is a set of namespaces with an init of its own, a root laid over the machine's root, a
//! copy-on-write disk, a bridge, and an /etc/pve that it shares with the others. Containers in it
//! are LXC's. Killing a node is a power cut; it boots again with its disk.
//!
//! Code map, from the outside in:
//! - `cli`: the program `lab`. `lab`: the same for tests, `Lab` and `Node`.
//! - `up`, `down`: the order in which things are made and unmade.
//! - `configure`: what an operator would write: certificates, tokens, configurations. `demo`: the
//!   main job, shown.
//! - `daemons`: what runs where, as data. `supervise`: keeps it running, also as a node's init.
//! - `node`: namespaces, root, entering. `disk`, `net`, `cgroup`: what a node is made of.
//! - `pmxcfs`: /etc/pve. `pve`: what the lab writes there. `template`: the sandboxes' Debian.
//! - `machine`: packages and devices. `forward`: ports on the loopback.
//! - `layout`, `settings`, `owner`: where what is, and whose the machine is. `process`, `run`, `mounts`, `sources`, `wire`,
//!   `progress`: small things that the rest stands on.
//!
//! What is never so: nothing of the lab is in the machine's own network but listeners on the
//! loopback; no process is ended that the lab has not recorded with the moment of its start;
//! nothing outlives the lab's supervisor, which every process of the lab is bound to.

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
pub mod install;
mod lab;
pub mod layout;
pub mod machine;
pub mod mounts;
pub mod net;
pub mod node;
pub mod owner;
pub mod pmxcfs;
pub mod process;
pub mod progress;
pub mod pve;
pub mod run;
pub mod settings;
pub mod sources;
pub mod supervise;
pub mod template;
pub mod up;
pub mod wire;

pub use lab::{Lab, Node};
pub use layout::{Layout, NodeId};
pub use up::UpOptions;
