//! HTTP requests from outside into the sandboxes of the cluster.
//!
//! Caddy runs one static configuration (`render`, `headers`, `answers`, `caddy`) and asks the agent for the
//! upstream of each request, over a unix socket (`server`). The answer is decided (`decide`, pure)
//! from the request's host, this node's sandboxes, and the owners of sandboxes on other nodes
//! (`peer_directory`, `owner_resolver`). A request for a sandbox that is paused or boots is held
//! (`hold`), if it is one that wakes (`intent`), and is told when it has to wait for long
//! (`interstitial`). So no request waits for a reload, a port is open only while it is exposed, and
//! changes to other sandboxes do not disturb an open WebSocket.
//!
//! The agent keeps that configuration as it should be (`keeper`), lets Caddy check it (`program`), and has it
//! used by a second Caddy beside the first (`switch`, `systemd`).
//!
//! Depends on `sandbox` and `pve`, not on `rpc` or `reconcile`.

mod answers;
pub mod caddy;
pub mod check;
pub mod decide;
mod headers;
pub mod hold;
pub mod intent;
mod interstitial;
pub mod keeper;
pub mod listeners;
pub mod low_ports;
pub mod metrics;
pub mod own_certificate;
pub mod owner_resolver;
mod pages;
pub mod peer_directory;
pub mod probe;
pub mod program;
pub mod render;
mod replies;
pub mod routes;
pub mod secure;
pub mod server;
pub mod settings;
pub mod switch;
pub mod systemd;
pub mod version;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use proto::{
    host::FullName,
    id::{SandboxId, SandboxRef, Vmid},
    name::{NodeName, Port, Team},
    visibility::Visibility,
};

use crate::journal::AccessKey;

#[cfg(test)]
pub(crate) use replies::refuse;

/// Sandbox of this node, as a route question needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Number of its container.
    pub vmid: Vmid,
    /// Team that owns the sandbox.
    pub team: Team,
    /// Name in host names, if it has one.
    pub name: Option<FullName>,
    /// State that decides whether it can answer.
    pub state: State,
    /// IP address, once it has one.
    pub ip: Option<IpAddr>,
    /// Exposed ports; all others are closed.
    pub ports: BTreeMap<Port, OpenPort>,
    /// Exposed port that its name alone leads to.
    pub main: Option<Port>,
    /// Key of the credentials for its ports; `None` before there was one.
    pub key: Option<AccessKey>,
}

/// Exposed port, as a route question needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenPort {
    /// Visibility: who reaches it.
    pub visibility: Visibility,
    /// Generation of its credentials.
    pub generation: u64,
}

impl OpenPort {
    /// A port that everybody reaches.
    pub const PUBLIC: Self = Self { visibility: Visibility::Public, generation: 0 };
}

/// State of a sandbox towards a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Running,
    /// The sandbox boots, for the first time or again.
    Booting,
    /// The sandbox is paused.
    Paused {
        /// True when a request wakes it.
        wakes: bool,
    },
    /// The sandbox is stopped or stopping.
    Stopped,
    /// The sandbox has been deleted, or is being deleted.
    Gone,
}

/// Owner of a sandbox that is not in this node's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// No owner, as far as the cluster knows.
    Nobody,
    /// Unknown: the cluster cannot be read, so any node may own it.
    Unknown,
    /// This node: a guest that is not ours, so it is never reached.
    Here,
    /// Another node, whose Caddy accepts requests from peers at this address.
    Peer(SocketAddr),
    /// Another node, which is down or has no address now.
    Down(NodeName),
}

/// Tables that route questions are answered from.
#[async_trait::async_trait]
pub trait Routes: Send + Sync + std::fmt::Debug {
    /// Looks up a sandbox of this node, in memory. By vmid: the current sandbox of that container,
    /// else the last one.
    fn local(&self, sandbox: SandboxRef) -> Option<Target>;

    /// Finds the sandbox that a host name by name leads to, in memory, on this node or another; `None` also where such
    /// host names are not answered.
    fn named(&self, name: &FullName) -> Option<SandboxId>;

    /// Looks up the owner of a sandbox that lives, or lived, on another node.
    async fn owner(&self, sandbox: SandboxRef) -> Owner;

    /// Records that a request goes to this sandbox of this node.
    fn used(&self, sandbox: &SandboxId);

    /// True when a container of this node listens on this port of its loopback interface only.
    async fn on_loopback(&self, vmid: Vmid, port: u16) -> bool;

    /// Wakes a paused sandbox of this node for a request; when this returns, look it up again.
    async fn wake(&self, sandbox: SandboxRef);
}
